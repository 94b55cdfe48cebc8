"""The benchmark of Table 4 refuses what it cannot do before it writes anything."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "fine_tuning.py"


def test_without_a_test_set_nothing_is_written(tmp_path, make_images):
    images = make_images(tmp_path / "images")
    command = [sys.executable, str(SCRIPT), "c.pth", str(images), "--test", "nowhere", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere does not exist. Give a folder of images" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
