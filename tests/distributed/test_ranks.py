"""Two gloo processes end where one does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent.parent / "on_ranks.py"


def on_ranks(ranks, case, out):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(ranks), case, str(out)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
@pytest.mark.parametrize("case", ["small_clusters", "clustering", "steps", "leaving"])
def test_ranks_end_with_the_memory_of_one(tmp_path, case, ranks):
    for number in (1, ranks):
        result = on_ranks(number, case, tmp_path / f"{number}.safetensors")
        assert result.returncode == 0, result.stderr
    one, several = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / f"{ranks}.safetensors")
    assert one
    for name in one:
        assert torch.equal(one[name], several[name]), name


def test_an_error_on_one_rank_ends_all_with_its_message(tmp_path):
    began = time.monotonic()
    result = on_ranks(2, "error_on_one", tmp_path / "x")
    assert result.returncode == 2
    assert "rank 1 has run out of luck" in result.stderr
    assert time.monotonic() - began < 60


@pytest.fixture
def inputs(tmp_path, make_checkpoint, make_images):
    return str(make_checkpoint(tmp_path / "c.pth")), str(make_images(tmp_path / "images", 13))


def odcft(*args, launcher=("-m", "odcft")):
    result = subprocess.run([sys.executable, *launcher, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_memory_written_by_two_ranks_is_in_dataset_order(tmp_path, inputs):
    for ranks in (1, 2):
        odcft("init-memory", *inputs, "--out", tmp_path / f"m{ranks}", "--recipe", "small", "--devices", ranks)
    one, two = (load_file(tmp_path / f"m{ranks}" / "memory.safetensors") for ranks in (1, 2))
    assert torch.allclose(one["features"], two["features"], atol=1e-5)
    assert torch.equal(one["labels"], two["labels"])
    assert (tmp_path / "m1" / "images.csv").read_text() == (tmp_path / "m2" / "images.csv").read_text()


@pytest.mark.slow
def test_torchrun_and_devices_are_the_same_run_and_read_any_memory(tmp_path, inputs):
    odcft("init-memory", *inputs, "--out", tmp_path / "m", "--recipe", "small")
    quick = ["--memory", tmp_path / "m", "--recipe", "small", "--epochs", 1, "--set", "optim.batch_size=4", "--json"]
    first = odcft("finetune", *inputs, "--out", tmp_path / "a", *quick, "--devices", 2)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631", "-m", "odcft")
    second = odcft("finetune", *inputs, "--out", tmp_path / "b", *quick, launcher=torchrun)
    assert json.loads(first.stdout)["steps"] == json.loads(second.stdout)["steps"] == 3
    a, b = (load_file(tmp_path / name / "backbone" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_rank_that_is_done_does_not_wait_for_python_to_go_down(tmp_path, inputs):
    """A thread of torch's may abort it then, as the handler does here."""
    script = "import atexit, os; 'RANK' in os.environ and atexit.register(os.abort); from odcft.cli import main; main()"
    quick = ["--recipe", "small", "--epochs", 1, "--set", "optim.batch_size=4", "--devices", 2]
    odcft("finetune", *inputs, "--out", tmp_path / "run", *quick, launcher=("-c", script))
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()


def test_unreadable_image_on_one_of_two_ranks(tmp_path, inputs):
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"x")
    quick = ["--recipe", "small", "--epochs", 1, "--set", "optim.batch_size=4", "--json", "--devices", 2]
    summary = json.loads(odcft("finetune", *inputs, "--out", tmp_path / "run", *quick).stdout)
    assert (summary["images"], summary["unreadable"]) == (13, 1)


@pytest.mark.slow
def test_an_image_that_breaks_later_leaves_one_rank_a_smaller_batch(tmp_path, inputs):
    """The ranks exchange the entries of their batches for the instance loss of `small`.

    The first image is read up to six times before training; later it is gone, for one of the two.
    """
    (tmp_path / "once.py").write_text(
        "import io, os\nimport numpy as np\nfrom PIL import Image\nreads = []\n"
        "def read(data):\n"
        "    reads.append(data)\n"
        "    if os.environ['RANK'] == '0' and data == reads[0] and reads.count(data) > 6:\n"
        "        raise OSError('gone')\n"
        "    return np.asarray(Image.open(io.BytesIO(data)))\n"
    )
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from odcft.cli import main; main()"
    quick = ["--recipe", "small", "--epochs", 8, "--set", "optim.batch_size=8", "--set", "data.max_broken=1", "--json"]
    told = odcft(
        *("finetune", *inputs, "--out", tmp_path / "run", "--reader", "once:read", *quick, "--devices", 2),
        launcher=("-c", script),
    )
    summary = json.loads(told.stdout)
    assert (summary["images"], summary["unreadable"], summary["broken"], summary["steps"]) == (13, 0, 1, 8)


@pytest.mark.slow
def test_a_broken_image_leaves_for_good_at_init_memory_on_two_ranks(tmp_path, inputs):
    """It is read once, and `finetune --memory` takes over which it was and why."""
    (tmp_path / "images" / "a" / "001x.png").write_bytes(b"x")
    made = [tmp_path / f"m{ranks}" for ranks in (1, 2)]
    quick = ["--recipe", "small", "--set", "optim.batch_size=4"]
    for ranks, folder in zip((1, 2), made, strict=True):
        told = odcft("init-memory", *inputs, "--out", folder, *quick, "--devices", ranks).stderr
        assert told.count("Features: ") == 1
    assert (made[0] / "quarantine.csv").read_text() == (made[1] / "quarantine.csv").read_text()
    assert "a/001x.png,not an image" in (made[0] / "quarantine.csv").read_text()
    one, two = (load_file(folder / "memory.safetensors") for folder in made)
    assert torch.allclose(one["features"], two["features"], atol=1e-5)
    run = odcft(
        *("finetune", *inputs, "--out", tmp_path / "run", "--memory", made[1], *quick),
        *("--epochs", 1, "--json", "--devices", 2),
    )
    summary = json.loads(run.stdout)
    assert (summary["images"], summary["unreadable"], summary["broken"]) == (13, 1, 0)
    assert (tmp_path / "run" / "quarantine.csv").read_text() == (made[1] / "quarantine.csv").read_text()


@pytest.mark.slow
def test_three_ranks_stop_skip_and_go_on_together(tmp_path, inputs):
    result = on_ranks(3, "goes_on", tmp_path / "x.safetensors")
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "x.safetensors")
    assert found["parts_equal_whole"]  # three: two numbers have the same sum in either order
    assert found["figures_equal"]
    assert found["skipped_is_finite"]
    assert found["steps_of_skipped"].tolist() == [0, 1, 2, 4, 5]
