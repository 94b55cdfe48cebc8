"""Start one process a rank on this machine, as torchrun would: `--devices N` and `torchrun` end in the same run."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from odcft.distributed import stop_signals

GRACE = 30.0  # seconds that the others have to save and end, once one process has stopped as it was asked to
MOMENT = 2.0  # seconds that the others have to end by themselves and to say why, once one process has failed
TAIL = 200  # lines that are kept of what a rank says that is not heard


def relaunch(ranks: int) -> int:
    """Run this very command once for each rank, and wait for all.

    The first rank that ends with an error ends all of them. A signal to this process goes on to every rank; when it is
    killed, they stop as if they had been asked to. Rank 0 is heard as it speaks; of the others only one that failed
    where rank 0 did not: what one has to say is said once.

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
        stop_signals.LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    workers: list[subprocess.Popen] = []
    asked = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for worker in workers:
            worker.send_signal(number)

    for name in stop_signals.SIGNALS:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), pass_on)
    for rank in range(ranks):
        # Each in a session of its own: the terminal's Ctrl-C comes here alone, and reaches each rank once.
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        workers.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank else None,
                start_new_session=True,
            )
        )
    said = {rank: _Listener(worker) for rank, worker in enumerate(workers) if rank}

    running, since = dict(enumerate(workers)), 0.0
    while running:
        ended = {rank: code for rank, worker in running.items() if (code := worker.poll()) is not None}
        for rank in ended:
            del running[rank]
        if stop_signals.EXIT in ended.values():
            since = since or time.monotonic()
        failed = {rank: code for rank, code in ended.items() if code not in (0, stop_signals.EXIT)}
        if asked and since:  # those that stopped have left the others without company
            failed = {}
        if failed:
            failed |= {rank: code for rank, code in _end(running).items() if code not in (0, stop_signals.EXIT)}
            # One that says what to mend, before one that was killed, before one that only missed another (code 1).
            rank, code = max(sorted(failed.items()), key=lambda item: (item[1] > 1, item[1] < 0))
            if rank:
                said[rank].repeat()
            if code < 0 and -code in asked:  # before it could listen
                return stop_signals.EXIT
            if code < 0:
                name = signal.Signals(-code).name
                print(
                    f"odcft: process {rank} was ended from outside ({name}; SIGKILL is often the system's, for want of "
                    "memory), and the others with it. --resume goes on.",
                    file=sys.stderr,
                )
            return code if code > 0 else 1
        if since and time.monotonic() - since > GRACE:
            _end(running)
            break
        time.sleep(0.05)
    return stop_signals.EXIT if since else 0


def _end(workers: dict[int, subprocess.Popen]) -> dict[int, int]:
    """Let processes end in a moment, and kill those that do not; the exit codes of those that did."""
    until = time.monotonic() + MOMENT
    codes = {}
    for rank, worker in workers.items():
        try:
            codes[rank] = worker.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    return codes


class _Listener:
    """Takes down what a process says on stderr."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.lines: deque[bytes] = deque(maxlen=TAIL)
        assert process.stderr is not None
        self.thread = threading.Thread(target=self.lines.extend, args=(process.stderr,), daemon=True)
        self.thread.start()

    def repeat(self) -> None:
        """Say it on our own stderr."""
        self.thread.join(timeout=1)  # a data worker may outlive the process and keep the pipe open
        sys.stderr.write(b"".join(self.lines.copy()).decode(errors="backslashreplace"))
        sys.stderr.flush()
