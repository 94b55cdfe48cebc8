"""Being asked to stop: SIGTERM, SIGUSR1 (schedulers), SIGHUP (a closed terminal) and the first Ctrl-C.

A signal ends the program with `Stopped`, at once, unless it is within `deferred()`: there it is only noted, for the
loop to look at where it can stop without losing anything. The second Ctrl-C always ends the program on the spot.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT = 75  # EX_TEMPFAIL: "try again later", which is what schedulers take it for
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
APART = 1.0  # seconds: two Ctrl-C closer than that are one, delivered by the terminal and by a launcher

LAUNCHER = "ODCFT_LAUNCHER"  # environment: the process that started this rank and hands signals on (launch.py)

_process = 0  # that listens: data workers inherit the handlers and must not heed them
_asked = ""  # the first signal
_asked_at = 0.0
_deferred = False
# torchrun heeds no SIGUSR1 and dies of it; its processes go on as orphans.
_launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else int(os.environ.get(LAUNCHER, 0))


class Stopped(BaseException):
    """The program was asked to stop and did. Not an Exception: nothing that mends errors may swallow it."""


@contextmanager
def listening() -> Iterator[None]:
    """Within, the signals are heeded. Only the main thread can do that; elsewhere the program's own handlers stay."""
    global _process, _asked, _deferred
    _process, _asked, _deferred = os.getpid(), "", False
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # What is ignored stays so: SIGHUP under nohup, SIGINT in a shell's background.
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _asked = ""
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> str:
    """What asked this process to stop, or "": a signal, or the end of the process that launched it."""
    if _launcher and os.getppid() != _launcher:
        return "launcher gone"
    return _asked


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a request is only noted: whoever works here looks at `asked()` where it can stop."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def ignore_in_worker() -> None:
    """In a data worker: a signal to all processes of a job is for the one that trains, which still needs its batches.

    A worker ends when that process asks it to or is gone.
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
        if number == signal.SIGINT and now - _asked_at > APART:
            _say("odcft: ended at once. --resume goes on from the last state, if there is one.\n")
            os._exit(1)
        return
    _asked, _asked_at = signal.Signals(number).name, now
    if not _deferred:
        raise Stopped
    if os.environ.get("RANK", "0") == "0":
        _say(f"\n{_asked}: stopping after this step …\n")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; a handler must not print through buffers that are in use
        os.write(sys.stderr.fileno(), text.encode())
