"""Text from files cannot be trusted: on a terminal and in a model card it is shown and has no effect."""

import json
import re
import sys
import warnings

import pytest

from odcft.progress import Progress
from odcft.text import code_block, code_span, printable

HOSTILE = {
    "colour": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "8-bit control": ("\x9b2J", r"\x9b2J"),
    "forged line": ("a.png\nWarning     all is lost", r"a.png\nWarning     all is lost"),
    "carriage return": ("a.png\rodcft: ", r"a.png\rodcft: "),
    "backspace and delete": ("a\b\x7f", r"a\x08\x7f"),
    "next line": ("a\x85b", r"a\x85b"),
    "line separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "turned around": ("\u202egpj.exe", r"\u202egpj.exe"),
    "isolate": ("a\u2066b\u2069", r"a\u2066b\u2069"),
    "mark": ("a\u200e\u200f\u061cb", r"a\u200e\u200f\u061cb"),
    "no width": ("a\u200b\ufeff\u2060\xadb", r"a\u200b\ufeff\u2060\xadb"),
    "tag": ("a\U000e0041b", r"a\U000e0041b"),
    "byte that is no letter": ("a\udcff.png", r"a\xff.png"),
    "lone surrogate": ("a\ud800b", r"a\ud800b"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_characters_that_control_a_terminal_are_escaped(case):
    text, expected = HOSTILE[case]
    assert printable(text) == expected
    printable(text).encode("utf-8")


@pytest.mark.parametrize(
    "text", ["Bücher/Ωμέγα.png", "日本語.png", "می\u200cخواهم.png", "👩\u200d🔬.png", "a b\xa0c … ·", ""]
)
def test_text_in_any_language_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", "`a.png`"),
        ("a`b", "``a`b``"),
        ("`a", "`` `a ``"),
        ("a``b`", "``` a``b` ```"),
        ("</code><script>", "`</code><script>`"),
        ("a\n\n# Owned", "`a\\n\\n# Owned`"),
        (" a", "`  a `"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_text_cannot_break_out_of_a_code_span(text, expected):
    assert code_span(text) == expected


def test_text_cannot_break_out_of_a_code_block():
    block = code_block("method: odc\n```\n# Owned\n````\n\x1b[31m\tx", "yaml")
    first, *inner, last = block.split("\n")
    assert (first, last) == ("`````yaml", "`````")
    assert inner == ["method: odc", "```", "# Owned", "````", r"\x1b[31m   x"]
    assert code_block("a") == "```\na\n```"


EVIL = "\x1b[2J\nWarning     forged\r\u202e"


def raw(text):
    """The parts of a hostile name that reached the terminal unescaped."""
    return [letter for letter in text if letter in "\x1b\r\u202e"] + re.findall(
        "^Warning     forged", text, re.MULTILINE
    )


def test_names_of_images_do_nothing_to_the_terminal(odcft_command, tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    (images / "a" / f"{EVIL}.png").write_bytes(b"no image")
    out = tmp_path / f"{EVIL}.pth"
    flags = ("--arch", "test_resnet", "--epochs", 1, "--out", out, "--json")
    code, stdout, err = odcft_command("pretext", "rotation", images, *flags)
    assert code == 0, err
    assert err.count("forged") >= 2
    assert not raw(err)
    assert json.loads(stdout)["out"] == str(out)


@pytest.mark.parametrize("name", [EVIL, "\udcff"])
def test_paths_in_errors_do_nothing_to_the_terminal(odcft_command, tmp_path, make_images, name):
    images = make_images(tmp_path / "images", 4)
    places = {
        "finetune": (tmp_path / name, images, "--out", tmp_path / "run", "--recipe", "small"),
        "evaluate": ("scratch:test_resnet", tmp_path / name),
        "inspect": (tmp_path / name,),
        "export": (tmp_path / name, tmp_path / "out"),
        "recipes": (tmp_path / name,),
    }
    for command, arguments in places.items():
        code, _, err = odcft_command(command, *arguments)
        assert code == 2, err
        assert not raw(err)
        assert len(err.splitlines()) == 1, err


def test_a_recipe_that_is_printed_does_nothing_to_the_terminal(odcft_command, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# x \u202e\nmethod: odc\n", encoding="utf-8")
    code, out, err = odcft_command("recipes", path)
    assert code == 0, err
    assert r"# x \u202e" in out
    assert not raw(out)


def test_notes_on_a_bar_do_nothing_to_the_terminal(capsys, monkeypatch):
    from rich.console import Console

    progress = Progress()
    progress.console = Console(stderr=True, force_terminal=True, color_system=None, width=100, soft_wrap=True)
    with progress.phase("Features", 2) as advance:
        advance(2, "note \x9b2J\u202e")
    assert r"note \x9b2J\u202e" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["warning", "fault"])
def test_warnings_and_faults_of_libraries_are_shown_in_lines_of_their_own(odcft_command, monkeypatch, kind):
    from odcft.backbone import load

    def fail(*args, **kwargs):
        if kind == "fault":
            raise AssertionError(f"{EVIL}: a fault of ours")
        warnings.warn(f"{EVIL}: mind this", stacklevel=1)
        raise SystemExit(0)

    monkeypatch.setattr(load, "load_backbone", fail)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    # As outside pytest, which prints warnings in its own way.
    monkeypatch.setattr(
        warnings,
        "showwarning",
        lambda message, *place, **more: print(warnings.formatwarning(message, *place), file=sys.stderr),
    )
    code, _, err = odcft_command("inspect", "scratch:resnet18")
    assert code == (kind == "fault"), err
    assert r"\x1b[2J" in err
    assert "\x1b" not in err
    assert "\u202e" not in err
