"""The report of a run: what it shows, what it refuses, and that nothing in a file becomes code."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_runs import NASTY, line_of

from odcft.errors import OdcftError
from odcft.progress import Progress
from odcft.reports import run_report
from odcft.reports.picture_folder import picture_folder, pictures_of
from odcft.reports.run_record import read_run
from odcft.reports.run_report import lead, report

QUIET = {"progress": Progress(quiet=True), "sample": 0}


def data_of(page):
    """What the page's script gets, and its thumbnails."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    thumbnails = re.search(r'id="thumbnails">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1]), thumbnails[1].split("\n")


def test_a_report_shows_clusters_and_pictures(make_run, tmp_path, drawn):
    run = make_run(tmp_path)
    values = report(run, **QUIET)
    assert values["out"] == str(run / "report.html")
    assert (values["images"], values["clusters"], values["pictures"], values["notes"]) == (24, 3, 24, [])
    data, thumbnails = data_of(run / "report.html")
    assert data["clusters"]["size"] == [8, 8, 8]
    assert len([one for one in thumbnails if one]) == 24
    name = data["images"]["name"]
    nearest = [name[i] for i in data["clusters"]["near"][1]]
    assert nearest == ["001.png", "004.png", "007.png", "010.png"]
    assert [name[i] for i in data["clusters"]["far"][1]] == ["022.png", "019.png"]
    # In the earlier state one of eight was another: 7 in both, 9 in either.
    assert data["clusters"]["stability"] == [round(7 / 9, 3), round(7 / 9, 3), 1.0]
    # The mean square of 0.00, 0.03 ... 0.21 is 0.01575.
    assert data["clusters"]["tightness"][0] == pytest.approx(1 - 0.01575, abs=1e-3)
    text = (run / "report.html").read_text()
    assert "was fine-tuned on 24 unlabelled images in images by online deep clustering" in text
    assert text.count("#cluster-") >= 3
    assert re.findall(r'(?:src|href|action|url)="(?!#)[^"]*"', text) == []


def test_names_of_files_stay_text(make_run, tmp_path):
    run = make_run(tmp_path, NASTY, clusters=2)
    report(run, **QUIET)
    text = (run / "report.html").read_text(encoding="utf-8")
    data, _ = data_of(run / "report.html")
    assert sorted(data["images"]["name"]) == sorted(name.replace("\n", "\\n") for name in NASTY)
    assert text.count("<script") == text.count("</script>") == 3
    assert "<img src=x" not in text
    assert "<b>bold" not in text


def test_labels_say_how_pure_clusters_are(make_run, tmp_path):
    names = [f"{'cat' if i % 3 == 0 or i == 1 else 'dog'}/{i:03d}.png" for i in range(24)]
    run = make_run(tmp_path, names)
    report(run, labels=str(tmp_path / "images"), **QUIET)
    data, _ = data_of(run / "report.html")
    assert data["clusters"]["purity"] == [1.0, round(7 / 8, 3), 1.0]
    assert data["clusters"]["classes"][1] == [["dog", 0.875], ["cat", 0.125]]
    assert "95.8% of 24 labelled images" in (run / "report.html").read_text()
    (tmp_path / "else" / "x").mkdir(parents=True)
    (tmp_path / "images" / names[0]).rename(tmp_path / "else" / "x" / "moved.png")
    with pytest.raises(OdcftError, match="none of the run's images has a label there"):
        report(run, labels=str(tmp_path / "else"), **QUIET)


def test_without_images_there_are_names_instead_of_pictures(make_run, tmp_path):
    run = make_run(tmp_path, pixels=False)
    values = report(run, **QUIET)
    assert values["pictures"] == 0
    assert "No pictures" in values["notes"][0]
    assert "--data" in values["notes"][0]
    assert data_of(run / "report.html")[0]["images"]["name"][0].endswith(".png")
    with pytest.raises(OdcftError, match="does not exist"):
        report(run, data=str(tmp_path / "nowhere"), **QUIET)


def test_damaged_images_are_counted_and_the_first_is_named(make_run, tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "images" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    (tmp_path / "images" / "004.png").unlink()
    values = report(run, **QUIET)
    assert (values["pictures"], values["unreadable"]) == (22, 1)
    assert any("1 of 24 images are no longer in" in note for note in values["notes"])
    assert any("003.png" in note for note in values["notes"])


def test_a_page_never_exceeds_its_size_and_the_rest_goes_beside(make_run, tmp_path):
    run = make_run(tmp_path, [f"{i:04d}.png" for i in range(400)], lines=[line_of(0)])
    values = report(run, megabytes=0.13, all_pictures=True, **QUIET)
    assert values["bytes"] < 0.13e6 + 30 * 400  # the names of the files beside are no part of the page's budget
    assert 0 < values["pictures"] < 400
    data, _ = data_of(run / "report.html")
    beside = [name for name in data["images"]["file"] if name]
    assert len(beside) + values["pictures"] == len(data["images"]["name"])
    assert all((run / "report_pictures" / name).is_file() for name in beside)
    report(run, all_pictures=True, **QUIET)  # again, over its own
    (run / "report_pictures" / "thesis.txt").write_text("mine")
    with pytest.raises(OdcftError, match="holds files odcft did not write"):
        report(run, all_pictures=True, **QUIET)


def test_a_run_that_has_not_ended_has_curves_only(make_run, tmp_path):
    run = make_run(tmp_path, finished=False)
    values = report(run, **QUIET)
    assert values["clusters"] == 0
    text = (run / "report.html").read_text()
    assert "is being fine-tuned" in text
    assert "epoch 3.0 of 3" in text
    assert 'aria-label="Loss, relative to ln K. ' in text


def test_only_reports_are_replaced(make_run, tmp_path):
    run = make_run(tmp_path)
    report(run, **QUIET)
    report(run, **QUIET)  # the RUN's own
    out = tmp_path / "mine.html"
    report(run, out=out, **QUIET)
    with pytest.raises(OdcftError, match=r"exists\. Choose another --out, or pass --overwrite"):
        report(run, out=out, **QUIET)
    report(run, out=out, overwrite=True, **QUIET)
    out.write_text("<html>my thesis</html>")
    with pytest.raises(OdcftError, match="was not written by odcft report"):
        report(run, out=out, overwrite=True, **QUIET)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(out)
    with pytest.raises(OdcftError, match="was not written by odcft report"):
        report(run, **QUIET)
    assert out.read_text() == "<html>my thesis</html>"
    with pytest.raises(OdcftError, match=r"end the name with \.html"):
        report(run, out=tmp_path / "report.pdf", **QUIET)


@pytest.mark.parametrize("what", ["no run", "run.json", "clusters", "metrics", "recipe", "state", "numbers"])
def test_damaged_files_are_refused_or_left_out(make_run, tmp_path, what):
    if what == "no run":
        with pytest.raises(OdcftError, match=r"is not a RUN: it has no run\.json"):
            report(tmp_path, **QUIET)
        return
    run = make_run(tmp_path)
    rubbish = b"\x00\xff rubbish {"
    if what == "run.json":
        (run / "run.json").write_bytes(rubbish)
        with pytest.raises(OdcftError, match="is damaged"):
            report(run, **QUIET)
    elif what == "clusters":
        (run / "clusters.parquet").write_bytes(rubbish)
        with pytest.raises(OdcftError, match=r"is not the clusters\.parquet of a run"):
            report(run, **QUIET)
    else:
        if what == "metrics":
            odd = [
                '{"step": 1e999}',
                '{"step": "a", "loss": 1}',
                "[1]",
                '{"step": 3, "epoch": null}',
                rubbish.decode("latin1"),
            ]
            (run / "metrics.jsonl").write_text("\n".join(odd))
        elif what == "recipe":
            (run / "recipe.yaml").write_bytes(rubbish)
        elif what == "state":
            for file in run.glob("checkpoints/*/*"):
                file.write_bytes(rubbish)
        else:
            columns = {"path": ["a", "b"], "cluster": [2**60, 5], "distance": np.array([np.nan, np.inf], np.float32)}
            pq.write_table(pa.table(columns), run / "clusters.parquet")
            about = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(about | {"images": 2}))
        assert report(run, **QUIET)["clusters"] in (2, 3)


def test_the_command_writes_a_page_and_says_so(odcft_command, make_run, tmp_path):
    run = make_run(tmp_path)
    code, out, err = odcft_command("report", run, "--sample", 0, "--json")
    assert code == 0, err
    assert json.loads(out)["clusters"] == 3
    assert "3 clusters of 24 images, 24 thumbnails" in err
    code, _, err = odcft_command("report", run, run)
    assert code == 2
    assert "pass --out FILE.html" in err
    code, _, err = odcft_command("report", tmp_path)
    assert code == 2
    assert err.startswith("odcft: ")


def test_braces_in_names_are_no_placeholders(make_run, tmp_path):
    record = read_run(make_run(tmp_path))
    record.about |= {"checkpoint": ["{0}.pth", "{}"], "data": "im{0}g/{x}"}
    assert lead(record).startswith("{0}.pth, {} was fine-tuned on ")


def test_addresses_in_run_json_are_not_fetched(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"data": "ftp://127.0.0.1:9/images/"}))
    record = read_run(run)
    monkeypatch.setattr(run_report, "find_images", lambda *args: pytest.fail("it was fetched"))
    found = run_report.find_pictures(record, None, None, None, Progress(quiet=True))
    assert found.images is None
    assert "Nothing is fetched unasked" in found.why


def test_a_folder_of_pictures_that_odcft_did_not_write_is_left_alone(make_run, tmp_path):
    run, page = make_run(tmp_path), tmp_path / "mine.html"
    own = tmp_path / "mine_pictures" / "00000" / "00000001.webp"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(OdcftError, match="mine_pictures, which the pictures go to, already exists"):
        report(run, out=page, all_pictures=True, **QUIET)
    (tmp_path / "other_pictures").symlink_to(tmp_path / "mine_pictures")
    with pytest.raises(OdcftError, match="is a link"):
        report(run, out=tmp_path / "other.html", all_pictures=True, **QUIET)
    assert own.read_bytes() == b"mine"
    assert picture_folder(tmp_path / "a.htm") != picture_folder(tmp_path / "a.html")


def test_an_earlier_page_keeps_its_pictures_if_the_new_one_cannot_be_written(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    report(run, all_pictures=True, megabytes=1e-9, **QUIET)
    folder = run / "report_pictures"
    before = {path: path.read_bytes() for path in [run / "report.html", *folder.rglob("*.*")]}
    assert len(before) == 2

    def full(*args):
        raise OdcftError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(run_report, "write_page", full)
        with pytest.raises(OdcftError, match="the disk is full"):
            report(run, all_pictures=True, megabytes=1e-9, **QUIET)
    assert {path: path.read_bytes() for path in [run / "report.html", *folder.rglob("*.*")]} == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    report(run, all_pictures=True, megabytes=1e-9, **QUIET)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")}.items() <= before.items()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OdcftError, match="mine"):
        report(run, all_pictures=True, **QUIET)
    assert (folder / "mine.txt").exists()


def test_labelled_images_give_the_verdict_that_evaluate_gives(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    change = {"knn": {"change": 5.0, "low": 1.0, "high": 9.0}}
    asked = []

    def evaluate_any(ckpt, data, test, protocols, **options):
        asked.append((ckpt, data, tuple(protocols)))
        return {"knn": {"top1": 75.0}, "test_images": 60, "change": change}

    monkeypatch.setattr("odcft.evaluation.any_protocol.evaluate_any", evaluate_any)
    report(run, evaluation="labelled/", **QUIET)
    assert asked == [(str(run), "labelled/", ("svm", "knn"))]
    assert f"odcft report {run} --evaluation labelled/ --sample 0" in (run / "report.html").read_text()
    assert "kNN top-1 70.0 before, 75.0 after" in (run / "report.html").read_text()
    about = json.loads((run / "run.json").read_text())
    gone = {"checkpoint": "gone.pth", "checkpoint_path": "/gone.pth", "sha256": "0"}
    (run / "run.json").write_text(json.dumps({**about, **gone}))
    (run / "backbone").mkdir(exist_ok=True)
    (run / "backbone" / "config.json").write_text("{}")
    with pytest.raises(OdcftError, match=r"no verdict without the checkpoint that .* \(gone\.pth, which .*not found"):
        report(run, evaluation="labelled/", **QUIET)
    assert len(asked) == 1


def test_a_run_that_ends_replaces_the_report_from_before(make_run, tmp_path):
    from odcft.reports.during_a_run import lacks_last_report, write_progress

    run = make_run(tmp_path)
    assert lacks_last_report(run)
    write_progress(run)
    assert lacks_last_report(run)
    report(run, **QUIET)
    assert not lacks_last_report(run)
    (run / "report.html").write_text("mine")
    assert not lacks_last_report(run)


def test_pictures_that_a_killed_process_left_do_not_become_those_of_the_next_page(tmp_path):
    (tmp_path / ".report_pictures.unfinished" / "00000").mkdir(parents=True)
    with pictures_of(tmp_path / "report.html"):
        pass
    assert list(tmp_path.iterdir()) == []
