"""README and docs: every command parses, and commands and Python blocks run, or say above the block why they do not.

A block that is not run has a comment before it: <!-- not run: the reason -->. Commands run on a few small digits, with
a checkpoint and a finished RUN in the places that the text names; fine-tuning takes one epoch of small images.
"""

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from odcft.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands

# Commands other than odcft that are not run here, and why.
ELSEWHERE = {
    "git": "needs the network",
    "cd": "belongs to the command before it",
    "make": "run by .ci/run",
    "bash": "run by .ci/run",
    "pip": "installs packages",
    "pre-commit": "installs a hook",
    **dict.fromkeys(("docker", "podman", "apptainer"), "needs a container engine"),
    **dict.fromkeys(("sbatch", "srun", "kubectl", "helm"), "needs a cluster"),
    "torchrun": "tests/test_cli.py runs several processes",
    "python": "benchmarks take long; that script and options exist is checked",
}


FENCED = re.compile(r"^ *```.*?^ *```$", re.S | re.M)


@dataclass
class Block:
    """A fenced block: where it is, its language and text, and why it is not run, if so."""

    where: str
    language: str
    text: str
    excuse: str | None

    def __str__(self):
        return self.where


def blocks():
    fence = re.compile(
        r"(?: *<!-- not run: (?P<excuse>[^>]+?) -->\n+)?^(?P<indent> *)```(?P<lang>\w*)[^\n]*\n(?P<text>.*?)^ *```$",
        re.S | re.M,
    )
    for page in PAGES:
        text = page.read_text()
        for found in fence.finditer(text):
            line = text.count("\n", 0, found.start("lang")) + 1
            lines = [one.removeprefix(found["indent"]) for one in found["text"].splitlines()]
            where = f"{page.relative_to(ROOT)}:{line}"
            yield Block(where, found["lang"], "\n".join(lines), found["excuse"])


BLOCKS = list(blocks())


def commands_of(text):
    """The commands of a shell block, as words; lines that are output are left out."""
    lines = re.sub(r" *\\\n\s*", " ", text).splitlines()
    prompts = any(line.strip().startswith("$ ") for line in lines)
    for line in (line.strip() for line in lines if not prompts or line.strip().startswith("$ ")):
        line = line.removeprefix("$ ")
        head = line.split(" ")[0]
        if head == "odcft" or head in ELSEWHERE:
            yield shlex.split(line, comments=True)


def is_shell(block):
    return block.language in ("", "sh", "bash", "console", "shell")


SHELL = [block for block in BLOCKS if is_shell(block) and any(commands_of(block.text))]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def inline_commands():
    """Every `odcft …` in running text, as words, without the dots that stand for something left out."""
    for page in PAGES:
        text = re.sub(
            r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.S | re.M
        )
        for found in re.finditer(r"`odcft ([^`]+)`", text):
            line = text.count("\n", 0, found.start()) + 1
            words = found[1].replace("…", " ").replace("\\|", "|")
            yield f"{page.relative_to(ROOT)}:{line}", shlex.split(words)


def problems(words, whole=True):
    """What is wrong with the arguments of `odcft`, as parsing alone can tell.

    Args:
        words: subcommand, arguments and options.
        whole: all that the command needs must be there.
    """
    from odcft.recipe import all_field_paths, shipped

    if not words or words[0] in ("--help", "--version", "--install-completion", "COMMAND"):
        return
    if words[0] not in COMMANDS:
        yield f"no command {words[0]}"
        return
    command = COMMANDS[words[0]]
    words = [word for word in words[1:] if word not in ("…", "[…]")]
    try:
        if whole and "--help" not in words:
            values = command.make_context("odcft", list(words)).params
        else:
            values, _, _ = command.make_parser(typer.Context(command)).parse_args(list(words))
    except Exception as error:  # click's, whichever copy of it typer has
        yield error.format_message() if hasattr(error, "format_message") else repr(error)
        return
    recipe = values.get("recipe")
    if recipe and recipe not in shipped() and not recipe.endswith((".yaml", "R")):
        yield f"no recipe {recipe}"
    for override in values.get("overrides") or []:
        path, equals, _ = override.partition("=")
        if path not in (*all_field_paths(), "a.b", "k") or (whole and not equals):
            yield f"no field {path}"
    if values.get("protocol"):
        from odcft.evaluation.protocols import PROTOCOLS, UNLABELLED

        yield from (
            f"no protocol {one}" for one in values["protocol"].split(",") if one not in (*PROTOCOLS, UNLABELLED, "P")
        )


def test_every_command_in_a_block_parses():
    found = []
    for block in SHELL:
        for words in commands_of(block.text):
            if words[0] == "odcft":
                words = words[1 : next((i for i, word in enumerate(words) if word in ("||", "&&", "|", ">")), None)]
                found += [f"{block}: {problem}: odcft {shlex.join(words)}" for problem in problems(words)]
    assert not found, "\n".join(found)


def test_every_command_in_running_text_has_options_that_exist():
    found = [f"{where}: {problem}" for where, words in inline_commands() for problem in problems(words, whole=False)]
    assert not found, "\n".join(found)


def test_a_wrong_command_would_be_found():
    """The two tests above can fail."""
    assert [*problems(["finetun"])] == ["no command finetun"]
    assert "--epoch" in next(problems(["finetune", "c", "d", "--out", "r", "--epoch", "3"]))
    assert "out" in next(problems(["finetune", "c", "d"])).lower()
    assert next(problems(["finetune", "--set", "memory.momentun=1"], whole=False)) == "no field memory.momentun"
    assert next(problems(["finetune", "--recipe", "tiny"], whole=False)) == "no recipe tiny"
    assert next(problems(["evaluate", "--protocol", "svm,cnn"], whole=False)) == "no protocol cnn"
    assert len(SHELL) > 20
    assert len(PYTHON) > 3


def test_scripts_of_benchmarks_and_their_options_exist():
    for block in SHELL:
        for words in (words for words in commands_of(block.text) if words[0] == "python"):
            script = ROOT / words[1]
            assert script.is_file(), f"{block}: {words[1]}"
            source = script.read_text()
            missing = [word for word in words if word.startswith("--") and word.split("=")[0] not in source]
            assert not missing, f"{block}: {words[1]} has no {missing}"


def test_blocks_of_shell_scripts_have_valid_syntax():
    for block in BLOCKS:
        if block.language in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert done.returncode == 0, f"{block}: {done.stderr}"


def test_every_python_block_compiles():
    for block in PYTHON:
        try:
            ast.parse(block.text)
        except SyntaxError as error:
            pytest.fail(f"{block}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {target} is no heading"


def test_the_reference_is_what_the_code_says():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/write_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_builds_with_strict_links_and_needs_no_network(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs pip install odcft[docs]")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= {page.name for page in pages}
    fetched = re.compile(r"<(?:script|img|iframe|link(?! rel=\"canonical\"))[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]+")
    for page in [*pages, *tmp_path.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        found = fetched.findall(text) + re.findall(r"(?:@import|url\()\s*[\"']?https?://[^)]+", text)
        assert not found, f"{page.name} fetches {found}"
    nav = (tmp_path / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in nav for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


@pytest.mark.slow
def test_the_example_runs(made, tmp_path):
    places = {"CKPT": made / "c.pth", "IMAGES": made / "all", "LABELLED": made / "digits", "OUT": tmp_path / "run"}
    environment = {**os.environ, **{name: str(path) for name, path in places.items()}, "EPOCHS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, ROOT / "examples" / "adapt_a_backbone.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is nearest to" in done.stdout
    assert "timm.create_model" in done.stdout


# ---------------------------------------------------------------- running them

TINY = ["data.size=32", "optim.batch_size=8", "log.tensorboard=false", "data.workers=0", "neck.hidden=16", "neck.dim=8"]
TINY += ["memory.min_cluster=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits in folders and lists, a checkpoint, and a finished RUN, to be copied where a text names such things."""
    import odcft
    from odcft.demo import write_digits
    from odcft.pretexts.training import train_pretext

    folder = tmp_path_factory.mktemp("made")
    every = write_digits(folder / "all")
    for label in range(10):
        (folder / "digits" / str(label)).mkdir(parents=True)
        for path in sorted((every / str(label)).iterdir())[:6]:
            shutil.copy(path, folder / "digits" / str(label))
    recipe = odcft.load_recipe("pretext", [*TINY[:4], "optim.epochs=1"])
    train_pretext("rotation", str(folder / "digits"), "test_resnet", folder / "c.pth", recipe)
    settings = {"recipe": "small", "set": TINY, "epochs": 1, "clusters": 4, "progress": False}
    odcft.fine_tune(folder / "c.pth", folder / "digits", folder / "run", **settings)
    odcft.embed(folder / "run", folder / "digits", folder / "f.npz", progress=False)
    return folder


CHECKPOINT = re.compile(r"(CKPT\d?|.*\.(pth|pt|pth\.tar|bin|safetensors|ckpt))")
IMAGES = re.compile(
    r"[\w/-]*(images|labelled|xrays|slides|tiles|photos|digits|train|test|DATA|IMAGES|LABELLED\w*|IMAGES_\w)/?"
)
RUN = re.compile(r"(runs?/[\w-]+|RUN\w*|demo/run\w*)/?")


def provide(word, made):
    """Put what a text names into the current folder: images, a checkpoint, a RUN, a table, features."""
    path = Path(word)
    if word.startswith("-") or os.path.lexists(path) or path.is_absolute():
        return
    if CHECKPOINT.fullmatch(word):
        source = made / "c.pth"
    elif RUN.fullmatch(word):
        source = made / "run"
    elif IMAGES.fullmatch(word):
        source = made / "digits"
    elif path.suffix == ".npz":
        source = made / "f.npz"
    elif path.suffix in (".txt", ".csv"):
        source = None
    else:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        lines = [f"{one},{one.parent.name}" for one in sorted(made.glob("digits/*/*.png"))]
        path.write_text(
            "\n".join(["path,label", *lines] if path.suffix == ".csv" else [x.split(",")[0] for x in lines])
        )
    elif source.is_dir():
        shutil.copytree(source, word.rstrip("/"))
    else:
        shutil.copy(source, path)


def quickly(words):
    """The same command with little to do, and an output that does not exist yet."""
    if words[0] in ("finetune", "init-memory", "pretext", "check-data"):
        words = [*words, *(part for field in TINY for part in ("--set", field))]
    if words[0] in ("finetune", "init-memory"):
        words += ["--clusters", "4"]
    if words[0] in ("finetune", "pretext"):
        words += ["--epochs", "1"]
    if words[0] == "evaluate" and "--features" not in words:
        words += ["--size", "32"]
    if "--devices" in words:
        words[words.index("--devices") + 1] = "1"
    return words


def outputs(words):
    """The words of a command that it writes to, which must not be there."""
    places = [i + 1 for i, word in enumerate(words) if word == "--out"]
    if words[0] == "export":
        places.append(2)
    return {words[place] for place in places if place < len(words)}


def runnable(block):
    """The odcft commands of a block; tests/test_demo.py runs the demo, which takes minutes."""
    return [words for words in commands_of(block.text) if words[0] == "odcft" and words[1:2] != ["demo"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.where.split(":")[0] for block in SHELL + PYTHON if not block.excuse}))
def test_commands_and_python_of_a_page_run(page, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    for block in (block for block in BLOCKS if block.where.split(":")[0] == page and not block.excuse):
        if block.language == "python":
            run_python(block, names, made, monkeypatch)
        elif is_shell(block):
            for words in runnable(block):
                run_command(block, words[1:], made, capfd)


def run_command(block, words, made, capfd):
    from odcft.cli import main

    words = words[: next((i for i, word in enumerate(words) if word in ("||", "&&", "|", ">")), None)]
    written = outputs(words)
    resumed = "--resume" in words
    for word in words:
        if word not in written:
            provide(word, made)
    for word in written if not resumed else ():
        with contextlib.suppress(FileNotFoundError):
            (shutil.rmtree if Path(word).is_dir() else os.unlink)(word)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["odcft", *quickly(words)])
        with pytest.raises(SystemExit) as ended:
            main()
    _, err = capfd.readouterr()
    assert ended.value.code in (0, None), f"{block}: odcft {shlex.join(words)}\n{err}"


def run_python(block, names, made, monkeypatch):
    import odcft

    tree = ast.parse(block.text)
    written = {ast.unparse(call.args[1]) for call in calls(tree, "odcft.export")}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    for text in (constant.value for constant in constants if ast.unparse(constant) not in written):
        path = text.removeprefix("local-dir:")
        run = RUN.match(path)
        provide(run[1] if run and path.startswith(f"{run[1]}/") else path, made)
    first = re.match(r"# (\w+\.py)", block.text)
    if first:  # a module of the user's
        Path(first[1]).write_text(block.text)
    for function in ("fine_tune", "init_memory"):
        monkeypatch.setattr(odcft, function, in_a_moment(getattr(odcft.api, function)))
    try:
        exec(compile(tree, str(block), "exec"), names)
    except Exception as error:
        raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def calls(tree, function):
    """The calls of a function in a Python block."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in found if ast.unparse(call.func) == function]


def in_a_moment(function):
    """A function of odcft that takes one epoch and replaces what an earlier block wrote."""

    def quick(*args, **options):
        given = options.get("set") or {}
        lines = given if not isinstance(given, dict) else [f"{name}={value}" for name, value in given.items()]
        options |= {"set": [*lines, *TINY], "clusters": 4}
        if function.__name__ == "fine_tune":
            options["epochs"] = 1
        return function(*args, **{"overwrite": not options.get("resume"), **options})

    return quick
