"""Who may import whom: parts import no programs, and nothing imports the command line but its own entry."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "odcft"
LAYERS = [
    {
        "errors",
        "hub",
        "_torchvision",
        "recipe",
        "dist",
        "launch",
        "late",
        "stopping",
        "color",
        "seeds",
        "precision",
        "words",
    },
    {"inputs", "renames", "restricted", "networks", "description", "checkpoint", "matching", "recognition"},
    {
        "memory",
        "backbone",
        "model",
        "augment",
        "data",
        "log",
        "features",
        "optim",
        "kmeans",
        "small_clusters",
        "health",
        "folders",
        "shared_memory",
        "pixels",
        "advice",
    },
    {"methods", "card", "exports"},
    {"snapshot", "resume"},
    {"train", "evaluation", "pretext"},
    {"demo", "cli", "__main__", "__init__"},
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "odcft":
            inner = node.module.split(".")[1:]
            yield from [inner[0]] if inner else [alias.name for alias in node.names]


def test_every_module_has_a_layer_and_imports_no_higher_one():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert module in level, f"{module} stands in no layer"
        for other in imports(path):
            if other in level:
                assert level[other] <= level[module], f"{module} imports {other}"


def test_memory_knows_no_files_and_no_ranks():
    assert not set(imports(PACKAGE / "memory.py"))
