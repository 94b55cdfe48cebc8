"""One line says what the intervals show, and how many images would show more."""

import pytest

from odcft.evaluation.verdict import images_needed, verdict, verdict_line


def change(low, high):
    return {"change": (low + high) / 2, "low": low, "high": high}


NONE = "No difference from c can be shown with 100 test images: the changes may be chance."


@pytest.mark.parametrize(
    ("svm", "knn", "expected"),
    [
        ((1, 3), (0.5, 2), "Better than c."),
        ((1, 3), (-1, 2), "Better than c."),
        ((-3, -1), (-1, 2), "Worse than c."),
        ((1, 3), (-3, -1), "Mixed: better than c by SVM mAP, worse by kNN top-1."),
        (
            (-1, 1),
            (0, 2),
            NONE + " To tell the change of +1.0 in kNN top-1 from chance takes a few more test images.",
        ),
        (
            (-1, 3),
            (-3, 3),
            NONE + " To tell the change of +1.0 in SVM mAP from chance takes about 400 test images.",
        ),
        ((-1, 1), (-2, 2), NONE),
    ],
)
def test_sentences(svm, knn, expected):
    changes = {"svm": change(*svm), "knn": change(*knn)}
    assert verdict_line(changes, 100, "c") == expected
    assert verdict(changes) in ("better", "worse", "mixed", "no difference")
    assert verdict_line(changes, 100, "c").lower().startswith(verdict(changes))


def test_images_needed_grow_with_the_square_of_the_interval():
    assert images_needed({"svm": {"change": 1.0, "low": -1.5, "high": 3.5}}, 5000) == (
        "svm",
        32_000,
    )  # 6.25 times as many
    assert images_needed({"svm": {"change": 0.01, "low": -1.5, "high": 3.5}}, 5000) is None
