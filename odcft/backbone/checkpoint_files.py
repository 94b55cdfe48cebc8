"""Other people's checkpoints: read any file without running it, and find the state dicts in it.

Reading never executes code from a file. PyTorch's own restricted loader (`weights_only`) does the work for its own
containers, `restricted.py` for those that it refuses or does not know: tar archives of torch before 0.1.10, and plain
pickles (Caffe2). Classes that neither knows (an argparse.Namespace, a config object) are replaced by inert stand-ins,
so that the tensors beside them load.
"""

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.metadata import Description, of_export, of_pretext, of_timm, of_transformers
from odcft.backbone.safe_unpickle import (
    INSTRUCTIONS,
    Endless,
    Refused,
    StandIn,
    load_pickle,
    load_tar,
    numpy_globals,
    refuse_endless,
    refuse_endless_file,
    stand_in,
)
from odcft.backbone.tensor_renames import combined
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.text import brief

DEPTH = 12  # of nested dicts and lists that are looked into

# More than any checkpoint has, and little enough to be looked through in seconds.
TENSORS = 30_000  # with names
NAME = 300  # letters of a tensor's name
LEVELS = 40  # of a tensor's name, between dots
MEMBERS = 200_000  # of a zip archive
ENTRY = 46  # bytes of the shortest in its list
HEADER = 32 << 20  # bytes of what stands before the tensors of a safetensors file
HINTS = 20  # strings that may name an architecture


@dataclass
class Contents:
    """What a checkpoint file holds."""

    path: Path
    container: str  # "torch", "torch tar", "pickle", "safetensors"
    state_dicts: dict[str, dict[str, Tensor]]  # by their path in the file, "" for the file itself
    names: list[str] = field(default_factory=list)  # all keys on the way to them
    hints: list[str] = field(default_factory=list)  # strings that may name an architecture
    told: Description = field(default_factory=Description)  # what it says of itself
    replaced: list[str] = field(default_factory=list)  # classes in it that were not loaded
    strange: list[str] = field(default_factory=list)  # names of tensors that no network has: sparse, quantized


def read(path: Path) -> Contents:
    """Read a checkpoint, whatever its name ends with: torch's files of any age, pickles of numpy arrays (Caffe2),
    safetensors, or a timm folder (config.json + model.safetensors).

    Raises:
        OdcftError: no such file, not a checkpoint (and what it is instead), or no tensors in it.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise OdcftError(
                f"{path}: no such checkpoint. Give a file, a timm folder, a RUN, or a name such as timm:resnet18."
            )
        if not path.is_file():
            raise OdcftError(f"{path} is neither a file nor a folder, so it is no checkpoint.")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    if not start:
        raise OdcftError(f"{path} is empty (0 bytes). Was the download interrupted?")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise OdcftError(
            f"{path} is an HTML page, not a checkpoint "
            f"(it starts with {brief(start.lstrip()[:15].decode(errors='replace'))}). Was the download refused?"
        )
    if start.startswith(b"version https://git-lfs"):
        raise OdcftError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")

    container = _container(path, start)
    replaced: list[str] = []
    told = Description()
    try:
        if container == "safetensors":
            tree, told = _load_safetensors(path)
        elif container == "torch tar":
            tree = load_tar(path, replaced)
        elif container == "pickle":
            tree = load_pickle(path, replaced)
        else:
            tree = _load_torch(path, replaced)
        dicts = list(_dicts(tree))
    except Refused as refused:
        raise OdcftError(
            f"{path} asks to run code when it is opened ({refused}); odcft does not. "
            "Ask whoever made it for a plain state dict."
        ) from None
    except (Endless, MemoryError):
        raise OdcftError(
            f"{path} asks for far more time or memory than a file of its size needs, so it is refused."
        ) from None
    strange: list[str] = []
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for where, _, inner in dicts:
        if tensors := _tensors(inner, path, strange):
            state_dicts[where] = tensors
    if sum(map(len, state_dicts.values())) > TENSORS:
        raise OdcftError(f"{path} holds more than {TENSORS:,} tensors with names, far more than any network.")
    if not state_dicts:
        raise OdcftError(f"{path} holds no tensors with names, so there is no backbone in it.")
    metadata = getattr(tree, "_metadata", None)
    words = metadata.get("odcft") if isinstance(metadata, dict) else None
    if container != "safetensors":
        told = of_export(words) if isinstance(words, dict) else of_pretext(tree)
    return Contents(
        path=path,
        container=container,
        state_dicts={where: combined(tensors) for where, tensors in state_dicts.items()},
        names=_names(dicts),
        hints=_hints(dicts),
        told=told,
        replaced=sorted(set(replaced)),
        strange=strange,
    )


def _read_folder(folder: Path) -> Contents:
    config_file = folder / "config.json"
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "model.bin")
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None or not config_file.exists():
        raise OdcftError(
            f"{folder} is a folder without config.json and model.safetensors, "
            "so it is neither a timm folder nor a finished RUN."
        )
    config = read_json(config_file)
    contents = read(weights)
    contents.path = folder
    if "architecture" in config or isinstance(config.get("odcft"), dict):
        contents.told = of_timm(config)
    elif (folder / "preprocessor_config.json").exists():  # of Hugging Face's transformers
        contents.told = of_transformers(read_json(folder / "preprocessor_config.json"))
    return contents


def _container(path: Path, start: bytes) -> str:
    if len(start) > 9 and int.from_bytes(start[:8], "little") < 1 << 32 and start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        _refuse_inflated(path)
        return "torch"
    if start[257:262] == b"ustar":
        return "torch tar"
    # torch's files before 1.6 begin with a pickled magic number; any other pickle is somebody's own.
    if (
        start[:1] == b"\x80"
        and start[1:2] in b"\x02\x03\x04\x05"
        and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" not in start[:20]
    ):
        return "pickle"
    return "torch"


def _refuse_inflated(path: Path) -> None:
    """torch stores tensors as they are; an archive that swells when opened is none of its own."""
    size, place = _listed(path)
    if size // ENTRY > MEMBERS:
        raise OdcftError(f"{path} is a zip archive of {size // ENTRY:,} files, far more than PyTorch writes.")
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
            if archive.start_dir != place:
                raise zipfile.BadZipFile  # PyTorch would read another list than the one that was looked at
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError):
        raise _no_checkpoint(path) from None  # PyTorch is less strict, so it would open what was not looked at
    if inflated > 2 * path.stat().st_size + (1 << 20):
        raise OdcftError(
            f"{path} is a zip archive that swells to {inflated:,} bytes, which no checkpoint of PyTorch does. "
            "Is it the right file?"
        )


def _listed(path: Path) -> tuple[int, int]:
    """How many bytes the list of a zip archive's files takes, and where PyTorch will look for it: no entry is read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 22:
            return 0, -1  # cut
        size, place = (int.from_bytes(tail[end + at : end + at + 4], "little") for at in (12, 16))
        if tail[end - 20 : end - 16] == b"PK\x06\x07":  # of the 64-bit kind
            about = int.from_bytes(tail[end - 12 : end - 4], "little")
            if about != path.stat().st_size - len(tail) + end - 76:  # right before that, where everybody has it
                return 0, -1
            file.seek(about)
            size, place = (int.from_bytes(words, "little") for words in _pair(file.read(56)[40:56]))
    return min(size, path.stat().st_size), place


def _pair(words: bytes) -> tuple[bytes, bytes]:
    return words[:8], words[8:]


def _load_safetensors(path: Path) -> tuple[Any, Description]:
    """The tensors, and what `odcft export` wrote beside them."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > HEADER:
        raise OdcftError(
            f"{path} is a damaged safetensors file (its header has {header:,} bytes). Copy or download it again."
        )
    try:
        with safe_open(path, "pt") as file:
            words = file.metadata() or {}
        return load_file(path), of_export(words)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        said = brief(str(error), 100, quotes=False)
        raise OdcftError(f"{path} is a damaged safetensors file ({said}). Copy or download it again.") from None


def load_torch(path: Path) -> Any:
    """What torch wrote into a file, of whatever origin, and nothing else.

    Raises:
        OdcftError, Refused, Endless, MemoryError, OSError: it is another kind of file, or none to be opened.
    """
    with path.open("rb") as file:
        container = _container(path, file.read(512))
    if container != "torch":
        raise _no_checkpoint(path)
    return _load_torch(path, [])


def _load_torch(path: Path, replaced: list[str]) -> Any:
    stand_ins: dict[str, type] = {}
    try:
        if _is_zip(path):
            length = refuse_endless(BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))
        else:
            length = refuse_endless_file(
                path, pickles=5
            )  # what torch wrote before 1.6: identity, versions, machine, tree, keys
    except (Endless, MemoryError):
        raise
    except Exception:  # not what torch wrote
        raise _no_checkpoint(path) from None
    while True:
        try:
            known = [*numpy_globals(), *((cls, name) for name, cls in stand_ins.items())]
            with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            replaced += stand_ins
            return tree
        except (Refused, MemoryError):
            raise
        except RecursionError:
            raise Endless from None
        except Exception as error:  # torch raises many kinds for a file that is no checkpoint
            wanted = re.search(r"(?:GLOBAL|class|global) ([\w.]+) was not an allowed global", str(error))
            blocked = re.search(r"([\w.]+) whose module [\w.]+ is blocked", str(error))
            if blocked:
                raise Refused(blocked.group(1)) from None
            name = wanted.group(1) if wanted else ""
            name = f"builtins.{name}" if name and "." not in name else name
            if name and name not in stand_ins and len(stand_ins) < 200:
                stand_ins[name] = stand_in(name)
                if len(stand_ins) * length > 4 * INSTRUCTIONS:  # it is run once more for each of them
                    raise Endless from None
                continue
            if name:
                raise Refused(name) from None
            raise _no_checkpoint(path) from None


def _no_checkpoint(path: Path) -> OdcftError:
    return OdcftError(
        f"{path} is not a checkpoint that PyTorch or safetensors can read. Is it complete, and the right file?"
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _inner(tree: Any) -> Any:
    """What an object holds: a pickled network's parameters under their names, the fields of a stand-in, or itself."""
    if isinstance(tree, StandIn):
        tree = vars(tree)
        if "_parameters" in tree and "_modules" in tree:
            return _module_tensors(tree)
    return tree


def _module_tensors(module: Mapping[str, Any], made: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The state dict of a network that was pickled whole; a layer in it may stand in several places."""
    made = {} if made is None else made
    tensors: dict[str, Any] = {}
    for group in ("_parameters", "_buffers"):
        tensors |= {name: tensor for name, tensor in _items(module, group) if isinstance(tensor, Tensor)}
    for name, inner in _items(module, "_modules"):
        if isinstance(inner, StandIn) and len(made) < TENSORS:
            if id(inner) not in made:
                made[id(inner)] = {}  # a network inside itself has no more
                made[id(inner)] = _module_tensors(vars(inner), made)
            tensors |= {f"{name}.{key}": value for key, value in made[id(inner)].items()}
        if len(tensors) > TENSORS:
            raise Endless
    return tensors


def _items(module: Mapping[str, Any], group: str) -> list[tuple[str, Any]]:
    held = module.get(group)
    return [(name, one) for name, one in held.items() if isinstance(name, str)] if isinstance(held, Mapping) else []


def _dicts(tree: Any) -> Iterator[tuple[str, bool, Mapping[Any, Any]]]:
    """Every dict in a file, each once: its path, whether only dicts lead to it, and the dict."""
    least: dict[int, int] = {}  # depth at which a part of the tree was met
    kept: list[Any] = []  # parts made here, whose ids must not be given to others

    def walk(tree: Any, path: str, depth: int, plain: bool) -> Iterator[tuple[str, bool, Mapping[Any, Any]]]:
        if depth > DEPTH or least.get(id(tree), DEPTH + 1) <= depth:
            return
        first, least[id(tree)] = id(tree) not in least, depth
        inner = _inner(tree)
        kept.append(inner)
        if isinstance(inner, list | tuple):
            inner, plain = ({str(place): value for place, value in enumerate(inner)} if len(inner) < 100 else {}), False
        elif isinstance(inner, Mapping) and first:
            yield path, plain, inner
        if isinstance(inner, Mapping):
            for key, value in inner.items():
                if isinstance(key, str) and isinstance(value, Mapping | list | tuple | StandIn):
                    yield from walk(value, f"{path}/{key[:NAME]}".lstrip("/"), depth + 1, plain)

    return walk(tree, "", 0, True)


def _tensors(tree: Mapping[Any, Any], path: Path, strange: list[str]) -> dict[str, Tensor]:
    """The tensors in a dict that a network can have; the names of others are added to `strange`.

    Raises:
        OdcftError: a name without end, or a tensor that the file is too small for.
    """
    tensors = {}
    for name, tensor in tree.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            continue
        if len(name) > NAME or name.count(".") > LEVELS:
            raise OdcftError(f"{path}: a tensor's name has {len(name):,} letters, which no network has: {brief(name)}.")
        if not _dense(tensor):
            strange.append(name)
            continue
        if tensor.nbytes > 4 * path.stat().st_size + (1 << 20):
            raise OdcftError(
                f"{path} has {path.stat().st_size:,} bytes, and says that {brief(name)} in it takes "
                f"{tensor.nbytes:,}. Is it damaged?"
            )
        tensors[name] = tensor.detach()
    return tensors


def _dense(tensor: Tensor) -> bool:
    """Whether these are plain numbers in memory: not sparse, nested, quantized or complex, nor without contents."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex():
        return False
    try:
        return tensor.device.type == "cpu" and (not tensor.numel() or tensor.untyped_storage().nbytes() > 0)
    except (NotImplementedError, RuntimeError):
        return False


def _names(dicts: list[tuple[str, bool, Mapping[Any, Any]]]) -> list[str]:
    """Keys of the dicts around the state dicts; of the outermost also those of tensors."""
    return [
        key
        for path, plain, tree in dicts
        if plain and path.count("/") < 3
        for key, value in tree.items()
        if isinstance(key, str) and not (isinstance(value, Tensor) and path)
    ]


def _hints(dicts: list[tuple[str, bool, Mapping[Any, Any]]]) -> list[str]:
    """Values of fields that name an architecture, wherever they are."""
    fields = ("arch", "architecture", "model", "model_name", "backbone", "network")
    found = [
        tree[key]
        for path, plain, tree in dicts
        if plain and path.count("/") < 4
        for key in fields
        if isinstance(tree.get(key), str) and len(tree[key]) < 100
    ]
    return list(dict.fromkeys(found))[:HINTS]
