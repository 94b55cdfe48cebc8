"""What ranks exchange and what the host reads in a step, counted on gloo processes (see tests/step_counters.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent.parent / "on_ranks.py"
K, D = 40, 8  # of the case `wire`
A_PASS = 8  # collectives that handling small clusters adds to a step


def counted(ranks, case, folder):
    out = folder / f"{case}-{ranks}.safetensors"
    command = [sys.executable, str(SCRIPT), str(ranks), case, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: lines.tolist() for name, lines in load_file(out).items()}


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4, 8))])
def test_a_memory_step_exchanges_as_much_for_a_million_images_as_for_ten_thousand(tmp_path, ranks):
    found = counted(ranks, "wire", tmp_path)
    counts, sums = ([0, 0], [0, 0]) if ranks == 1 else ([1, K * 8], [2, K * 8 + K * D * 8])
    for images in (10_000, 1_000_000):
        assert found[f"{images} 0"] == [[*counts, 1], [*sums, 1]] * 2  # centroids are refreshed in every second step
        for small in (1, 15):
            assert found[f"{images} {small}"][1:] == found[f"{images} 0"][1:]
    handled = {name: lines[0] for name, lines in found.items() if not name.endswith(" 0")}
    assert len(handled) == 4
    for collectives, _, reads in handled.values():  # however many clusters are small, and images there are
        assert collectives == (1 + A_PASS if ranks > 1 else 0)
        assert reads <= 1 + 19


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_steps_of_a_run_exchange_and_read_the_same_few_things(tmp_path, make_checkpoint, make_images, ranks):
    make_checkpoint(tmp_path / "c.pth")
    make_images(tmp_path / "images", 64)
    found = counted(ranks, "counts", tmp_path)
    assert set(found) == {"odc", "dc", "codc", "instances"}
    for method, lines in found.items():
        within = [line for step, line in enumerate(lines) if step % 8]  # an epoch begins with saving, or with K-Means
        ordinary = [line[1:] for line in within if not line[0]]
        refilling = [line[1:] for line in within if line[0]]
        # Buffers; two buckets of gradients; the flags of the ranks. ODC: counts, and sums every fourth step.
        # Instances: what the memory holds of the whole batch.
        least = 0 if ranks == 1 else {"dc": 4, "instances": 6}.get(method, 5)
        assert {line[0] for line in ordinary} <= {least, least + (ranks > 1) * (method != "dc")}
        assert len({line[1] for line in ordinary}) <= 2
        # The flags, whether a cluster is small, and three of the host's own: which images come next, in which order
        # their colours change, and which become gray.
        assert {line[2] for line in ordinary} == {4 if method == "dc" else 5}
        assert bool(refilling) == (method != "dc")
        for collectives, _, reads in refilling:
            assert collectives <= least + (ranks > 1) * (1 + A_PASS)
            assert reads <= 5 + 19
