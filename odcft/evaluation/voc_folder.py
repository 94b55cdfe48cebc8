"""Labels of a PASCAL VOC folder (VOCdevkit/VOC2007): which classes are in each image, and which only as difficult ones.

XML comes from strangers: a document type, through which entities are declared, is refused, nothing is fetched, and the
size, depth and number of objects are bounded.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from odcft.data.image_files import ENDINGS, read_file
from odcft.data.images import Images
from odcft.data.names import Names
from odcft.errors import OdcftError

FOLDERS = ("Annotations", "ImageSets", "JPEGImages")
TRAIN, TEST = ("trainval", "train"), ("test", "val")  # names of the lists, the best first
MAX_XML = 1 << 20  # bytes; those of VOC have a few thousand
MAX_DEPTH = 32
MAX_LIST = 1 << 28  # bytes


@dataclass
class LabelledSet:
    """Images with the classes that each has, and those of which it has only difficult objects.

    `no_labels` is what to say if not one has a label, where the images alone do not tell.
    """

    name: str
    images: Images
    present: list[list[str]]
    difficult: list[list[str]]
    no_labels: str = ""


def find_voc_folder(data: str) -> Path | None:
    """The folder with FOLDERS: `data` itself, or the only one in it whose name starts with VOC; None for other data.

    Raises:
        OdcftError: there are several.
    """
    try:
        if _is_voc(Path(data)):
            return Path(data)
        inside = sorted(one for one in Path(data).glob("VOC*") if _is_voc(one))
    except (OSError, ValueError):  # ValueError: of a path with a NUL byte
        return None
    if len(inside) > 1:
        raise OdcftError(
            f"{data} holds several VOC folders: {', '.join(one.name for one in inside)}. Name one of them."
        )
    return inside[0] if inside else None


def load_voc_sets(folder: Path, for_test: bool = False) -> list[LabelledSet]:
    """The images to train and to test on: those of the lists trainval and test (or train and val) of ImageSets/Main.

    Args:
        folder: with FOLDERS.
        for_test: return the test list alone (for --test).

    Returns:
        Both sets; or one, if there is only one list, or it is all that is asked for.

    Raises:
        OdcftError: no list, a list or an annotation that cannot be read.
    """
    main = folder / "ImageSets" / "Main"
    train, test = (
        next((main / f"{name}.txt" for name in names if (main / f"{name}.txt").is_file()), None)
        for names in (TRAIN, TEST)
    )
    if train is not None and test is not None and (train.stem, test.stem) == ("trainval", "val"):
        test = None  # trainval contains val
    lists = [one for one in ((test or train,) if for_test else (train, test)) if one is not None]
    if not lists:
        raise OdcftError(f"{main} has none of the lists {', '.join(f'{name}.txt' for name in TRAIN + TEST)}.")
    files = _image_files(folder)
    return [_load(folder, one, files) for one in lists]


def parse_annotation(xml: bytes) -> tuple[list[str], list[str]]:
    """The classes of the objects in an annotation: those of any object that is not difficult, and the others.

    Raises:
        ValueError: not XML, with a document type, or too large.
    """
    if len(xml) > MAX_XML:
        raise ValueError(f"{len(xml):,} bytes are more than the {MAX_XML:,} of an annotation")
    objects: list[dict[str, str]] = []
    path: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type, which annotations do not have")

    def start(tag: str, _: dict[str, str]) -> None:
        path.append(tag)
        if len(path) > MAX_DEPTH:
            raise ValueError(f"its elements are nested more than {MAX_DEPTH} deep")
        if path[1:] == ["object"]:
            objects.append(defaultdict(str))

    def text(part: str) -> None:
        if len(path) == 3 and path[1] == "object":  # the name of the object, not of its parts
            objects[-1][path[2]] += part

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler = refuse, refuse
    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda tag: path.pop()
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: of an unknown encoding
        raise ValueError(str(error)) from None
    names = {one["name"].strip() for one in objects} - {""}
    certain = {one["name"].strip() for one in objects if one["difficult"].strip() != "1"} - {""}
    return sorted(certain), sorted(names - certain)


def _is_voc(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS)


def _image_files(folder: Path) -> dict[str, str]:
    """The file of each image by its name without the ending."""
    names = sorted(one.name for one in (folder / "JPEGImages").iterdir() if one.name.lower().endswith(ENDINGS))
    return {Path(name).stem: name for name in reversed(names)}


def _load(folder: Path, path: Path, files: dict[str, str]) -> LabelledSet:
    """The images that a list names. One that has no file is among them, as one that cannot be read."""
    try:
        if path.stat().st_size > MAX_LIST:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for a list")
        ids = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise OdcftError(f"{path} cannot be read: {error}.") from None
    ids = list(dict.fromkeys(ids))
    if not ids:
        raise OdcftError(f"{path} lists no images.")
    if odd := next((one for one in ids if not re.fullmatch(r"[^/\\\0]+", one) or one in (".", "..")), None):
        raise OdcftError(f"{path} lists {odd!r}, which is not the name of an image in JPEGImages.")
    labels = [_labels(folder / "Annotations" / f"{one}.xml") for one in ids]
    names = [f"JPEGImages/{files.get(one, f'{one}.jpg')}" for one in ids]
    present, difficult = [one for one, _ in labels], [one for _, one in labels]
    images, empty = Images(folder, folder, Names(names)), "no labels: its annotations name no objects"
    return LabelledSet(f"{folder} ({path.stem})", images, present, difficult, empty)


def _labels(path: Path) -> tuple[list[str], list[str]]:
    """The classes in an annotation; none if there is no such file, so that its image counts as unlabelled."""
    try:
        return parse_annotation(read_file(str(path)))
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, OdcftError) as error:
        raise OdcftError(
            f"{path} is not an annotation of VOC: {str(error).rstrip('.')}. "
            "Restore it, or take its image off the lists."
        ) from None
