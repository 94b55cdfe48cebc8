"""Protocols with and without labels in one call."""

from odcft.evaluation import any_protocol


def test_both_kinds_of_protocols_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(any_protocol, "evaluate", lambda *args, **options: {"knn": {"top1": 50.0}, "unlabelled": 3})
    monkeypatch.setattr(any_protocol, "evaluate_unlabelled", lambda *args, **options: {"verdict": "better"})
    both = any_protocol.evaluate_any("ckpt", "data", None, ["knn", "unlabelled"], size=32)
    assert both == {"knn": {"top1": 50.0}, "unlabelled_images": 3, "unlabelled": {"verdict": "better"}}
    assert any_protocol.evaluate_any("ckpt", "data", None, ["unlabelled"]) == {"unlabelled": {"verdict": "better"}}
    assert any_protocol.evaluate_any("ckpt", "data", None, ["knn"]) == {"knn": {"top1": 50.0}, "unlabelled": 3}
