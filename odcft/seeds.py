"""Every stream of random numbers in a run, by name.

Every random number depends on the run's seed, on its purpose and on its place in the run, never on the numbers drawn
before it. So a run can be resumed anywhere, and no two streams are the same. Numbers that all ranks must share
(weights, K-Means, halves of split clusters) do not depend on the rank; those for a rank's own images (the order of an
epoch, the augmentation of a step) do.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Name of the stream: the numbers that identify one of its draws, in this order.
STREAMS = {
    "backbone": "member",  # random weights: scratch:NAME, and whatever a partial checkpoint lacks
    "neck": "member",
    "head": "member",
    "new head": "member, step",  # dc: the classifier, reinitialised after every clustering
    "start layer": "draw",  # odc: 0: which images are looked at, and how they are augmented; 1, 2: crops of two views
    "kmeans": "epoch",  # which images become the first centroids
    "empty clusters": "epoch",  # dc: splitting clusters to fill them
    "small clusters": "step",  # odc: splitting clusters to refill them
    "order": "epoch, rank",  # of the images in an epoch
    "crop": "epoch, image",
    "augmentation": "rank, step",  # of a batch, on the network's device
    "dropout": "rank, step",
    "copies": "rank, step",  # codc: rotated and mixed copies
    "pretext network": "",
    "pretext puzzles": "rank, step",
    "labels": "class",  # evaluate --protocol semi: which images' labels are used
    "semi head": "",  # its classifier, and dropout
}


def seed(run: int, stream: str, *where: int) -> int:
    """The seed of one draw.

    Args:
        run: the recipe's seed.
        stream: one of STREAMS.
        where: one integer for each number that the stream names.

    Returns:
        A seed of 63 bits.
    """
    assert len(where) == len(STREAMS[stream].split(", ") if STREAMS[stream] else []), f"{stream}: {STREAMS[stream]}"
    words = f"{run}/{stream}/{'/'.join(map(str, where))}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def generator(run: int, stream: str, *where: int) -> torch.Generator:
    """A CPU generator for one draw; arguments as for `seed`."""
    return torch.Generator().manual_seed(seed(run, stream, *where))


@contextmanager
def seeded_init(run: int, stream: str, *where: int) -> Iterator[None]:
    """Within this context, torch's global CPU generator, which initialises new layers, is seeded for one draw.

    Arguments as for `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(run, stream, *where))
        yield
