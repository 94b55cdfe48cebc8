"""Requests to stop: SIGTERM, SIGUSR1 (schedulers), SIGHUP (a closed terminal) and the first Ctrl-C.

A signal raises `Stopped` immediately. Within `deferred()` it is only recorded, for the loop to check at a point where
it can stop without losing anything. A second Ctrl-C always ends the program immediately.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT_STOPPED = 75  # the exit code of a stopped program: EX_TEMPFAIL, which schedulers read as "try again later"
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
SAME_CTRL_C = 1.0  # seconds within which two Ctrl-C count as one, delivered by both the terminal and a launcher

LAUNCHER = "ODCFT_LAUNCHER"  # environment variable: id of the process that started this rank and forwards signals to it

_process = 0  # id of the process that handles signals: data workers inherit the handlers, but must not act on them
_asked = ""  # name of the first signal
_asked_at = 0.0
_deferred = False
# torchrun does not handle SIGUSR1 and dies of it; its processes then run on as orphans, and notice by this.
_launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else int(os.environ.get(LAUNCHER, 0))


class Stopped(BaseException):
    """The program was asked to stop. Not an Exception, so that no error handler swallows it."""


@contextmanager
def handling_signals() -> Iterator[None]:
    """Handle the signals within this context. Only the main thread can; in any other, the handlers stay as they are."""
    global _process, _asked, _deferred
    _process, _asked, _deferred = os.getpid(), "", False
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # Signals that are ignored stay ignored: SIGHUP under nohup, SIGINT in a background job of a shell.
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _asked = ""
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> str:
    """What asked this process to stop: the name of a signal, or the end of its launcher; "" if nothing did."""
    if _launcher and os.getppid() != _launcher:
        return "launcher gone"
    return _asked


@contextmanager
def deferred() -> Iterator[None]:
    """Only record requests to stop within this context; the code in it checks `asked()` where it can stop."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def ignore_signals_in_worker() -> None:
    """Ignore the signals in a data worker.

    Schedulers signal all processes of a job, but the training process still needs batches to finish its step. A worker
    ends when that process tells it to, or has ended.
    """
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _on_signal(number: int, frame: object) -> None:
    global _asked, _asked_at
    if os.getpid() != _process:
        return
    now = time.monotonic()
    if _asked:
        if number == signal.SIGINT and now - _asked_at > SAME_CTRL_C:
            _say("odcft: ended at once. --resume continues from the last state, if there is one.\n")
            os._exit(1)
        return
    _asked, _asked_at = signal.Signals(number).name, now
    if not _deferred:
        raise Stopped
    if os.environ.get("RANK", "0") == "0":
        _say(f"\n{_asked}: stopping after this step …\n")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; and a signal handler must not use buffered output
        os.write(sys.stderr.fileno(), text.encode())
