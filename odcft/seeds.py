"""Every stream of random numbers of a run, by name.

A number that is drawn anywhere depends on the run's seed, on what it is drawn for, and on where in the run that is;
never on what was drawn before it. So a run can go on anywhere, and no two streams are the same. What several ranks
need alike (weights, K-Means, halves of split clusters) does not depend on the rank; what each draws for its own images
(an epoch's order, a step's augmentation) does.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Stream: what tells one draw of it from another, in this order.
STREAMS = {
    "backbone": "member",  # random weights: scratch:NAME, what a partial checkpoint lacks
    "neck": "member",
    "head": "member",
    "new head": "member, step",  # dc: the classifier that starts anew
    "kmeans": "epoch",  # the images that the first centroids are
    "empty clusters": "epoch",  # dc: the halves that fill them
    "small clusters": "step",  # odc: the halves that refill them
    "order": "epoch, rank",  # of the images of an epoch
    "crop": "epoch, image",
    "augmentation": "rank, step",  # of a batch, where the network is
    "dropout": "rank, step",
    "copies": "rank, step",  # codc: turned and mixed copies
    "pretext network": "",
    "pretext puzzles": "rank, step",
}


def seed(run: int, stream: str, *where: int) -> int:
    """The seed of one draw.

    Args:
        run: the recipe's seed.
        stream: one of STREAMS.
        where: as many whole numbers as the stream names.

    Returns:
        63 bits.
    """
    assert len(where) == len(STREAMS[stream].split(", ") if STREAMS[stream] else []), f"{stream}: {STREAMS[stream]}"
    words = f"{run}/{stream}/{'/'.join(map(str, where))}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def generator(run: int, stream: str, *where: int) -> torch.Generator:
    """A generator on the CPU for one draw; arguments as `seed`."""
    return torch.Generator().manual_seed(seed(run, stream, *where))


@contextmanager
def weights(run: int, stream: str, *where: int) -> Iterator[None]:
    """Within, torch's own random numbers on the CPU, which new layers are filled with, are those of one draw.

    Arguments as `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(run, stream, *where))
        yield
