"""The benchmark of the index runs, cleans up, and shows that loader processes share the names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "image_index.py"


@pytest.mark.slow
def test_loader_processes_share_the_names(tmp_path):
    sizes = ["--images", "5000", "--names", "1000000", "--workers", "4", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *sizes, "--json"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["in_memory_names_bytes_one"] > 30_000_000
    assert result["in_memory_ratio"] < 1.5  # copies would make it 4
    assert result["in_memory_with_main_ratio"] < 1.5
    assert not list(tmp_path.iterdir())
