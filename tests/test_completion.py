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
    environment = {"_ODCFT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
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
