"""Who may import whom (rewritten below, when the rooms are furnished)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "odcft"


def test_memory_knows_no_files_and_no_ranks():
    tree = ast.parse((PACKAGE / "clustering" / "memory.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("odcft")]
