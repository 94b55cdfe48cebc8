"""Images that break while a run trains: they are skipped and counted, and too many of them end the run."""

import math
from collections.abc import Callable, Iterator

from odcft.data.batches import Batch
from odcft.data.images import Images
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.text import count_of

NAMED = 5  # broken images that are named when they are met; the others are only counted


class BrokenImages:
    """Counts the images of this rank that could be read when the run was prepared, and no longer can be.

    Args:
        images: those of the run.
        share: of this rank's images that may break (`data.max_broken`); one always may, unless it is 0.
        say: called with a line for the first few.
        least: images that a batch must have left: 2 for each part of it, as batch norm cannot do with fewer.
    """

    def __init__(self, images: Images, share: float, say: Callable[[str], None], least: int = 2) -> None:
        self.images, self.share, self.say, self.least = images, share, say, least
        self.found: dict[int, str] = {}  # index to reason
        self.owned = len(ownership.my_images(len(images)))

    def checked(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        """Yield the batches from a step on, without those images.

        Raises:
            OdcftError: too many have broken, or fewer than `least` images of a batch are left.
        """
        for batch in batches:
            self.add(batch.unreadable, step)
            if len(batch.index_B) < self.least:
                raise OdcftError(
                    f"Step {step}: hardly any image can still be read. Is {self.images.source} still there? "
                    "Continue with --resume."
                )
            yield batch
            step += 1

    def add(self, unreadable: dict[int, str], step: int) -> None:
        """Count these images, once each.

        Raises:
            OdcftError: too many have broken.
        """
        new = {index: reason for index, reason in unreadable.items() if index not in self.found}
        for index, reason in list(new.items())[: max(0, NAMED - len(self.found))]:
            self.say(f"Step {step}: {self.images.names[index]} can no longer be read ({reason}); skipped.")
        self.found |= new
        if new and len(self.found) > math.ceil(self.share * self.owned):
            index, reason = next(reversed(self.found.items()))
            whose = f" of process {dist.rank()}" if dist.world_size() > 1 else ""
            raise OdcftError(
                f"Step {step}: {len(self.found):,} of {count_of(self.owned, 'image')}{whose} can no longer be read, "
                f"more than data.max_broken={self.share:g} allows; the last is {self.images.names[index]}: {reason}. "
                f"Is {self.images.source} still complete? Restore it and continue with --resume, or allow more: "
                "--resume --set data.max_broken=0.1."
            )

    def report(self) -> int:
        """Say how many there are on all ranks, and return it; every rank must call it."""
        count = len(dist.gather_dict(self.found))
        if count:
            self.say(f"Broken      {count_of(count, 'image')} could no longer be read and had to be skipped.")
        return count
