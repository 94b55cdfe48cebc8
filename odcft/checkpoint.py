"""Other people's checkpoints: read any file without running it, find its state dicts, match one to a network.

Reading never executes code from a file. PyTorch's own restricted loader (`weights_only`) does the work; classes it does
not know (an argparse.Namespace, a config object) are replaced by inert stand-ins, so that the tensors beside them load.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.errors import OdcftError

# Where several state dicts hold the same backbone, the one whose path names the better copy wins: the exponential
# average over the live weights, the teacher over the student, the query over the key encoder.
_PREFERRED = ("ema", "teacher", "target_encoder", "encoder_q", "base_encoder", "backbone", "model", "state_dict")
_SECOND_BEST = ("student", "encoder_k", "momentum", "optimizer")


@dataclass
class Match:
    """How a checkpoint covers a network."""

    tensors: dict[str, Tensor]  # by the network's names
    where: str  # path of the state dict in the file, and the prefix of its keys
    expected: int  # tensors the network has
    missing: list[str]  # names of the network the file does not have
    dropped: list[str]  # keys of the same state dict that are no part of the network: heads, copies
    unexpected: list[str]  # keys under the prefix that look like the network's, but have another shape

    @property
    def share(self) -> float:
        """Of the network's tensors, how many were found: 0..1."""
        return len(self.tensors) / max(1, self.expected)


@dataclass
class Contents:
    """What a checkpoint file holds."""

    path: Path
    state_dicts: dict[str, dict[str, Tensor]]  # by their path in the file, "" for the file itself
    hints: list[str] = field(default_factory=list)  # strings that may name an architecture
    config: dict[str, Any] = field(default_factory=dict)  # of a timm folder, or what `odcft pretext` says of its input


def read(path: Path) -> Contents:
    """Read a checkpoint: a file of torch or safetensors, or a timm folder (config.json + model.safetensors).

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

    if _is_safetensors(start):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tree: Any = load_file(path)
        except SafetensorError as error:
            raise OdcftError(f"{path} is a damaged safetensors file ({error}). Copy or download it again.") from None
    else:
        tree = _load_torch(path)
    state_dicts = dict(_state_dicts(tree, ""))
    if not state_dicts:
        raise OdcftError(f"{path} holds no tensors with names, so there is no backbone in it.")
    return Contents(path, state_dicts, list(_hints(tree)), _our_input(tree))


def _our_input(tree: Any) -> dict[str, Any]:
    """What `odcft pretext` wrote of the network's input, in the words of a timm folder."""
    if not (isinstance(tree, dict) and isinstance(tree.get("input"), str) and {"size", "mean", "std"} <= set(tree)):
        return {}
    mean, size = tree["mean"], tree["size"]
    about = {"input_size": [len(mean), size, size], "mean": mean, "std": tree["std"]}
    return {"pretrained_cfg": about, "odcft": {"input": tree["input"]}}


def _read_folder(folder: Path) -> Contents:
    config_file = folder / "config.json"
    weights = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).exists()), None)
    if weights is None or not config_file.exists():
        raise OdcftError(
            f"{folder} is a folder without config.json and model.safetensors, "
            "so it is neither a timm folder nor a finished RUN."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architecture = config["architecture"]
    except (ValueError, KeyError, TypeError):
        raise OdcftError(f"{config_file} does not name an `architecture`, as timm's config.json does.") from None
    contents = read(weights)
    return Contents(folder, contents.state_dicts, [architecture], config)


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 9 and int.from_bytes(start[:8], "little") < 1 << 32 and start[8:9] == b"{"


class _StandIn:
    """Takes the place of a class that the file asks for and we will not import. It holds what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _load_torch(path: Path) -> Any:
    stand_ins: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(cls, name) for name, cls in stand_ins.items()]):  # type: ignore[list-item]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as error:  # torch raises many kinds for a file that is no checkpoint
            wanted = re.search(r"(?:GLOBAL|class|global) ([\w.]+) was not an allowed global", str(error))
            name = wanted.group(1) if wanted else ""
            if name and name not in stand_ins and len(stand_ins) < 100:
                stand_ins[name] = type(name.rsplit(".", 1)[-1], (_StandIn,), {})
                continue
            if "blocked" in str(error) or name:
                raise OdcftError(
                    f"{path} asks to run code when it is opened; odcft does not. "
                    "Ask whoever made it for a plain state dict."
                ) from None
            raise OdcftError(
                f"{path} is not a checkpoint that PyTorch or safetensors can read. Is it complete, and the right file?"
            ) from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _state_dicts(tree: Any, path: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if isinstance(tree, _StandIn):
        tree = vars(tree)
    if not isinstance(tree, Mapping) or depth > 8:
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{path}/{key}".lstrip("/"), depth + 1)


def _hints(tree: Any, depth: int = 0) -> Iterator[str]:
    """Values of fields that name an architecture, wherever they are."""
    if isinstance(tree, _StandIn):
        tree = vars(tree)
    if isinstance(tree, Mapping) and depth < 4:
        for key, value in tree.items():
            if key in ("arch", "architecture", "model", "model_name", "backbone") and isinstance(value, str):
                yield value
            elif isinstance(value, Mapping | _StandIn):
                yield from _hints(value, depth + 1)


def match(contents: Contents, network: Mapping[str, Tensor]) -> Match:
    """The part of a checkpoint that fits a network best, by names and shapes, under any prefix.

    Args:
        contents: of the file.
        network: the network's state dict; only names and shapes are looked at.

    Returns:
        The match, possibly of nothing.
    """
    best: Match | None = None
    best_rank = (-1, -1)
    for path, tensors in contents.state_dicts.items():
        prefixes: dict[str, int] = {}
        for key, tensor in tensors.items():
            for prefix in _prefixes(key):
                own = network.get(key[len(prefix) :])
                if own is not None and own.shape == tensor.shape:
                    prefixes[prefix] = prefixes.get(prefix, 0) + 1
        for prefix, count in prefixes.items():
            rank = (count, _preference(f"{path}/{prefix}"))
            if rank > best_rank:
                best_rank, best = rank, _match_under(path, prefix, tensors, network)
    return best or Match({}, "", len(network), list(network), [], [])


def _match_under(path: str, prefix: str, tensors: dict[str, Tensor], network: Mapping[str, Tensor]) -> Match:
    under = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    found = {name: under[name] for name, own in network.items() if name in under and under[name].shape == own.shape}
    # Checkpoints older than torch 0.4.1 have no batch counters, and nothing needs them.
    counters = any(name.endswith("num_batches_tracked") for name in under)
    expected = [name for name in network if counters or not name.endswith("num_batches_tracked")]
    return Match(
        tensors=found,
        where="/".join(part for part in (path, prefix) if part) or "the file itself",
        expected=len(expected),
        missing=[name for name in expected if name not in found],
        dropped=[key for key in tensors if not (key.startswith(prefix) and key[len(prefix) :] in network)],
        unexpected=[prefix + name for name in under if name in network and name not in found],
    )


def _prefixes(key: str) -> Iterator[str]:
    yield ""
    for place, letter in enumerate(key):
        if letter == ".":
            yield key[: place + 1]


def _preference(where: str) -> int:
    if any(word in where for word in _SECOND_BEST):
        return -1
    return max((len(_PREFERRED) - i for i, word in enumerate(_PREFERRED) if word in where), default=0)
