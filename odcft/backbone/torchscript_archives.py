"""Read the tensors of a TorchScript archive (`torch.jit.save`) without running or compiling the code in it.

Such an archive holds code, the tree of its modules as a pickle (`data.pkl`), and the numbers of its tensors. Only tree
and numbers are read, with the unpickler that knows no code.
"""

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.pickle_work import TooMuchWork
from odcft.backbone.safe_unpickle import STORAGE_DTYPES, DangerousGlobal, StandIn, load_with_storages
from odcft.errors import OdcftError

_TUPLE_OF_ONE = b"\x85"  # the instruction TUPLE1
MAX_LEVELS = 40  # of modules within modules
MAX_OBJECTS = 100_000  # modules, lists and tensors in an archive


def is_torchscript(names: list[str]) -> bool:
    """Whether a zip archive with these files is TorchScript: beside the tree it has the constants of the code."""
    files = {name.partition("/")[2] for name in names}
    return {"constants.pkl", "data.pkl"} <= files


def load_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive under the names that its network's state dict would have.

    Raises:
        OdcftError: the archive is damaged.
        DangerousGlobal: it names code that serves no purpose but harm.
        TooMuchWork: loading it would take time or memory far beyond its length.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        storages: dict[str, Tensor] = {}

        def storage_of(key: Any) -> Tensor:
            _, kind, name, *_ = key
            if name not in storages:
                data = bytearray(reader.get_record(f"data/{name}"))
                dtype = STORAGE_DTYPES[kind]
                storages[name] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return storages[name]

        tree = load_with_storages(_with_arguments_in_tuples(reader.get_record("data.pkl")), storage_of)
        return _named_tensors(tree)
    except (DangerousGlobal, TooMuchWork, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise OdcftError(
            f"{path} is a damaged TorchScript archive ({type(error).__name__}). Copy or download it again."
        ) from None


def _with_arguments_in_tuples(program: bytes) -> bytes:
    """The pickle with every call's argument in a tuple: TorchScript makes members of enums from the bare value."""
    parts: list[bytes] = []
    made_by: dict[int, str] = {}  # what made a value in the memo
    last, done = "", 0
    for op, argument, place in pickletools.genops(program):
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            made_by[int(argument or 0)] = last
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            last = made_by.get(int(argument or 0), "")
        else:
            if op.name == "REDUCE" and "TUPLE" not in last:
                parts += [program[done:place], _TUPLE_OF_ONE]
                done = place or 0
            last = op.name
    return b"".join([*parts, program[done:]])


def _named_tensors(tree: Any) -> dict[str, Tensor]:
    """Tensors in a tree of modules, by the names of the attributes that lead to them.

    Raises:
        TooMuchWork: the tree is deeper or larger than that of any network.
    """
    named: dict[str, Tensor] = {}
    objects = 0

    def walk(item: Any, name: str, level: int) -> None:
        nonlocal objects
        objects += 1
        if objects > MAX_OBJECTS or level > MAX_LEVELS:
            raise TooMuchWork
        if isinstance(item, StandIn):
            item = vars(item)
        elif isinstance(item, list | tuple):
            item = {str(place): one for place, one in enumerate(item)}
        if isinstance(item, Tensor):
            named[name] = item
        elif isinstance(item, Mapping):
            for key, one in item.items():
                if isinstance(one, Tensor | StandIn | Mapping | list | tuple):
                    walk(one, f"{name}.{key}".lstrip("."), level + 1)

    walk(tree, "", 0)
    return named
