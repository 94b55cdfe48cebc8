import pytest


@pytest.mark.slow
def test_demo_ends_above_the_checkpoint_it_started_from(tmp_path):
    from odcft.demo import run_demo

    values, lines = run_demo(tmp_path / "demo")
    assert values["change"]["svm"]["change"] > 0
    assert values["change"]["knn"]["low"] > 0  # beyond what other test images would make of it
    assert values["dc"]["change"]["svm"]["change"] > 0
    assert values["seconds"] < 300
    for line in lines:
        if line.startswith("  ") and "/ " in line:
            assert (tmp_path / "demo" / line.split("/")[0].strip()).is_dir()
