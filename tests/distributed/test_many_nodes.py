"""Two nodes on loopback, each with a launcher of its own: one is killed, another takes its place, the run goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from stopped_runs import outcome, write_inputs

# `finetune`, of which the second node's launcher and process are killed in a step, once.
PROGRAM = """
import os, signal, sys
from odcft import cli, train
mark, real = os.environ["MARK"], train.lr_at
def lr_at(step, *args):
    if step == 4 and os.environ["GROUP_RANK"] == "1" and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, *args)
train.lr_at = lr_at
cli.main()
"""
QUICK = ["optim.batch_size=4", "neck.hidden=16", "neck.dim=8", "neck.dropout=0.5", "optim.epochs=2", "log.interval=2"]
QUICK += ["log.tensorboard=false", "log.snapshot_share=1", "log.snapshot_minutes=0.000001"]
SECONDS = 20  # in which the other node's process has noticed; on a quiet machine it takes half a second


def launch(folder, out, port, node):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={node == 0}"]
    arguments = ["finetune", "c.pth", "images", "--out", out, "--recipe", "small", *(f"--set={s}" for s in QUICK)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(folder / "killed")}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a new node gets no address from the old one
    with (folder / f"{out}-{node}-{time.time()}.log").open("w") as log:
        return subprocess.Popen(
            [*command, str(folder / "program.py"), *arguments], cwd=folder, env=environment, stderr=log
        )


@pytest.mark.slow
def test_a_lost_node_is_noticed_and_after_another_takes_its_place_the_bits_are_the_same(tmp_path):
    write_inputs(tmp_path, 12)
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = launch(tmp_path, "run", port, 0)
    started = [first, launch(tmp_path, "run", port, 1)]
    try:
        assert started[1].wait(timeout=500) == -signal.SIGKILL, logs(tmp_path)
        lost = time.monotonic()
        while "lost another process" not in logs(tmp_path):
            time.sleep(0.1)
            assert time.monotonic() - lost < SECONDS + 10 * os.getloadavg()[0]
        started.append(launch(tmp_path, "run", port, 1))
        assert [node.wait(timeout=500) for node in (first, started[-1])] == [0, 0], logs(tmp_path)
    finally:
        for node in started:
            node.terminate()
    assert logs(tmp_path).count("the run goes on from its last state") == 1  # said by rank 0, whichever node has it
    (tmp_path / "killed").touch()
    whole = [sys.executable, "-m", "odcft", "finetune", "c.pth", "images", "--out", "whole", "--recipe", "small"]
    whole += ["--devices", "2", *(f"--set={s}" for s in QUICK)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(whole, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=500)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
