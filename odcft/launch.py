"""Start one process a rank on this machine, as torchrun would: `--devices N` and `torchrun` end in the same run."""

import os
import signal
import socket
import subprocess
import sys
import time


def relaunch(ranks: int) -> int:
    """Run this very command once for each rank, and wait for all.

    The first rank that ends with an error ends all of them. A signal to this process goes on to every rank.

    Args:
        ranks: how many processes.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks if hasattr(os, "sched_getaffinity") else 1)
    common = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stdin=subprocess.DEVNULL)
        for r in range(ranks)
    ]

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the ranks by itself, from the terminal

    running = list(workers)
    while running:
        for worker in list(running):
            code = worker.poll()
            if code is None:
                continue
            running.remove(worker)
            if code != 0:
                _end(running)
                return code if code > 0 else 1
        time.sleep(0.05)
    return 0


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
