"""Read other people's checkpoint files without running any code in them, and find the state dicts they hold.

PyTorch's own restricted loader (`weights_only`) reads PyTorch's files; `safe_unpickle.py` reads what PyTorch refuses or
does not know: tar archives of torch before 0.1.10, and plain pickles (Caffe2). Classes that neither knows (an
argparse.Namespace, a config object) are replaced by inert stand-ins, so that the tensors beside them still load.
"""

import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.checkpoint_metadata import (
    Metadata,
    from_exported_fields,
    from_preprocessor_config,
    from_pretext_checkpoint,
    from_timm_config,
)
from odcft.backbone.numpy_archives import is_npz, load_npz
from odcft.backbone.open_clip_folder import from_open_clip_config
from odcft.backbone.original_layouts import layout_of, told_arguments
from odcft.backbone.safe_unpickle import (
    MAX_INSTRUCTIONS,
    DangerousGlobal,
    StandIn,
    TooMuchWork,
    load_pickle,
    load_tar,
    numpy_globals,
    refuse_excessive_work,
    refuse_excessive_work_in_file,
    stand_in,
)
from odcft.backbone.tensor_renames import merge_split_tensors
from odcft.backbone.torchscript_archives import is_torchscript, load_torchscript
from odcft.backbone.transformers_folder import find_twin
from odcft.backbone.transformers_twins import FAMILIES
from odcft.backbone.unfinished_runs import why_no_backbone
from odcft.backbone.weight_files import weight_files
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.text import short_repr

MAX_DEPTH = 12  # of nested dicts and lists that are searched

# More than any checkpoint needs, and little enough to be checked in seconds.
MAX_TENSORS = 30_000  # named tensors
MAX_NAME_LENGTH = 300  # characters of a tensor's name
MAX_NAME_LEVELS = 40  # dots in a tensor's name
MAX_ZIP_MEMBERS = 200_000  # files in a zip archive
ZIP_ENTRY_BYTES = 46  # of the shortest entry in a zip archive's directory
MAX_HEADER_BYTES = 32 << 20  # before the tensors of a safetensors file
MAX_HINTS = 20  # strings that may name an architecture
MAX_STAND_INS = 200  # unknown classes in a file of PyTorch's
LEGACY_PICKLES = 5  # in a file of torch before 1.6: magic number, protocol, system information, tree, storage keys

ZIP_MAGIC = b"PK\x03\x04"
ZIP_END = b"PK\x05\x06"
ZIP64_LOCATOR = b"PK\x06\x07"

# A dict in a file: its path, whether only dicts lead to it (no lists or objects), and the dict itself.
FoundDict = tuple[str, bool, Mapping[Any, Any]]


@dataclass
class Contents:
    """What a checkpoint file holds."""

    path: Path
    container: str  # "torch", "torch tar", "torchscript", "pickle", "safetensors", "npz"
    state_dicts: dict[str, dict[str, Tensor]]  # by their path in the file, "" for the file itself
    outer_keys: list[str] = field(default_factory=list)  # keys of the dicts around them
    arch_hints: list[str] = field(default_factory=list)  # strings that may name an architecture
    metadata: Metadata = field(default_factory=Metadata)  # what the file says about its network
    replaced_classes: list[str] = field(default_factory=list)  # replaced by stand-ins
    told_arguments: dict[str, Any] = field(default_factory=dict)  # of the network, that only the layout tells
    layout: str = ""  # of `original_layouts.LAYOUTS`, if the file has one
    unusable: list[str] = field(default_factory=list)  # names of tensors no network holds: sparse, quantized, complex


def read(path: Path, merge: Callable[[dict[str, Tensor]], dict[str, Tensor]] = merge_split_tensors) -> Contents:
    """Read a checkpoint, whatever its extension.

    That is a file of any version of torch, a pickle of numpy arrays (Caffe2), an archive of them (JAX), a safetensors
    file, or a folder (config.json and model.safetensors).

    Args:
        path: the file or folder.
        merge: what puts tensors together that timm's networks hold as one; applied to each state dict.

    Raises:
        OdcftError: the path does not exist, is not a checkpoint (the message says what it is), or has no tensors.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise OdcftError(
                f"{path}: no such checkpoint. Give a file, a timm folder, a RUN, or a name such as timm:resnet18."
            )
        if not path.is_file():
            raise OdcftError(f"{path} is neither a file nor a folder, so it is not a checkpoint.")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    _refuse_other_files(path, start)

    container = _detect_container(path, start)
    tree, dicts, metadata, replaced = _load(path, container)
    unusable: list[str] = []
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for where, _, inner in dicts:
        if tensors := _usable_tensors(inner, path, unusable):
            state_dicts[where] = tensors
    if sum(map(len, state_dicts.values())) > MAX_TENSORS:
        raise OdcftError(f"{path} holds more than {MAX_TENSORS:,} named tensors, far more than any network.")
    if not state_dicts:
        raise OdcftError(f"{path} holds no named tensors, so there is no backbone in it.")
    if container != "safetensors":
        metadata = _metadata_of_tree(tree)
    if metadata.arguments.get("use_shared_rel_pos_bias"):
        merge = dict  # timm's network has one table of positions too, so it is not spread over the blocks
    return Contents(
        path=path,
        container=container,
        state_dicts={where: merge(tensors) for where, tensors in state_dicts.items()},
        outer_keys=_outer_keys(dicts),
        arch_hints=_arch_hints(dicts),
        metadata=metadata,
        replaced_classes=sorted(set(replaced)),
        layout=next(filter(None, map(layout_of, state_dicts.values())), ""),
        told_arguments=next(filter(None, map(told_arguments, state_dicts.values())), {}),
        unusable=unusable,
    )


def _refuse_other_files(path: Path, start: bytes) -> None:
    """Refuse what is often saved in place of a checkpoint: an empty file, an HTML page, a pointer of Git LFS."""
    if not start:
        raise OdcftError(f"{path} is empty (0 bytes). Was the download interrupted?")
    text = start.lstrip()
    if text[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise OdcftError(
            f"{path} is an HTML page, not a checkpoint "
            f"(it starts with {short_repr(text[:15].decode(errors='replace'))}). Was the download refused?"
        )
    if start.startswith(b"version https://git-lfs"):
        raise OdcftError(f"{path} is a Git LFS pointer, not the file itself. Fetch the file with `git lfs pull`.")


def _load(path: Path, container: str) -> tuple[Any, list[FoundDict], Metadata, list[str]]:
    """Load a file: its tree, all dicts in it, a safetensors file's metadata, and the classes that were replaced."""
    replaced: list[str] = []
    metadata = Metadata()
    try:
        if container == "safetensors":
            tree, metadata = _load_safetensors(path)
        elif container == "torch tar":
            tree = load_tar(path, replaced)
        elif container == "pickle":
            tree = load_pickle(path, replaced)
        elif container == "npz":
            tree = load_npz(path)
        elif container == "torchscript":
            tree = load_torchscript(path)
        else:
            tree = _load_torch(path, replaced)
        return tree, list(_find_dicts(tree)), metadata, replaced
    except DangerousGlobal as name:
        raise OdcftError(
            f"{path} tries to run code when it is opened ({name}); odcft does not run it. "
            "Ask whoever made it for a plain state dict."
        ) from None
    except (TooMuchWork, MemoryError):
        raise OdcftError(
            f"{path} would take far more time or memory to load than a file of its size should, so it is refused."
        ) from None


def _metadata_of_tree(tree: Any) -> Metadata:
    """What `odcft export --format torchvision` or `odcft pretext` wrote beside the tensors."""
    metadata = getattr(tree, "_metadata", None)
    exported = metadata.get("odcft") if isinstance(metadata, dict) else None
    return from_exported_fields(exported) if isinstance(exported, dict) else from_pretext_checkpoint(tree)


def _read_folder(folder: Path) -> Contents:
    """Read a folder of timm's, of Hugging Face's transformers, or a backbone that odcft wrote."""
    config_file, open_clip = folder / "config.json", folder / "open_clip_config.json"
    files = weight_files(folder)
    if files and open_clip.exists() and (files[0].name.startswith("open_clip") or not config_file.exists()):
        contents = read(files[0])
        contents.path, contents.metadata = folder, from_open_clip_config(open_clip, read_json(open_clip))
        return contents
    if not files or not config_file.exists():
        raise OdcftError(
            why_no_backbone(folder)
            or f"{folder} is a folder without config.json and model.safetensors, "
            "so it is neither a timm folder nor a RUN."
        )
    config = read_json(config_file)
    contents = _read_parts(files)
    contents.path = folder
    if "architecture" in config or isinstance(config.get("odcft"), dict):
        contents.metadata = from_timm_config(config)
    else:
        _read_transformers_folder(folder, config, contents)
        if contents.metadata.architecture is not None:
            return contents
    if not contents.metadata.arguments.get("use_shared_rel_pos_bias"):
        contents.state_dicts = {where: merge_split_tensors(tensors) for where, tensors in contents.state_dicts.items()}
    return contents


def _read_parts(files: list[Path]) -> Contents:
    """Read the files that hold the weights of one network; tensors that belong together are still apart."""
    contents = read(files[0], merge=dict)
    for file in files[1:]:
        more = read(file, merge=dict)
        for where, tensors in more.state_dicts.items():
            whole = contents.state_dicts.setdefault(where, {})
            if twice := next((name for name in tensors if name in whole), None):
                raise OdcftError(f"{file} holds {short_repr(twice)}, which another part of the weights holds as well.")
            whole |= tensors
        contents.unusable += more.unusable
        if sum(map(len, contents.state_dicts.values())) > MAX_TENSORS:
            raise OdcftError(f"{file.parent} holds more than {MAX_TENSORS:,} named tensors, far more than any network.")
    return contents


def _read_transformers_folder(folder: Path, config: dict[str, Any], contents: Contents) -> None:
    """Follow config.json and preprocessor_config.json as Hugging Face's transformers writes them."""
    preprocessor = folder / "preprocessor_config.json"
    metadata = from_preprocessor_config(read_json(preprocessor)) if preprocessor.exists() else Metadata()
    contents.metadata = metadata
    if (tensors := contents.state_dicts.get("")) and (twin := find_twin(folder, config, tensors)):
        contents.state_dicts[""] = twin.tensors
        metadata.from_transformers, metadata.notes = True, twin.notes
        metadata.model_type = config["model_type"]
        metadata.architecture, metadata.arguments = twin.arch, twin.arguments
        if twin.fixed_size:  # config.json says it; preprocessor_config.json may mean images of another size
            metadata.cfg.pop("input_size", None)
        if "mean" not in metadata.cfg:
            metadata.notes.append(
                f"without a preprocessor_config.json that tells mean and std, they are those of timm's {twin.arch}; "
                "if they were others, pass --set data.mean=[…] and data.std=[…]"
            )
    elif isinstance(kind := config.get("model_type"), str):
        metadata.from_transformers = True
        if kind in FAMILIES:
            return
        metadata.notes.append(
            f"config.json says model_type={short_repr(kind)}, which odcft has no table for: the network was found by "
            "its tensors alone, and activations, epsilons and padding are taken to be timm's"
        )


def _detect_container(path: Path, start: bytes) -> str:
    """Which of `Contents.container` a file is, by its first bytes."""
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


def load_torch(path: Path) -> Any:
    """Load what torch wrote into a file, and refuse every other container.

    Raises:
        OdcftError, DangerousGlobal, TooMuchWork, MemoryError, OSError: torch did not write the file, or it cannot or
            must not be loaded.
    """
    with path.open("rb") as file:
        container = _detect_container(path, file.read(512))
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


def _not_a_checkpoint(path: Path) -> OdcftError:
    return OdcftError(
        f"{path} is not a checkpoint that PyTorch or safetensors can read. Is it complete, and the right file?"
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ZIP_MAGIC


def _held_by(tree: Any) -> Any:
    """What an object holds: a pickled network's state dict, the attributes of a stand-in, or anything else as it is."""
    if isinstance(tree, StandIn):
        tree = vars(tree)
        if "_parameters" in tree and "_modules" in tree:
            return _module_tensors(tree)
    return tree


def _module_tensors(module: Mapping[str, Any], made: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The state dict of a network that was pickled whole.

    Args:
        module: its attributes.
        made: tensors of the modules met so far, by id: a module may be used in several places.
    """
    made = {} if made is None else made
    tensors: dict[str, Any] = {}
    for group in ("_parameters", "_buffers"):
        tensors |= {name: tensor for name, tensor in _named_items(module, group) if isinstance(tensor, Tensor)}
    for name, inner in _named_items(module, "_modules"):
        if isinstance(inner, StandIn) and len(made) < MAX_TENSORS:
            if id(inner) not in made:
                made[id(inner)] = {}  # ends the recursion where a module contains itself
                made[id(inner)] = _module_tensors(vars(inner), made)
            tensors |= {f"{name}.{key}": value for key, value in made[id(inner)].items()}
        if len(tensors) > MAX_TENSORS:
            raise TooMuchWork
    return tensors


def _named_items(module: Mapping[str, Any], group: str) -> list[tuple[str, Any]]:
    """The items of a module's `_parameters`, `_buffers` or `_modules` whose names are text."""
    items = module.get(group)
    return [(name, one) for name, one in items.items() if isinstance(name, str)] if isinstance(items, Mapping) else []


def _find_dicts(tree: Any) -> Iterator[FoundDict]:
    """Every dict in a file, each once."""
    least_depth: dict[int, int] = {}  # at which an object was met, by its id
    kept: list[Any] = []  # objects made here: kept alive so that no other gets the same id

    def walk(tree: Any, path: str, depth: int, plain: bool) -> Iterator[FoundDict]:
        if depth > MAX_DEPTH or least_depth.get(id(tree), MAX_DEPTH + 1) <= depth:
            return
        first, least_depth[id(tree)] = id(tree) not in least_depth, depth
        inner = _held_by(tree)
        kept.append(inner)
        if isinstance(inner, list | tuple):
            inner, plain = ({str(place): value for place, value in enumerate(inner)} if len(inner) < 100 else {}), False
        elif isinstance(inner, Mapping) and first:
            yield path, plain, inner
        if isinstance(inner, Mapping):
            for key, value in inner.items():
                if isinstance(key, str) and isinstance(value, Mapping | list | tuple | StandIn):
                    yield from walk(value, f"{path}/{key[:MAX_NAME_LENGTH]}".lstrip("/"), depth + 1, plain)

    return walk(tree, "", 0, True)


def _usable_tensors(tree: Mapping[Any, Any], path: Path, unusable: list[str]) -> dict[str, Tensor]:
    """The tensors in a dict that a network can hold; names of other tensors are added to `unusable`.

    Raises:
        OdcftError: a name is too long, or a tensor is larger than the file.
    """
    tensors = {}
    for name, tensor in tree.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            continue
        if len(name) > MAX_NAME_LENGTH or name.count(".") > MAX_NAME_LEVELS:
            raise OdcftError(
                f"{path}: a tensor's name has {len(name):,} characters, which no network has: {short_repr(name)}."
            )
        if not _is_plain(tensor):
            unusable.append(name)
            continue
        if tensor.nbytes > 4 * path.stat().st_size + (1 << 20):
            raise OdcftError(
                f"{path} has {path.stat().st_size:,} bytes, but says that {short_repr(name)} in it takes "
                f"{tensor.nbytes:,}. Is it damaged?"
            )
        tensors[name] = tensor.detach()
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense real numbers in memory: not sparse, nested, quantized, complex or without storage."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex():
        return False
    try:
        return tensor.device.type == "cpu" and (not tensor.numel() or tensor.untyped_storage().nbytes() > 0)
    except (NotImplementedError, RuntimeError):
        return False


def _outer_keys(dicts: list[FoundDict]) -> list[str]:
    """Keys of the dicts around the state dicts; of the outermost dict also those of tensors."""
    return [
        key
        for path, plain, tree in dicts
        if plain and path.count("/") < 3
        for key, value in tree.items()
        if isinstance(key, str) and not (isinstance(value, Tensor) and path)
    ]


def _arch_hints(dicts: list[FoundDict]) -> list[str]:
    """Values of fields that usually name an architecture."""
    fields = ("arch", "architecture", "model", "model_name", "backbone", "network")
    found = [
        tree[key]
        for path, plain, tree in dicts
        if plain and path.count("/") < 4
        for key in fields
        if isinstance(tree.get(key), str) and len(tree[key]) < 100
    ]
    return list(dict.fromkeys(found))[:MAX_HINTS]
