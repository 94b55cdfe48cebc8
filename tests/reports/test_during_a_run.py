"""The report of a run that trains: it changes nothing of the training, and no failure of it fails the run."""

import pytest
from stopped_runs import quick, write_inputs

from odcft.progress import Progress
from odcft.reports import during_a_run
from odcft.train import fine_tune


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_with_reports_at_every_save(tmp_path, monkeypatch, write_at_end):
    write_inputs(tmp_path, 24)
    args = (str(tmp_path / "c.pth"), str(tmp_path / "images"))
    without = fine_tune(*args, tmp_path / "without", quick("log.report=false"), progress=Progress(quiet=True))
    monkeypatch.setattr(during_a_run, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(during_a_run, "SHARE", 1e9)
    monkeypatch.setattr(during_a_run, "write_at_end", write_at_end)
    written, real = [], during_a_run.write_progress
    monkeypatch.setattr(during_a_run, "write_progress", lambda run: written.append(real(run)))
    with_report = fine_tune(*args, tmp_path / "with", quick("log.report=true"), progress=Progress(quiet=True))
    assert len(written) > 1
    assert with_report["loss"] == without["loss"]
    for name in ("backbone/model.safetensors", "clusters.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    text = (tmp_path / "with" / "report.html").read_text()
    assert "Neighbours" in text
    assert "[report.html](../report.html)" in (tmp_path / "with" / "backbone" / "README.md").read_text()
    assert not (tmp_path / "without" / "report.html").exists()
    assert "report.html" not in (tmp_path / "without" / "backbone" / "README.md").read_text()


def test_a_failure_is_one_printed_note(tmp_path, monkeypatch, write_at_end):
    said = []

    class Listener:
        def say(self, line):
            said.append(line)

        def waiting(self, what):
            return Progress(quiet=True).waiting(what)

    assert write_at_end(tmp_path / "nowhere", Listener(), images=None) is None
    live = during_a_run.LiveReport(tmp_path / "nowhere", True, said.append)
    live.update()  # not yet
    live.next = 0.0
    live.update()
    live.update()  # once is enough
    assert len(said) == 2
    assert all(line.startswith("Note        The report could not be written (") for line in said)
    assert all("odcft report RUN" in line for line in said)


def test_reports_while_training_take_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(during_a_run.time, "monotonic", lambda: clock[0])

    def slow(run):
        clock[0] += 5.0

    monkeypatch.setattr(during_a_run, "write_progress", slow)
    live = during_a_run.LiveReport(tmp_path, True, print)
    live.update()
    assert clock[0] == 1000.0
    clock[0] = live.next
    live.update()
    assert live.next == pytest.approx(clock[0] - 5 + 5 / during_a_run.SHARE)
    live = during_a_run.LiveReport(tmp_path, False, print)
    clock[0] += 1e9
    before = clock[0]
    live.update()
    assert clock[0] == before
