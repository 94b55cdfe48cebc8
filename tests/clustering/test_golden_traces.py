"""The recorded traces replay without one wrong label, on one process and on several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_trace_replays(variant, ranks):
    trace = ROOT / "tests" / "data" / f"odc_memory_{variant}.npz"
    command = [sys.executable, str(ROOT / "benchmarks" / "replay_trace.py"), str(trace), "--variant", variant]
    result = subprocess.run([*command, "--ranks", str(ranks)], capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout)
    assert figures["label_mismatches"] == 0
    assert figures["max_feature_error"] < 1e-6
    assert figures["max_centroid_error"] < 1e-6
    assert figures["max_weight_error"] < 1e-6


def test_the_variants_are_not_the_same():
    trace = ROOT / "tests" / "data" / "odc_memory_official.npz"
    command = [sys.executable, str(ROOT / "benchmarks" / "replay_trace.py"), str(trace), "--variant", "paper"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert figures["label_mismatches"] > 0
