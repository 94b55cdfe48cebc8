"""Other people's checkpoints: read any file without running it, and find the state dicts in it.

Reading never executes code from a file. PyTorch's own restricted loader (`weights_only`) does the work for its own
containers, `restricted.py` for those that it refuses or does not know: tar archives of torch before 0.1.10, and plain
pickles (Caffe2). Classes that neither knows (an argparse.Namespace, a config object) are replaced by inert stand-ins,
so that the tensors beside them load.
"""

import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.errors import OdcftError
from odcft.renames import combined
from odcft.restricted import Refused, StandIn, load_pickle, load_tar, numpy_globals, stand_in

_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER, as it is pickled
DEPTH = 12  # of nested dicts and lists that are looked into


@dataclass
class Contents:
    """What a checkpoint file holds."""

    path: Path
    container: str  # "torch", "torch tar", "pickle", "safetensors"
    state_dicts: dict[str, dict[str, Tensor]]  # by their path in the file, "" for the file itself
    names: list[str] = field(default_factory=list)  # all keys on the way to them
    hints: list[str] = field(default_factory=list)  # strings that may name an architecture
    config: dict[str, Any] = field(default_factory=dict)  # of a timm folder, or what `odcft pretext` says of its input
    replaced: list[str] = field(default_factory=list)  # classes in it that were not loaded


def read(path: Path) -> Contents:
    """Read a checkpoint, whatever its name ends with: torch's files of any age, pickles of numpy arrays (Caffe2),
    safetensors, or a timm folder (config.json + model.safetensors).

    Raises:
        OdcftError: no such file, not a checkpoint (and what it is instead), or no tensors in it.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise OdcftError(
            f"{path}: no such checkpoint. Give a file, a timm folder, a RUN, or a name such as timm:resnet18."
        )
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    if not start:
        raise OdcftError(f"{path} is empty (0 bytes). Was the download interrupted?")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise OdcftError(
            f"{path} is an HTML page, not a checkpoint "
            f"(it starts with {start.lstrip()[:15].decode(errors='replace')!r}). Was the download refused?"
        )
    if start.startswith(b"version https://git-lfs"):
        raise OdcftError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")

    container = _container(path, start)
    replaced: list[str] = []
    config: dict[str, Any] = {}
    try:
        if container == "safetensors":
            tree, config = _load_safetensors(path)
        elif container == "torch tar":
            tree = load_tar(path, replaced)
        elif container == "pickle":
            tree = load_pickle(path, replaced)
        else:
            tree = _load_torch(path, replaced)
    except Refused as refused:
        raise OdcftError(
            f"{path} asks to run code when it is opened ({refused}); odcft does not. "
            "Ask whoever made it for a plain state dict."
        ) from None
    except MemoryError:
        raise OdcftError(f"{path} asks for more memory than there is. Is it damaged?") from None
    state_dicts = {where: combined(tensors) for where, tensors in _state_dicts(tree, "")}
    if not state_dicts:
        raise OdcftError(f"{path} holds no tensors with names, so there is no backbone in it.")
    metadata = getattr(tree, "_metadata", None)
    words = metadata.get("odcft") if isinstance(metadata, dict) else None
    config = config or _our_words(words) or _our_input(tree)
    return Contents(path, container, state_dicts, list(_names(tree)), list(_hints(tree)), config, sorted(set(replaced)))


def _our_words(words: Any) -> dict[str, Any]:
    """What `odcft export` wrote beside the tensors of a file, in the words of a timm folder."""
    if not (isinstance(words, dict) and {"architecture", "arch_args", "input"} <= set(words)):
        return {}
    return {
        "architecture": words["architecture"],
        "model_args": json.loads(words["arch_args"]),
        "odcft": {"input": json.loads(words["input"])},
    }


def _our_input(tree: Any) -> dict[str, Any]:
    """What `odcft pretext` wrote of the network's input, in the words of a timm folder."""
    if not (isinstance(tree, dict) and isinstance(tree.get("input"), str) and {"size", "mean", "std"} <= set(tree)):
        return {}
    told = {k: tree[k] for k in ("size", "mean", "std", "intensity") if k in tree}
    return {"odcft": {"input": told | {"color": tree["input"]}}}


def _read_folder(folder: Path) -> Contents:
    config_file = folder / "config.json"
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "model.bin")
    weights = next((folder / name for name in names if (folder / name).exists()), None)
    if weights is None or not config_file.exists():
        raise OdcftError(
            f"{folder} is a folder without config.json and model.safetensors, "
            "so it is neither a timm folder nor a finished RUN."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (ValueError, AssertionError):
        raise OdcftError(f"{config_file} is damaged: it is no JSON object.") from None
    contents = read(weights)
    contents.path = folder
    if isinstance(config.get("architecture"), str):
        contents.config = config
    elif (folder / "preprocessor_config.json").exists():  # of Hugging Face's transformers
        with suppress(ValueError, KeyError, TypeError):
            about = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            contents.config = {"pretrained_cfg": {"mean": about["image_mean"], "std": about["image_std"]}}
    return contents


def _container(path: Path, start: bytes) -> str:
    if len(start) > 9 and int.from_bytes(start[:8], "little") < 1 << 32 and start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        _refuse_inflated(path)
        return "torch"
    if tarfile.is_tarfile(path):
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
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # cut or damaged: said by the loader
    if inflated > 2 * path.stat().st_size + (1 << 20):
        raise OdcftError(
            f"{path} is a zip archive that swells to {inflated:,} bytes, which no checkpoint of PyTorch does. "
            "Is it the right file?"
        )


def _load_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    """The tensors, and what `odcft export` wrote beside them, in the words of a timm folder."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            words = file.metadata() or {}
        return load_file(path), _our_words(words)
    except SafetensorError as error:
        raise OdcftError(f"{path} is a damaged safetensors file ({error}). Copy or download it again.") from None


def _load_torch(path: Path, replaced: list[str]) -> Any:
    stand_ins: dict[str, type] = {}
    while True:
        try:
            known = [*numpy_globals(), *((cls, name) for name, cls in stand_ins.items())]
            with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            replaced += stand_ins
            return tree
        except (Refused, MemoryError):
            raise
        except Exception as error:  # torch raises many kinds for a file that is no checkpoint
            wanted = re.search(r"(?:GLOBAL|class|global) ([\w.]+) was not an allowed global", str(error))
            blocked = re.search(r"([\w.]+) whose module [\w.]+ is blocked", str(error))
            if blocked:
                raise Refused(blocked.group(1)) from None
            name = wanted.group(1) if wanted else ""
            name = f"builtins.{name}" if name and "." not in name else name
            if name and name not in stand_ins and len(stand_ins) < 200:
                stand_ins[name] = stand_in(name)
                continue
            if name:
                raise Refused(name) from None
            raise OdcftError(
                f"{path} is not a checkpoint that PyTorch or safetensors can read. Is it complete, and the right file?"
            ) from None


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


def _module_tensors(module: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The state dict of a network that was pickled whole."""
    tensors: dict[str, Any] = {}
    for group in ("_parameters", "_buffers"):
        tensors |= {k: v for k, v in dict(module.get(group) or {}).items() if isinstance(v, Tensor)}
    for name, inner in dict(module.get("_modules") or {}).items():
        if isinstance(inner, StandIn) and depth < 4 * DEPTH:
            tensors |= {f"{name}.{key}": value for key, value in _module_tensors(vars(inner), depth + 1).items()}
    return tensors


def _state_dicts(tree: Any, path: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tree = _inner(tree)
    if isinstance(tree, list | tuple):
        tree = {str(place): value for place, value in enumerate(tree)} if len(tree) < 100 else {}
    if not isinstance(tree, Mapping) or depth > DEPTH:
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(key, str) and not isinstance(value, Tensor):
            yield from _state_dicts(value, f"{path}/{key}".lstrip("/"), depth + 1)


def _names(tree: Any, depth: int = 0) -> Iterator[str]:
    """Keys of the dicts around the state dicts."""
    tree = _inner(tree)
    if isinstance(tree, Mapping) and depth < 4:
        for key, value in tree.items():
            if isinstance(key, str) and not (isinstance(value, Tensor) and depth):
                yield key
            yield from _names(value, depth + 1)


def _hints(tree: Any, depth: int = 0) -> Iterator[str]:
    """Values of fields that name an architecture, wherever they are."""
    tree = _inner(tree)
    if isinstance(tree, Mapping) and depth < 5:
        for key, value in tree.items():
            if key in ("arch", "architecture", "model", "model_name", "backbone", "network") and isinstance(value, str):
                yield value
            elif isinstance(value, Mapping | StandIn):
                yield from _hints(value, depth + 1)
