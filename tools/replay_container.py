"""Replay the Dockerfile without a container engine, in a tree of Debian files: chroot and overlay mounts instead.

    sudo python tools/replay_container.py WORK [--arg DEVICE=cpu] [--env NAME=VALUE] [--bind PATH] [--replace OLD=NEW]

WORK receives `base` (Debian bookworm with its own Python 3.11 in place of the image python:3.12-slim; made by
debootstrap unless it is there) and the layers of each stage. At the end the finished tree is mounted read-only and
`odcft doctor` runs in it as a user without rights, as `docker run --read-only --tmpfs /tmp` would run it. Needs root,
debootstrap and 3 GB; remove WORK afterwards.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in their order, each a keyword and its text; continued lines are joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = (line.strip().partition(" ") for line in joined.splitlines())
    return [(word, rest.strip()) for word, _, rest in parts if word]


def make_base(base: Path) -> None:
    """A small Debian with Python, under the names that the official Python image has."""
    if not (base / "usr/bin/python3").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
        subprocess.run(command, check=True)
    if not (base / "usr/bin/python").exists():
        (base / "usr/bin/python").symlink_to("python3")


class Stage:
    """The files of one stage: those it started from, and above them a folder that holds what the stage added."""

    def __init__(self, work: Path, name: str, lower: list[Path], stack: ExitStack) -> None:
        self.layer, self.tree = work / name / "layer", work / name / "tree"
        self.lower = [self.layer, *lower]
        for folder in (self.layer, self.tree, work / name / "overlay"):
            folder.mkdir(parents=True, exist_ok=True)
        below = ":".join(map(str, lower))
        options = f"lowerdir={below},upperdir={self.layer},workdir={work / name / 'overlay'}"
        mount(stack, "-t", "overlay", "-o", options, "overlay", self.tree)
        self.variables: dict[str, str] = {}
        self.folder, self.user = "/", "0"


def mount(stack: ExitStack, *words: object) -> None:
    """Mount something until the stack is closed."""
    subprocess.run(["mount", *map(str, words)], check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(words[-1])], check=False)


def run_inside(stage: Stage, command: list[str], environment: dict[str, str], binds: list[str]) -> int:
    """Run a command in the tree of a stage."""
    with ExitStack() as stack:
        for path in ("/dev", "/proc", *binds):
            inside = stage.tree / path.lstrip("/")
            if Path(path).is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            else:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()
            mount(stack, "--rbind", path, inside)
        clean = {"PATH": PATH, "LANG": "C.UTF-8", **environment}
        words = ["chroot", f"--userspec={stage.user}:{stage.user}", str(stage.tree), "sh", "-c"]
        words.append(f"cd {shlex.quote(stage.folder)} && {shlex.join(command)}")
        return subprocess.run(words, env=clean, check=False).returncode


def copy(stage: Stage, stages: dict[str, Stage], words: list[str]) -> None:
    """COPY: files of the checkout, or of another stage."""
    source = ROOT
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")].tree
    *names, goal = words
    to = stage.tree / os.path.join(stage.folder, goal).lstrip("/")
    for name in names:
        found = source / name.lstrip("/")
        if found.is_dir():
            left_out = shutil.ignore_patterns("__pycache__") if source is ROOT else None
            shutil.copytree(found, to, symlinks=True, dirs_exist_ok=True, ignore=left_out)
        else:
            into = to / found.name if goal.endswith("/") else to
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, into)


def replay(options: argparse.Namespace, stack: ExitStack) -> Stage:
    """Carry out the Dockerfile; return its last stage."""
    work, stages = options.work.resolve(), {}
    given = dict(pair.split("=", 1) for pair in options.arg)
    stage: Stage | None = None
    for word, text in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            image, _, name = text.partition(" AS ")
            lower = stages[image].lower if image in stages else [work / "base"]
            stage = stages[name or "final"] = Stage(work, name or "final", lower, stack)
            if image in stages:
                stage.variables, stage.folder = dict(stages[image].variables), stages[image].folder
        elif word == "ARG" and stage is not None:
            name, _, default = text.partition("=")
            stage.variables[name] = given.get(name, default)
        elif stage is not None:
            carry_out(stage, stages, word, text, options)
    assert stage is not None
    return stage


def carry_out(stage: Stage, stages: dict[str, Stage], word: str, text: str, options: argparse.Namespace) -> None:
    """Carry out one instruction of a stage."""
    if word == "ENV":
        pairs = [pair.split("=", 1) for pair in shlex.split(text)]
        stage.variables |= {name: value.replace("$PATH", PATH) for name, value in pairs}
    elif word == "WORKDIR":
        stage.folder = text
        (stage.tree / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "COPY":
        copy(stage, stages, text.split())
    elif word == "USER":
        stage.user = text
    elif word == "RUN":
        for pair in options.replace:
            text = text.replace(*pair.split("=>", 1))
        print(f"RUN {text}", flush=True)
        extra = dict(pair.split("=", 1) for pair in options.env)
        if code := run_inside(stage, ["sh", "-c", text], {**extra, **stage.variables}, options.bind):
            raise SystemExit(f"exit code {code}: {text}")


def size(folder: Path) -> str:
    """What a folder takes on disk."""
    done = subprocess.run(["du", "-sm", "--one-file-system", str(folder)], capture_output=True, text=True, check=False)
    return f"{int(done.stdout.split()[0]):,} MB"


def main() -> None:
    """Replay, then say what was made and run `odcft doctor` in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="build argument")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="of all RUN lines, for proxies"
    )
    parser.add_argument(
        "--bind", action="append", default=[], metavar="PATH", help="file or folder of this machine that RUN lines see"
    )
    parser.add_argument("--replace", action="append", default=[], metavar="OLD=>NEW", help="in RUN lines")
    parser.add_argument("--then", action="append", default=[], metavar="COMMAND", help="to run in the result, too")
    options = parser.parse_args()
    make_base(options.work / "base")
    with ExitStack() as stack:
        final = replay(options, stack)
        print(f"Base {size(options.work / 'base')}, added {size(final.layer)}", flush=True)
        site = next((final.tree / "opt/odcft/lib").glob("python3*/site-packages"))
        subprocess.run(f"du -sm {site}/* | sort -rn | head -12", shell=True, check=False)
        tools = [name for name in ("gcc", "cc", "make", "git") if shutil.which(name, path=str(final.tree / "usr/bin"))]
        print(
            f"Build tools left: {', '.join(tools) or 'none'}; pip in the environment: {(site / 'pip').exists()}",
            flush=True,
        )
        mount(stack, "-t", "tmpfs", "tmpfs", final.tree / "tmp")
        (final.tree / "tmp").chmod(0o1777)
        for folder in ("dev", "proc"):
            (final.tree / folder).mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(final.tree)], check=True)
        for command in ("odcft doctor /tmp", "touch /written", *options.then):
            print(f"\n$ {command}", flush=True)
            print(f"exit code {run_inside(final, shlex.split(command), final.variables, [])}", flush=True)


if __name__ == "__main__":
    main()
