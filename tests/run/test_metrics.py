"""metrics.jsonl, and which of its lines a resumed run keeps."""

import json

from odcft.run.metrics import Metrics
from odcft.run.trackers import Trackers


def test_a_resumed_run_drops_later_lines_and_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"step": 5}\n{"ste')
    metrics = Metrics(tmp_path, Trackers(print), first_step=4)
    metrics.write(5, {"loss": 1.0})
    metrics.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 3, 5]
    assert written[-1]["loss"] == 1.0
