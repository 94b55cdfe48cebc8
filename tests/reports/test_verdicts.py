"""The verdict that a report shows comes from an evaluation, and only from one."""

import json

import pytest

from odcft.errors import OdcftError
from odcft.reports.verdicts import read_verdict

BETTER = {"svm": {"mAP": 66.8}, "change": {"svm": {"change": 5.6, "low": 4.1, "high": 7.0}}, "test_images": 900}


def test_a_verdict_with_its_figures(tmp_path):
    assert read_verdict(None) == ("", "open")
    text, kind = read_verdict(BETTER)
    assert kind == "better"
    assert text == (
        "Better than the checkpoint it was started from. "
        "On 900 test images: SVM mAP 61.2 before, 66.8 after (+4.1 … +7.0)."
    )
    (tmp_path / "e.json").write_text(json.dumps(BETTER))
    assert read_verdict(tmp_path / "e.json") == (text, kind)
    assert read_verdict({"unlabelled": {"verdict": "cannot tell"}})[1] == "open"


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"change": []},
        {"change": {"svm": {"change": "x", "low": 0, "high": 1}}, "test_images": 3},
        {"change": {"<b>": {"change": 1, "low": 0, "high": 1}}, "test_images": 3},
        {"unlabelled": {"verdict": ["better"]}},
        {**BETTER, "test_images": 10**5000},
        {**BETTER, "test_images": True},
        {**BETTER, "change": {"svm": {"change": 10**400, "low": -(10**400), "high": 1}}},
        {**BETTER, "change": {"svm": {"change": float("nan"), "low": 0.0, "high": 1e300}}},
    ],
)
def test_anything_else_is_refused(evaluation):
    with pytest.raises(OdcftError, match="holds no comparison"):
        read_verdict(evaluation)


def test_a_figure_that_cannot_be_is_not_shown(tmp_path):
    (tmp_path / "e.json").write_text(json.dumps({**BETTER, "svm": {"mAP": 10**4000}}))
    assert read_verdict(tmp_path / "e.json")[0].endswith("On 900 test images: SVM mAP +5.6 (+4.1 … +7.0).")
    (tmp_path / "e.json").write_text("[" * 100_000)
    with pytest.raises(OdcftError, match="not a JSON object"):
        read_verdict(tmp_path / "e.json")
