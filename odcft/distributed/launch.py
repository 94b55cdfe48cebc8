"""Start one process per rank on this machine: `--devices N` and `torchrun` give the same run."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from odcft.distributed import stop_signals

GRACE = 30.0  # seconds that the other ranks get to save and end, after one has stopped as requested
MOMENT = 2.0  # seconds that the other ranks get to end and report why, after one has failed
TAIL = 200  # lines of stderr that are kept of every rank but 0


def run_ranks(ranks: int) -> int:
    """Run this same command once per rank, and wait for all of them.

    The first rank that fails ends all of them. Signals to this process are forwarded to every rank; if it is killed,
    the ranks stop as if they had been asked to. Rank 0 writes to our stderr; of the others, the stderr is shown only
    of one that failed when rank 0 did not, so that nothing is reported twice.

    Args:
        ranks: number of processes.

    Returns:
        0, 75 if they stopped as requested, or the exit code of the first rank that failed.
    """
    environment = _environment(ranks)
    workers: list[subprocess.Popen] = []
    received = _forward_signals(workers)
    try:
        for rank in range(ranks):
            workers.append(_start_rank(rank, environment))
    except OSError as error:
        for worker in workers:
            worker.kill()
        print(f"odcft: {ranks} processes cannot be started: {error.strerror}. Choose fewer --devices.", file=sys.stderr)
        return 2
    stderr = {rank: _StderrTail(worker) for rank, worker in enumerate(workers) if rank}

    running, first_stop = dict(enumerate(workers)), 0.0
    while running:
        ended = {rank: code for rank, worker in running.items() if (code := worker.poll()) is not None}
        for rank in ended:
            del running[rank]
        if stop_signals.EXIT_STOPPED in ended.values():
            first_stop = first_stop or time.monotonic()
        failed = _failures(ended)
        if failed and not (received and first_stop):  # else they only failed because ranks that stopped left them
            failed |= _failures(_end(running))
            return _report(failed, stderr, received)
        if first_stop and time.monotonic() - first_stop > GRACE:
            _end(running)
            break
        time.sleep(0.05)
    return stop_signals.EXIT_STOPPED if first_stop else 0


def _environment(ranks: int) -> dict[str, str]:
    """The environment variables that all ranks have in common."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks if hasattr(os, "sched_getaffinity") else 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        stop_signals.LAUNCHER: str(os.getpid()),
    }


def _forward_signals(workers: list[subprocess.Popen]) -> list[int]:
    """Forward signals to the processes that are in the list when they come; return the list of signals received."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for worker in workers:
            worker.send_signal(number)

    for name in stop_signals.SIGNALS:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), forward)
    return received


def _start_rank(rank: int, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE if rank else None,
        start_new_session=True,  # the terminal's Ctrl-C then reaches us alone, and through us each rank once
    )


def _failures(codes: dict[int, int]) -> dict[int, int]:
    """Those exit codes, by rank, that are neither success nor a stop as requested."""
    return {rank: code for rank, code in codes.items() if code not in (0, stop_signals.EXIT_STOPPED)}


def _report(failed: dict[int, int], stderr: dict[int, "_StderrTail"], received: list[int]) -> int:
    """Say why ranks failed, if that was not said yet.

    Args:
        failed: exit codes, by rank.
        stderr: of every rank but 0.
        received: signals that asked the run to stop.

    Returns:
        Our own exit code.
    """
    # A rank that says what to fix comes first, then one that was killed, then one that only lost another (code 1).
    rank, code = max(sorted(failed.items()), key=lambda item: (item[1] > 1, item[1] < 0))
    if rank:
        stderr[rank].show()
    if code > 0:
        return code
    if -code in received:  # the rank did not handle signals yet
        return stop_signals.EXIT_STOPPED
    print(
        f"odcft: process {rank} was killed ({signal.Signals(-code).name}; SIGKILL often means that the system ran out "
        "of memory), so the other processes were ended too. Continue with --resume.",
        file=sys.stderr,
    )
    return 1


def _end(workers: dict[int, subprocess.Popen]) -> dict[int, int]:
    """Give processes a moment to end and kill those that do not; return the exit codes of those that did."""
    deadline = time.monotonic() + MOMENT
    codes = {}
    for rank, worker in workers.items():
        try:
            codes[rank] = worker.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    return codes


class _StderrTail:
    """Keeps the last lines that a process writes to stderr."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.lines: deque[bytes] = deque(maxlen=TAIL)
        assert process.stderr is not None
        self.thread = threading.Thread(target=self.lines.extend, args=(process.stderr,), daemon=True)
        self.thread.start()

    def show(self) -> None:
        """Write the lines to our own stderr."""
        self.thread.join(timeout=1)  # a data worker may outlive the process and keep the pipe open
        sys.stderr.write(b"".join(self.lines.copy()).decode(errors="backslashreplace"))
        sys.stderr.flush()
