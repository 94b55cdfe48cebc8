"""Start one process a rank on this machine, as torchrun would: `--devices N` and `torchrun` end in the same run."""

import os
import signal
import socket
import subprocess
import sys
import time

from odcft import stopping

GRACE = 30.0  # seconds that the others have to save and end, once one process has stopped as it was asked to


def relaunch(ranks: int) -> int:
    """Run this very command once for each rank, and wait for all.

    The first rank that ends with an error ends all of them. A signal to this process goes on to every rank; when it is
    killed, they stop as if they had been asked to.

    Args:
        ranks: how many processes.

    Returns:
        0, 75 if they stopped as asked, or the exit code of the first rank that failed.
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
        stopping.LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    workers: list[subprocess.Popen] = []
    asked = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for worker in workers:
            worker.send_signal(number)

    for name in stopping.SIGNALS:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), pass_on)
    for rank in range(ranks):
        # Each in a session of its own: the terminal's Ctrl-C comes here alone, and reaches each rank once.
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        workers.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))

    running, since = dict(enumerate(workers)), 0.0
    while running:
        ended = {rank: code for rank, worker in running.items() if (code := worker.poll()) is not None}
        for rank in ended:
            del running[rank]
        if stopping.EXIT in ended.values():
            since = since or time.monotonic()
        failed = {rank: code for rank, code in ended.items() if code not in (0, stopping.EXIT)}
        if asked and since:  # those that stopped have left the others without company
            failed = {}
        if failed:
            _end(list(running.values()))
            # One that says what to mend, before one that was killed, before one that only missed another (code 1).
            rank, code = max(failed.items(), key=lambda item: (item[1] > 1, item[1] < 0))
            if code < 0 and -code in asked:  # before it could listen
                return stopping.EXIT
            if code < 0:
                name = signal.Signals(-code).name
                print(
                    f"odcft: process {rank} was ended from outside ({name}; SIGKILL is often the system's, for want of "
                    "memory), and the others with it. --resume goes on.",
                    file=sys.stderr,
                )
            return code if code > 0 else 1
        if since and time.monotonic() - since > GRACE:
            _end(list(running.values()))
            break
        time.sleep(0.05)
    return stopping.EXIT if since else 0


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
