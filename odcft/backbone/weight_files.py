"""Find the files in a folder that hold a network's weights: one, or the parts that an index lists."""

from pathlib import Path

from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.text import short_repr

# In the order in which they are looked for: tensors are safer to read than pickles.
NAMES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.bin"),
)
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_PARTS = 1000


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights, in order; none if there are none.

    Raises:
        OdcftError: an index is damaged, or names a file that does not exist or lies outside of the folder.
    """
    for name, index in (("model.safetensors", INDEX_NAMES[0]), *((name, INDEX_NAMES[1]) for name in NAMES[1:])):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _parts(folder / index)
    return []


def _parts(index: Path) -> list[Path]:
    """The parts that an index lists under "weight_map": by the name of each tensor, the name of its file."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise OdcftError(f"{index} is damaged: it has no weight_map from tensors to files.")
    names = sorted(set(places.values()))
    if len(names) > MAX_PARTS:
        raise OdcftError(f"{index} lists {len(names):,} files, more than the weights of a network are split into.")
    for name in names:
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise OdcftError(f"{index} names {short_repr(name)}, which is not a file of this folder.")
        if not (index.parent / name).is_file():
            raise OdcftError(f"{index} lists {short_repr(name)}, which does not exist. Copy or download it again.")
        if not _stays_inside(index.parent, index.parent / name):
            raise OdcftError(f"{index} lists {short_repr(name)}, a link to a file outside of the folder.")
    return [index.parent / name for name in names]


def _stays_inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder once links are followed; the hub's own cache links to its `blobs`."""
    target = file.resolve()
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent.resolve() / "blobs"
    return cached or target.parent == folder.resolve()
