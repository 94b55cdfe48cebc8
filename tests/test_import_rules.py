"""The rules of docs/architecture.md: which module may import which. A violation names module, line and rule."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "odcft"

# From the top floor down: a module imports only from its own room (a folder of odcft/) and from the floors below.
# Modules on the same floor do not import each other, unless they are in the same room.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"cli_options"},
    {"completion"},
    {"demo", "api"},
    {"dry_run"},  # takes a few steps of train
    # programs: only those above call them
    {"train", "first_memory", "exports", "embeddings", "check_data", "cluster_listing", "duplicate_groups", "doctor"},
    {"reports"},
    {"evaluation", "pretexts", "prepare"},
    {"run"},
    {"state", "normalisation", "start_layer_choice", "recipe_choice"},
    {"model"},
    {"clustering"},
    {"plan"},
    {"suitable_recipe"},
    {"backbone"},
    {"data"},
    {"progress", "optim"},
    {"recipe", "files", "cache_folder"},
    {"distributed"},
    {"presets", "argument_types"},
    {"errors", "text", "seeds", "precision", "__init__"},
    {"torchvision_on_cpu"},
]
# Libraries that only some modules may import, and which those are.
ONLY_IN = {
    "timm": ("backbone/", "distributed/dist.py"),  # dist: timm's own conversion to SyncBN
    "PIL": ("data/", "demo.py", "reports/"),  # images are opened in data/; the demo and reports write some
    "faiss": ("clustering/kmeans.py",),
    "torch.distributed": ("distributed/",),
    "sklearn": ("evaluation/", "clustering/cluster_statistics.py", "reports/charts.py", "demo.py"),
    "matplotlib": ("reports/charts.py",),
    "jinja2": ("reports/page.py",),
    "typer": ("cli.py", "cli_options.py"),
    "rich": ("progress.py",),
    "pickle": ("backbone/safe_unpickle.py",),
    "onnx": ("exports.py", "run/output_checks.py"),
    "pyarrow": ("run/clusters_parquet.py", "data/stores/", "evaluation/embedding_files.py", "reports/tables.py"),
    "fsspec": ("data/stores/remote.py",),
    "tarfile": ("data/stores/tar_headers.py", "backbone/safe_unpickle.py"),
    "yaml": ("recipe.py",),
    "wandb": ("run/trackers.py",),
    "mlflow": ("run/trackers.py",),
    "torch.utils.tensorboard": ("run/trackers.py",),
}


def imports(source):
    """Line, module, and the names taken from it ("" for the module itself), of every import statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where a name comes from"
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed", ""


def floor_of(place):
    """The number of the floor, counted from the ground, of "room/module.py" or "module.py"."""
    name = place.split("/")[0].removesuffix(".py")
    for number, floor in enumerate(reversed(FLOORS)):
        if name in floor:
            return number
    raise AssertionError(f"{place} is on no floor: add {name} to FLOORS")


def violations(place, source):
    """Messages for the rules that a module breaks."""
    room = place.split("/")[0]
    if place == "__init__.py":  # names the functions of api.py for type checkers; imports nothing
        return
    for line, module, name in imports(source):
        for library, where in ONLY_IN.items():
            if f"{module}.".startswith(f"{library}.") and not place.startswith(where):
                yield f"{place}, line {line}: imports {library}, which only {', '.join(where)} may"
        if module == "odcft" and name == "__version__":
            continue
        if module.split(".")[0] != "odcft":
            continue
        if name.startswith("_") and not name.startswith("__"):
            yield f"{place}, line {line}: imports {name}, a private name, from {module}"
        other = [*module.split(".")[1:], name][0]
        if other and other != room.removesuffix(".py") and floor_of(other) >= floor_of(place):
            yield f"{place}, line {line}: imports {other}, which is not on a floor below {room.removesuffix('.py')}"
        if other in (
            "train",
            "first_memory",
            "exports",
            "check_data",
            "doctor",
            "cluster_listing",
            "duplicate_groups",
        ) and place not in (
            "api.py",
            "cli.py",
            "demo.py",
            "dry_run.py",
        ):
            yield f"{place}, line {line}: calls a program ({other}), which only api, cli, demo and dry_run may"


def modules():
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_no_module_breaks_a_rule():
    found = [rule for place, source in modules().items() for rule in violations(place, source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "source", "rule"),
    [
        (
            "data/sources.py",
            "from odcft.backbone.load import load_backbone",
            "imports backbone, which is not on a floor below",
        ),
        ("plan.py", "from odcft.model import members", "imports model, which is not on a floor below plan"),
        ("optim.py", "from odcft.progress import Progress", "imports progress, which is not on a floor below optim"),
        ("evaluation/svm.py", "from odcft.prepare import begin", "imports prepare, which is not on a floor below"),
        ("evaluation/svm.py", "from odcft.train import fine_tune", "calls a program"),
        ("exports.py", "import timm.models", "imports timm, which only backbone/"),
        ("evaluation/knn.py", "def f():\n    import faiss", "line 2: imports faiss"),
        ("clustering/odc.py", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("pretexts/jigsaw.py", "from PIL import Image", "imports PIL, which only data/"),
        ("prepare.py", "from odcft.files import _new", "imports _new, a private name, from odcft.files"),
        ("kitchen/sink.py", "from odcft import files", "is on no floor"),
    ],
)
def test_a_broken_rule_names_the_offender(place, source, rule):
    try:
        found = "\n".join(violations(place, source))
    except AssertionError as error:  # an unknown room
        found = str(error)
    assert rule in found
    assert place in found


def test_the_memory_depends_on_no_files_and_no_ranks():
    def used_by(place):
        return {module for _, module, _ in imports(modules()[place]) if module.startswith("odcft")}

    assert used_by("clustering/memory.py") == {"odcft.clustering.coarse_scores"}
    assert used_by("clustering/coarse_scores.py") == {"odcft.precision"}
    assert not used_by("precision.py")


def test_every_room_has_a_docstring_and_no_re_exports():
    """A name is imported from one place only."""
    for path in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, f"{path} has more in it than a docstring"


def test_the_folders_of_tests_mirror_those_of_odcft():
    """tests/ROOM/test_X.py tests odcft/ROOM/X.py, or several modules of the room together."""
    several_modules = {  # tests of several modules of a room together
        *(
            "backbone/checkpoint_layouts",
            "backbone/malicious_files",
            "clustering/golden_traces",
            "distributed/collectives",
            "distributed/fake_gpu",
            "distributed/many_nodes",
        ),
        *("distributed/ranks", "evaluation/golden_svm", "evaluation/bad_images", "run/outputs", "run/resume"),
        *("run/run_faults", "reports/browser"),
    }
    for path in (ROOT / "tests").glob("*/test_*.py"):
        room = path.parent.name.removesuffix("_tests")  # data_tests: tests/data holds the files that tests read
        module = f"{room}/{path.stem.removeprefix('test_')}"
        there = any((PACKAGE / room).rglob(f"{path.stem.removeprefix('test_')}.py"))
        known = there or module in several_modules
        assert known, (
            f"{path.relative_to(ROOT)} is not named after a module of odcft/{room}: rename it after the one it tests"
        )


def test_the_drawing_is_up_to_date():
    script = ROOT / "tools" / "draw_architecture.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, f"The drawing is outdated. Draw it again: python {script.relative_to(ROOT)}"


LONG_FUNCTIONS = {  # where most of the lines are options or documentation
    *("odcft/api.py init_memory", "odcft/api.py fine_tune", "odcft/api.py evaluate"),
    *("odcft/cli.py finetune", "odcft/train.py fine_tune", "odcft/evaluation/comparison.py evaluate"),
    *(
        "odcft/reports/run_report.py report",
        "odcft/evaluation/low_shot.py low_shot",
        "odcft/cli.py evaluate",
        "odcft/cli.py clusters",
    ),
}


def test_functions_are_no_longer_than_a_screen():
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                found.add(f"{path.relative_to(ROOT).as_posix()} {node.name}")
    assert found <= LONG_FUNCTIONS, f"longer than 60 lines: {', '.join(sorted(found - LONG_FUNCTIONS))}"
    assert found == LONG_FUNCTIONS, f"no longer long: {', '.join(sorted(LONG_FUNCTIONS - found))}"
