"""Weights from the Hugging Face hub, without waiting for a network that is not there.

Without one, its client asks a dozen times, for a minute. So it is asked once whether it answers, for a few seconds, and
told to use what it has on this machine where it does not.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0  # seconds


@contextmanager
def no_longer_than_needed() -> Iterator[bool]:
    """While it lasts the hub's client is offline, unless the hub answers; which is what is given."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = not before and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether a server says anything within PATIENCE; through a proxy, where there is one."""
    from huggingface_hub.utils import get_session

    said = threading.Event()

    def ask() -> None:
        try:
            get_session().head(address, timeout=PATIENCE)
            said.set()
        except Exception:  # the client has many ways to say no
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()  # looking up a name has no time limit of its own
    done.wait(PATIENCE)
    return said.is_set()
