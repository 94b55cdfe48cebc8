"""What the shell offers on Tab, through the environment variables that a shell sets."""

import subprocess
import sys

import pytest

from odcft import completion
from odcft.recipe import all_field_paths, load_recipe

COMMAND = (
    "import sys; sys.argv = ['odcft']\n"
    "from odcft.cli import main\n"
    "try: main()\n"
    "finally: assert not {'torch', 'numpy', 'timm'} & set(sys.modules), 'too slow for a shell'\n"
)


def offered(words):
    environment = {"_ODCFT_COMPLETE": "complete_bash", "COMP_WORDS": words.replace(" ", "\n")}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    environment["PYTHONPATH"] = ":".join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("odcft finetune a b --recipe odc_r", ["odc_r50_finetune", "odc_r50_scratch"]),
        ("odcft finetune a b --set memory.va", ["memory.variant=paper", "memory.variant=official"]),
        ("odcft pre", ["pretext"]),
    ],
)
def test_bash_completes(words, offers):
    assert offered(words) == offers


IN_BASH = """
complete() { :; }
eval "$(odcft --show-completion bash)"
for typed in "--set memory.variant =" "--set = memory.variant = p"; do
    COMP_WORDS=(odcft finetune c.pth images $typed) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _odcft_completion odcft
    echo "${COMPREPLY[*]}"
done
"""


def test_the_script_for_bash_completes_behind_an_equals_sign(tmp_path):
    (tmp_path / "odcft").write_text(f'#!/bin/sh\nexec {sys.executable} -m odcft "$@"\n')
    (tmp_path / "odcft").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # the shell is named
    done = subprocess.run(["bash", "-c", IN_BASH], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("paper official\npaper\n", "")


@pytest.mark.parametrize(
    ("words", "offers"),  # words as bash has them, taken apart at "="
    [
        ("--set memory.variant = o", ["official"]),
        ("--set seed = 1 --set memory.variant =", ["paper", "official"]),
        ("--recipe = sm", ["small", "small_vit"]),
        ("--set memory.variant=o", ["memory.variant=official"]),  # COMP_WORDBREAKS without "="
        ("--set = memory.va", ["memory.variant=paper", "memory.variant=official"]),
    ],
)
def test_bash_completes_the_part_behind_an_equals_sign(monkeypatch, odcft_command, words, offers):
    words = ["odcft", "finetune", "c.pth", "images", *words.split()]
    monkeypatch.setenv("_ODCFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert odcft_command()[1].split() == offers


def test_words_after_a_space_are_not_joined():
    assert completion._joined(["odcft", "--set", "a", "=", ""]) == (["odcft", "--set", "a=", ""], "")


def test_other_shells_get_whole_words():
    words = "odcft finetune a b --set memory.variant=o"
    environment = {"_ODCFT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    environment["PYTHONPATH"] = ":".join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True)
    assert "memory.variant=official" in done.stdout.replace("\\", "")


def test_protocols_follow_those_that_were_typed():
    assert completion.protocols("svm,k") == ["svm,knn"]
    assert "svm,svm" not in completion.protocols("svm,")


def test_every_field_is_offered_with_values_that_it_takes():
    words = [word for word, _ in completion.fields("")]
    assert {word.partition("=")[0] for word in words} == {path for path in all_field_paths() if "[" not in path}
    for word in words:
        load_recipe("small", [word])


def test_nothing_fits_nothing():
    assert completion.recipes("zzz") == completion.presets("zzz") == completion.choices("odc")("zzz") == []


def test_completion_is_installed_for_the_shell_above(tmp_path):
    command = f"{sys.executable} -m odcft --install-completion && echo done"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "odcft" in (tmp_path / ".bashrc").read_text()
    assert "_ODCFT_COMPLETE" in next((tmp_path / ".bash_completions").iterdir()).read_text()
