"""Read other people's checkpoints: a file, or a folder with a config, with all that it says about its network.

`checkpoint_containers.py` reads what a file holds, without running any code in it; `state_dicts.py` finds the tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from odcft.backbone.checkpoint_containers import detect_container, load_container
from odcft.backbone.checkpoint_metadata import (
    Metadata,
    from_exported_fields,
    from_preprocessor_config,
    from_pretext_checkpoint,
    from_timm_config,
)
from odcft.backbone.open_clip_folder import from_open_clip_config
from odcft.backbone.original_layouts import layout_of, told_arguments
from odcft.backbone.pickle_work import TooMuchWork
from odcft.backbone.safe_unpickle import DangerousGlobal
from odcft.backbone.state_dicts import MAX_TENSORS, FoundDict, arch_hints, find_dicts, outer_keys, usable_tensors
from odcft.backbone.tensor_renames import merge_split_tensors
from odcft.backbone.transformers_folder import find_twin
from odcft.backbone.transformers_twins import FAMILIES
from odcft.backbone.unfinished_runs import why_no_backbone
from odcft.backbone.weight_files import weight_files
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.text import short_repr


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

    container = detect_container(path, start)
    tree, dicts, metadata, replaced = _load(path, container)
    unusable: list[str] = []
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for where, _, inner in dicts:
        if tensors := usable_tensors(inner, path, unusable):
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
        outer_keys=outer_keys(dicts),
        arch_hints=arch_hints(dicts),
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
    try:
        tree, metadata = load_container(path, container, replaced)
        return tree, list(find_dicts(tree)), metadata, replaced
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
