"""The containers that checkpoints come in, told by their first bytes and read without running any code in them.

PyTorch's own restricted loader (`weights_only`) reads PyTorch's files; `safe_unpickle.py` reads what PyTorch refuses or
does not know: tar archives of torch before 0.1.10, and plain pickles (Caffe2). Classes that neither knows (an
argparse.Namespace, a config object) are replaced by inert stand-ins, so that the tensors beside them still load.
"""

import re
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from odcft.backbone.checkpoint_metadata import Metadata, from_exported_fields
from odcft.backbone.numpy_archives import is_npz, load_npz
from odcft.backbone.pickle_work import (
    MAX_INSTRUCTIONS,
    TooMuchWork,
    refuse_excessive_work,
    refuse_excessive_work_in_file,
)
from odcft.backbone.safe_unpickle import DangerousGlobal, load_pickle, load_tar, numpy_globals, stand_in
from odcft.backbone.torchscript_archives import is_torchscript, load_torchscript
from odcft.errors import OdcftError
from odcft.text import short_repr

# More than any checkpoint needs, and little enough to be checked in seconds.
MAX_ZIP_MEMBERS = 200_000  # files in a zip archive
ZIP_ENTRY_BYTES = 46  # of the shortest entry in a zip archive's directory
MAX_HEADER_BYTES = 32 << 20  # before the tensors of a safetensors file
MAX_STAND_INS = 200  # unknown classes in a file of PyTorch's
LEGACY_PICKLES = 5  # in a file of torch before 1.6: magic number, protocol, system information, tree, storage keys

ZIP_MAGIC = b"PK\x03\x04"
ZIP_END = b"PK\x05\x06"
ZIP64_LOCATOR = b"PK\x06\x07"


def detect_container(path: Path, start: bytes) -> str:
    """What kind of file it is, by its first bytes: torch, torch tar, torchscript, pickle, safetensors or npz.

    Raises:
        OdcftError: it is a zip archive that is damaged, or grows when it is opened.
    """
    if len(start) > 9 and int.from_bytes(start[:8], "little") < 1 << 32 and start[8:9] == b"{":
        return "safetensors"
    if start.startswith(ZIP_MAGIC):
        _refuse_zip_bomb(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return "npz" if is_npz(names) else "torchscript" if is_torchscript(names) else "torch"
    if start[257:262] == b"ustar":
        return "torch tar"
    # torch's files before 1.6 start with a pickled magic number; any other pickle was written by other code.
    if (
        start[:1] == b"\x80"
        and start[1:2] in b"\x02\x03\x04\x05"
        and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" not in start[:20]
    ):
        return "pickle"
    return "torch"


def load_container(path: Path, container: str, replaced: list[str]) -> tuple[Any, Metadata]:
    """Load what a file holds; for a safetensors file also what `odcft export` wrote beside the tensors.

    Args:
        path: the file.
        container: what `detect_container` says of it.
        replaced: the names of classes that are replaced by stand-ins are added to it.

    Raises:
        OdcftError, DangerousGlobal, TooMuchWork, MemoryError: it is damaged, or must not be loaded.
    """
    if container == "safetensors":
        return _load_safetensors(path)
    if container == "torch tar":
        return load_tar(path, replaced), Metadata()
    if container == "pickle":
        return load_pickle(path, replaced), Metadata()
    if container == "npz":
        return load_npz(path), Metadata()
    if container == "torchscript":
        return load_torchscript(path), Metadata()
    return _load_torch(path, replaced), Metadata()


def load_torch(path: Path) -> Any:
    """Load what torch wrote into a file, and refuse every other container.

    Raises:
        OdcftError, DangerousGlobal, TooMuchWork, MemoryError, OSError: torch did not write the file, or it cannot or
            must not be loaded.
    """
    with path.open("rb") as file:
        container = detect_container(path, file.read(512))
    if container != "torch":
        raise _not_a_checkpoint(path)
    return _load_torch(path, [])


def _load_torch(path: Path, replaced: list[str]) -> Any:
    """Load a file of torch's, with stand-ins for classes that are not allowed; their names are added to `replaced`."""
    instructions = _count_instructions(path)
    stand_ins: dict[str, type] = {}
    while True:
        try:
            known = [*numpy_globals(), *((cls, name) for name, cls in stand_ins.items())]
            with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            replaced += stand_ins
            return tree
        except (DangerousGlobal, MemoryError):
            raise
        except RecursionError:
            raise TooMuchWork from None
        except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
            name = _refused_global(error)
            if not name:
                raise _not_a_checkpoint(path) from None
            if name in stand_ins or len(stand_ins) >= MAX_STAND_INS:
                raise DangerousGlobal(name) from None
            stand_ins[name] = stand_in(name)
            if len(stand_ins) * instructions > 4 * MAX_INSTRUCTIONS:  # the pickle is run again for each of them
                raise TooMuchWork from None


def _count_instructions(path: Path) -> int:
    """How many instructions the pickles in a file of torch's have.

    Raises:
        TooMuchWork, MemoryError: loading them would take too much time or memory.
        OdcftError: torch did not write the file.
    """
    try:
        if _is_zip(path):
            return refuse_excessive_work(BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))
        return refuse_excessive_work_in_file(path, pickles=LEGACY_PICKLES)
    except (TooMuchWork, MemoryError):
        raise
    except Exception:  # torch's reader and the look at the pickle raise many kinds
        raise _not_a_checkpoint(path) from None


def _refused_global(error: Exception) -> str:
    """The dotted name of the class that torch's loader refused, from its message; "" if it failed otherwise.

    Raises:
        DangerousGlobal: torch blocks the whole module.
    """
    if blocked := re.search(r"([\w.]+) whose module [\w.]+ is blocked", str(error)):
        raise DangerousGlobal(blocked.group(1)) from None
    refused = re.search(r"(?:GLOBAL|class|global) ([\w.]+) was not an allowed global", str(error))
    name = refused.group(1) if refused else ""
    return f"builtins.{name}" if name and "." not in name else name


def _load_safetensors(path: Path) -> tuple[Any, Metadata]:
    """The tensors of a file, and what `odcft export` wrote beside them."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise OdcftError(
            f"{path} is a damaged safetensors file (its header has {header:,} bytes). Copy or download it again."
        )
    try:
        with safe_open(path, "pt") as file:
            fields = file.metadata() or {}
        return load_file(path), from_exported_fields(fields)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = short_repr(str(error), 100, quotes=False)
        raise OdcftError(f"{path} is a damaged safetensors file ({reason}). Copy or download it again.") from None


def _refuse_zip_bomb(path: Path) -> None:
    """Refuse an archive that grows when it is opened: torch stores tensors uncompressed, so it wrote none like that."""
    size, place = _zip_directory(path)
    if size // ZIP_ENTRY_BYTES > MAX_ZIP_MEMBERS:
        raise OdcftError(f"{path} is a zip archive of {size // ZIP_ENTRY_BYTES:,} files, far more than PyTorch writes.")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if archive.start_dir != place:
                raise zipfile.BadZipFile  # PyTorch would read another directory than the one checked here
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError):
        raise _not_a_checkpoint(path) from None  # PyTorch is less strict, and would open what was not checked
    if unpacked > 2 * path.stat().st_size + (1 << 20):
        raise OdcftError(
            f"{path} is a zip archive that unpacks to {unpacked:,} bytes, which no checkpoint of PyTorch does. "
            "Is it the right file?"
        )


def _zip_directory(path: Path) -> tuple[int, int]:
    """The size of a zip archive's directory in bytes, and the offset PyTorch will look for it at.

    Only the end of the archive is read, no entry of the directory.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        tail = file.read()
        end = tail.rfind(ZIP_END)
        if end < 0 or len(tail) < end + 22:
            return 0, -1  # the file is cut off
        size, place = (int.from_bytes(tail[end + at : end + at + 4], "little") for at in (12, 16))
        if tail[end - 20 : end - 16] == ZIP64_LOCATOR:
            record = int.from_bytes(tail[end - 12 : end - 4], "little")
            if record != path.stat().st_size - len(tail) + end - 76:  # every writer puts it right before the locator
                return 0, -1
            file.seek(record)
            words = file.read(56)
            size, place = (int.from_bytes(words[at : at + 8], "little") for at in (40, 48))
    return min(size, path.stat().st_size), place


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ZIP_MAGIC


def _not_a_checkpoint(path: Path) -> OdcftError:
    return OdcftError(
        f"{path} is not a checkpoint that PyTorch or safetensors can read. Is it complete, and the right file?"
    )
