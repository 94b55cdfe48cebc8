"""Paths of the command line that do not exist, found before anything slow is imported; the full checks come later."""

import glob
import os
from collections.abc import Iterable

from odcft.data.image_files import is_url
from odcft.data.stores.lists import LISTS
from odcft.errors import OdcftError

SHARDS = (".tar", ".parquet")
WHAT = f"a folder of images, a list file ({', '.join(LISTS)}), or shards ({', '.join(SHARDS)})"


def refuse_missing(ckpts: Iterable[str] = (), data: Iterable[str | None] = ()) -> None:
    """Refuse checkpoints and images that are paths of this machine, but do not exist.

    Raises:
        OdcftError: as `load_backbone` and `find_images` would, seconds later.
    """
    for ckpt in ckpts:
        if ckpt and ":" not in ckpt and not _exists(ckpt):  # timm:resnet18 is a name
            raise OdcftError(
                f"{ckpt}: no such checkpoint. Give a file, a timm folder, a RUN, or a name such as timm:resnet18."
            )
    for place in data:
        if place and not is_url(place) and not glob.has_magic(place) and not _exists(place):
            raise OdcftError(f"{place} does not exist. Give {WHAT}.")


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no access, a NUL byte: said better later
        return True
    return True
