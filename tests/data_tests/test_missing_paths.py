"""A path that does not exist is refused at once, in the words of the full check."""

import subprocess
import sys

import pytest

from odcft.backbone.load import load_backbone
from odcft.data.missing_paths import refuse_missing
from odcft.data.sources import find_images
from odcft.errors import OdcftError


def said(work, *given, **named):
    with pytest.raises(OdcftError) as refused:
        work(*given, **named)
    return str(refused.value)


def test_the_quick_check_says_what_the_full_one_does(tmp_path):
    place = str(tmp_path / "no" / "such")
    assert said(refuse_missing, [place]) == said(load_backbone, place)
    assert said(refuse_missing, data=[None, place]) == said(find_images, place)


def test_all_else_is_left_to_the_full_check(tmp_path):
    refuse_missing(
        ["timm:resnet18", "scratch:x", str(tmp_path), "", "a\0b"],
        [None, "", str(tmp_path), "s3://none/", f"{tmp_path}/*.tar", "a\0b", "x" * 5000],
    )


def test_a_mistyped_folder_does_not_wait_for_torch():
    script = (
        "import sys; sys.argv = ['odcft', 'evaluate', 'scratch:resnet18', '/no/such']; from odcft.cli import main\n"
    )
    script += "try: main()\nexcept SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "/no/such does not exist" in done.stderr
