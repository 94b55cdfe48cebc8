"""Unpickle arrays and tensors without running any other code.

A pickle is a program: it can name any function and have it called. Here only the names that arrays and tensors are made
of stand for the real thing. Every other name stands for an empty class of ours, so that calling it makes an empty
object; names that serve no purpose but harm (os.system) are refused.

A few bytes can also ask for endless work, so every program is checked before it runs (`pickle_work.py`).
"""

import pickle  # noqa: TID251 - the only use: the base class of a restricted unpickler
import re
import struct
import tarfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from odcft.backbone.pickle_work import TooMuchWork, refuse_excessive_work, refuse_excessive_work_in_file
from odcft.errors import OdcftError
from odcft.text import short_repr

# Checkpoints never need these, attacks do. A name that is not listed becomes a stand-in, which does not run either.
_DANGEROUS_MODULES = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib", "imp", "pty", "commands"),
    *("popen2", "ctypes", "webbrowser", "code", "codeop", "pdb", "bdb", "timeit", "platform", "pip", "marshal"),
    *("cProfile", "profile", "doctest", "pydoc", "linecache", "zipimport"),
}
_DANGEROUS_BUILTINS = {
    *("eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "raw_input", "breakpoint"),
    *("apply", "globals", "locals", "setattr", "delattr", "exit", "quit"),
}


class DangerousGlobal(Exception):
    """The file names a function or class that no checkpoint needs and an attack does."""


class StandIn:
    """Takes the place of a class that odcft will not import, and keeps the attributes that the file gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def append(self, item: Any) -> None:
        """Do nothing: the class in the file may be a list."""

    def extend(self, items: Any) -> None:
        """Do nothing: the class in the file may be a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self.__dict__[key] = value

    def __hash__(self) -> int:
        return id(self)


def stand_in(name: str) -> type:
    """Make an inert class that stands in for a dotted name.

    Raises:
        DangerousGlobal: the name serves no purpose but harm.
    """
    refuse_dangerous(name)
    return type(name.rsplit(".", 1)[-1], (StandIn,), {"__module__": "stand_in", "__doc__": f"Instead of {name}."})


def refuse_dangerous(name: str) -> None:
    """Raise DangerousGlobal for names such as os.system and builtins.eval."""
    module, _, rest = name.partition(".")
    if module in _DANGEROUS_MODULES or (module in ("builtins", "__builtin__") and rest in _DANGEROUS_BUILTINS):
        raise DangerousGlobal(short_repr(name, quotes=False))


def numpy_globals() -> list[tuple[Any, str]]:
    """What unpickles numpy's arrays and numbers (numpy 1 and 2), as torch's safe_globals takes it: object, name."""
    kinds = [type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDSUOMm"]
    return [
        (_array, "numpy.core.multiarray._reconstruct"),
        (_array, "numpy._core.multiarray._reconstruct"),
        (np.ndarray, "numpy.ndarray"),
        (_dtype, "numpy.dtype"),
        (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar"),
        *((kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds),
        (_latin1, "_codecs.encode"),
    ]


def _array(kind: type, shape: tuple[int, ...], typecode: Any) -> np.ndarray:
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _dtype(kind: Any, *_: Any) -> np.dtype:
    """A dtype of numbers, text or objects; never a structured one, whose fields could nest endlessly."""
    text = kind.decode("latin1") if isinstance(kind, bytes) else kind
    if not (isinstance(text, str) and re.fullmatch(r"[<>=|]?[?A-Za-z]\d{0,4}", text)):
        raise ValueError("a structured dtype")
    return np.dtype(text, copy=True)


def _scalar(kind: np.dtype, data: Any = None) -> Any:
    """A numpy number; None for an object, which could hold anything."""
    if kind.hasobject or data is None:
        return None
    return np.frombuffer(data if isinstance(data, bytes) else str(data).encode("latin1"), dtype=kind)[0].item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Recover bytes, which Python 3 writes as encoded text into pickles of old protocols."""
    return text.encode("latin1" if encoding in ("latin1", "latin-1", "iso-8859-1") else "utf-8", "replace")


_ALLOWED_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *args: defaultdict(None),
    "torch.Size": torch.Size,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.nn.parameter.Parameter": lambda data, requires_grad=True: data,
    "torch.nn.Parameter": lambda data, requires_grad=True: data,
    **{f"torch.{kind}Storage": f"{kind}Storage" for kind in ("Float", "Double", "Half", "Long", "Int", "Byte", "Char")},
    **{f"torch.{kind}Storage": f"{kind}Storage" for kind in ("Short", "Bool", "BFloat16")},
    **{f"torch.cuda.{kind}Storage": f"{kind}Storage" for kind in ("Float", "Double", "Half", "Long", "Int", "Byte")},
    **{name: value for value, name in numpy_globals()},
    **{
        f"{module}.{kind}": kind_of
        for module in ("builtins", "__builtin__")
        for kind, kind_of in {
            "set": set,
            "frozenset": frozenset,
            "slice": slice,
            "complex": complex,
            "bytearray": lambda *args: bytearray(),
            "object": StandIn,
            "dict": dict,
            "list": list,
            "tuple": tuple,
            "int": int,
            "long": int,
            "float": float,
            "str": lambda text="", *_: text if isinstance(text, str) else "",
            "bool": bool,
        }.items()
    },
}


class _Unpickler(pickle.Unpickler):
    """Unpickles allowed names for real and every other name as a stand-in."""

    def __init__(
        self,
        file: BinaryIO,
        replaced: list[str],
        tensors: dict[str, Tensor] | None = None,
        storage_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self.replaced, self.tensors, self.storage_of = replaced, tensors, storage_of

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in _ALLOWED_GLOBALS:
            return _ALLOWED_GLOBALS[dotted]
        if self.storage_of and dotted == "torch._utils._rebuild_tensor_v2":
            return _view_of_storage
        made = stand_in(dotted)
        self.replaced.append(dotted)
        return made

    def persistent_load(self, key: Any) -> Any:
        if self.storage_of:
            return self.storage_of(key)
        if self.tensors is None or key not in self.tensors:
            raise pickle.UnpicklingError("the pickle refers to a tensor that is not in the file")
        return self.tensors[key]


def load_pickle(path: Path, replaced: list[str]) -> Any:
    """Load a plain pickle of dicts and numpy arrays, as Caffe2 and detectron2 write them, with tensors for the arrays.

    Args:
        path: of the file.
        replaced: names of classes that stand-ins replace are added here.

    Raises:
        OdcftError: it is not a pickle, or a damaged one.
        DangerousGlobal: it names code that serves no purpose but harm.
        TooMuchWork: loading it would take time or memory far beyond the file's length.
    """
    try:
        refuse_excessive_work_in_file(path)
        with path.open("rb") as file:
            return _arrays_to_tensors(_Unpickler(file, replaced).load(), {})
    except (DangerousGlobal, TooMuchWork, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise OdcftError(f"{path} is a damaged pickle ({type(error).__name__}). Copy or download it again.") from None


def load_with_storages(program: bytes, storage_of: Callable[[Any], Tensor]) -> Any:
    """Load a pickle of tensors that view storages kept elsewhere, with stand-ins for the classes of modules.

    Args:
        program: the pickle.
        storage_of: gives the numbers, (N,), of the storage that the pickle refers to with a key.

    Raises:
        DangerousGlobal, TooMuchWork: as for `load_pickle`.
        Exception: of many kinds, if the pickle is damaged.
    """
    refuse_excessive_work(BytesIO(program))
    return _Unpickler(BytesIO(program), [], storage_of=storage_of).load()


def _view_of_storage(storage: Tensor, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor in a storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(shape, stride, start)


def _arrays_to_tensors(tree: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """The tree with tensors in place of its arrays; objects that are shared stay shared."""
    if id(tree) in seen:
        return seen[id(tree)]
    made: Any = tree
    if isinstance(tree, np.ndarray):
        made = torch.from_numpy(np.array(tree)) if tree.dtype.kind in "fiub" and tree.dtype.isnative else None
    elif isinstance(tree, dict) and depth < 12:
        made = seen[id(tree)] = {}
        made |= {key: _arrays_to_tensors(value, seen, depth + 1) for key, value in tree.items()}
    elif isinstance(tree, list | tuple) and depth < 12:
        made = seen[id(tree)] = []
        made += [_arrays_to_tensors(value, seen, depth + 1) for value in tree]
    seen[id(tree)] = made
    return made


STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def load_tar(path: Path, replaced: list[str]) -> Any:
    """Load a file of torch before 0.1.10: a tar archive of storages, tensors that view them, and the pickle.

    Args and errors as for `load_pickle`.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            storages_file, tensors_file, pickle_file = (
                _tar_member(archive, name) for name in ("storages", "tensors", "pickle")
            )
        storages = _read_storages(storages_file, replaced)
        tensors = _read_tensors(tensors_file, storages, replaced)
        return _load_next(pickle_file, replaced, tensors)
    except (DangerousGlobal, TooMuchWork, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise OdcftError(
            f"{path} is a tar archive that PyTorch did not write, or a damaged one ({type(error).__name__})."
        ) from None


def _tar_member(archive: tarfile.TarFile, name: str) -> BytesIO:
    member = archive.extractfile(name)
    assert member is not None
    assert not archive.getmember(name).issparse()  # a sparse member could be far larger than the file
    return BytesIO(member.read())


def _read_storages(file: BytesIO, replaced: list[str]) -> dict[Any, Tensor]:
    """Storages by their keys, and views of them by theirs."""
    storages: dict[Any, Tensor] = {}
    for _ in range(_load_next(file, replaced)):
        key, _, kind = _load_next(file, replaced)
        (count,) = struct.unpack("<q", file.read(8))
        dtype = STORAGE_DTYPES[kind]
        data = file.read(count * dtype.itemsize)
        storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    for key, root, offset, size in _load_next(file, replaced):
        storages[key] = storages[root][offset : offset + size]
    return storages


def _read_tensors(file: BytesIO, storages: dict[Any, Tensor], replaced: list[str]) -> dict[str, Tensor]:
    """Tensors by the keys under which the pickle refers to them."""
    tensors: dict[str, Tensor] = {}
    for _ in range(_load_next(file, replaced)):
        key, storage, _ = _load_next(file, replaced)
        (dims,) = struct.unpack("<i4x", file.read(8))
        shape, stride = (struct.unpack(f"<{dims}q", file.read(8 * dims)) for _ in range(2))
        (start,) = struct.unpack("<q", file.read(8))
        tensors[str(key)] = storages[storage].as_strided(shape, stride, start)
    return tensors


def _load_next(file: BinaryIO, replaced: list[str], tensors: dict[str, Tensor] | None = None) -> Any:
    """Load the next of several pickles that follow one another in a file."""
    start = file.tell()
    refuse_excessive_work(file)
    file.seek(start)
    return _Unpickler(file, replaced, tensors).load()
