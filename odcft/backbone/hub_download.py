"""Avoid long waits for the Hugging Face hub on machines that cannot reach it.

Its client retries a dozen times over about a minute when there is no network connection. So odcft tests for a few
seconds whether the hub answers, and if it does not, has the client use its cache on this machine only.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_SECONDS = 5.0


@contextmanager
def offline_if_unreachable(ask: bool = True) -> Iterator[bool]:
    """Put the hub's client into offline mode if the hub does not answer, or `ask` is false; yields whether it does."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    reachable = ask and not before and _is_reachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable(url: str) -> bool:
    """Whether a server answers anything within TIMEOUT_SECONDS; through a proxy, if one is configured."""
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(url, timeout=TIMEOUT_SECONDS)
            answered.set()
        except Exception:  # the client raises many kinds
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()  # a name lookup has no time limit of its own
    done.wait(TIMEOUT_SECONDS)
    return answered.is_set()
