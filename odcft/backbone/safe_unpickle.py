"""Unpickling that runs nothing: an unpickler which knows the pieces of arrays and tensors, and no other code.

A pickle is a program. It can name any function there is and have it called. Here, names of what arrays and tensors are
made of stand for the real thing; every other name stands for an empty class of ours, so that calling it makes an empty
object. A name whose only purpose can be harm (os.system) is refused outright.

A few bytes can also ask for work without end: a key that is a tuple of the same tuple twice, forty levels deep, is
hashed 2^40 times. So the program is looked through before it is run.
"""

import mmap
import pickle  # noqa: TID251 - the one place: a restricted unpickler is made of it
import pickletools
import re
import struct
import tarfile
from collections import OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from odcft.errors import OdcftError
from odcft.text import brief

# No checkpoint needs these, and code that wants to run does. What is not listed becomes a stand-in, and does not run.
_DANGEROUS_MODULES = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib", "imp", "pty", "commands"),
    *("popen2", "ctypes", "webbrowser", "code", "codeop", "pdb", "bdb", "timeit", "platform", "pip", "marshal"),
    *("cProfile", "profile", "doctest", "pydoc", "linecache", "zipimport"),
}
_DANGEROUS_BUILTINS = {
    *("eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "raw_input", "breakpoint"),
    *("apply", "globals", "locals", "setattr", "delattr", "exit", "quit"),
}


class Refused(Exception):
    """The file names code that only harm has a use for."""


class StandIn:
    """Takes the place of a class that the file asks for and we will not import. It holds what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def append(self, item: Any) -> None:
        """A list's place can be taken too."""

    def extend(self, items: Any) -> None:
        """A list's place can be taken too."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self.__dict__[key] = value

    def __hash__(self) -> int:
        return id(self)


def stand_in(name: str) -> type:
    """An inert class for a dotted name.

    Raises:
        Refused: where the name has no use but harm.
    """
    refuse_dangerous(name)
    return type(name.rsplit(".", 1)[-1], (StandIn,), {"__module__": "stand_in", "__doc__": f"Instead of {name}."})


def refuse_dangerous(name: str) -> None:
    """Raise Refused for names such as os.system and builtins.eval."""
    module, _, rest = name.partition(".")
    if module in _DANGEROUS_MODULES or (module in ("builtins", "__builtin__") and rest in _DANGEROUS_BUILTINS):
        raise Refused(brief(name, quotes=False))


INSTRUCTIONS = 5_000_000  # of a pickle; a checkpoint of 1,000 tensors has 50,000


class Endless(Exception):
    """The file is small, and the work it asks for is not."""


class _Value:
    """What looking a pickle through knows of a value: how many it is made of, shared ones counted each time."""

    __slots__ = ("name", "weight")

    def __init__(self, weight: int, name: str = "") -> None:
        self.weight, self.name = min(weight, 1 << 40), name


# Modules whose names do something, also under the names they had in Python 2.
_REAL = ("builtins", "__builtin__", "exceptions", "itertools", "collections", "User", "numpy", "torch", "_codecs")
_CALLS, _CHANGES = (
    {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"},
    {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"},
)
_HASHES = {"ADDITEMS", "FROZENSET", "PERSID", "BINPERSID", "INST"}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}


def _is_real(items: list[_Value]) -> bool:
    """Whether what is called does something: stand-ins do nothing, whatever they are called with."""
    return not items or not items[0].name or items[0].name.startswith(_REAL)


def refuse_endless(program: Any) -> int:
    """Look through one pickle, and leave the file where it ends.

    Keys, members of sets, and what real functions are called with are walked through when the program runs, shared
    parts again and again; together that may be no more than a hundred times the length of the file.

    Args:
        program: a file, or an mmap.

    Returns:
        How many instructions it has.

    Raises:
        Endless: running it would take time or memory far beyond the file's length.
        ValueError: it is no pickle.
    """
    start, work, ops = program.tell(), 0, 0
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    for op, argument, _ in pickletools.genops(program):
        ops += 1
        if op.name in _PUTS:
            place = len(memo) if op.name == "MEMOIZE" else int(argument or 0)
            if place > 10 * ops + 1000:  # the unpickler makes room up to there
                raise Endless
            memo[place] = _top(stack)
            continue
        if op.name in _GETS:
            stack.append(memo[int(argument or 0)])
            continue
        if op.name == "MARK":
            stack.append(None)
            continue
        if not op.stack_before:  # a number, a text, the name of a class
            if op.stack_after:
                stack.append(_Value(1, argument if isinstance(argument, str) and len(argument) < 200 else ""))
            continue
        if op.name == "DUP":
            stack.append(_top(stack))
            continue
        if op.name == "POP" and stack and stack[-1] is None:
            stack.pop()
            continue
        items = _popped(stack, op)
        if op.name in ("SETITEM", "SETITEMS"):
            work += sum(item.weight for item in items[1::2])
        elif op.name == "DICT":
            work += sum(item.weight for item in items[::2])
        elif op.name in _HASHES or (op.name in _CALLS and _is_real(items)):
            work += sum(item.weight for item in items)
        if ops > INSTRUCTIONS or (work > 10_000_000 and work > 100 * (program.tell() - start)):
            raise Endless
        if op.name in _CHANGES:
            items[0].weight = min(sum(item.weight for item in items), 1 << 40)
            stack.append(items[0])
        elif op.name == "BUILD":
            stack.append(items[0])
        elif op.stack_after:
            named = op.name == "STACK_GLOBAL" and all(item.name for item in items)
            name = ".".join(item.name for item in items) if named else ""
            stack.append(_Value(1 + sum(item.weight for item in items), name))
    return ops


def _top(stack: list[_Value | None]) -> _Value:
    if not stack or stack[-1] is None:
        raise ValueError("a value is missing")
    return stack[-1]


def _popped(stack: list[_Value | None], op: pickletools.OpcodeInfo) -> list[_Value]:
    """Take from the stack what an instruction takes."""
    fixed, items = len(op.stack_before), []
    if pickletools.markobject in op.stack_before:
        fixed = op.stack_before.index(pickletools.markobject)
        while stack and stack[-1] is not None:
            items.append(stack.pop())
        stack.pop()
    for _ in range(fixed):
        items.append(_top(stack))
        stack.pop()
    return [item for item in reversed(items) if item is not None]


def refuse_endless_file(path: Path, pickles: int = 1) -> int:
    """`refuse_endless` of the pickles at the start of a file, together."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        return sum(refuse_endless(program) for _ in range(pickles))


def numpy_globals() -> list[tuple[Any, str]]:
    """What numpy's arrays and numbers are unpickled with, as torch's safe_globals takes it, in numpy 1 and 2."""
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
    """Of a number, text or objects; never of a table, whose columns may be tables without end."""
    text = kind.decode("latin1") if isinstance(kind, bytes) else kind
    if not (isinstance(text, str) and re.fullmatch(r"[<>=|]?[?A-Za-z]\d{0,4}", text)):
        raise ValueError("a table")
    return np.dtype(text, copy=True)


def _scalar(kind: np.dtype, data: Any = None) -> Any:
    """A numpy number; objects, which would hold anything, come out as nothing."""
    if kind.hasobject or data is None:
        return None
    return np.frombuffer(data if isinstance(data, bytes) else str(data).encode("latin1"), dtype=kind)[0].item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into old pickles."""
    return text.encode("latin1" if encoding in ("latin1", "latin-1", "iso-8859-1") else "utf-8", "replace")


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *args: defaultdict(None),
    "torch.Size": torch.Size,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.nn.parameter.Parameter": lambda data, requires_grad=True: data,
    "torch.nn.Parameter": lambda data, requires_grad=True: data,
    **{f"torch.{kind}Storage": f"{kind}Storage" for kind in ("Float", "Double", "Half", "Long", "Int", "Byte", "Char")},
    **{f"torch.{kind}Storage": f"{kind}Storage" for kind in ("Short", "Bool")},
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
    def __init__(self, file: BinaryIO, replaced: list[str], tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self.replaced, self.tensors = replaced, tensors

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in _KNOWN:
            return _KNOWN[dotted]
        made = stand_in(dotted)
        self.replaced.append(dotted)
        return made

    def persistent_load(self, key: Any) -> Any:
        if self.tensors is None or key not in self.tensors:
            raise pickle.UnpicklingError("refers to something that is not in the file")
        return self.tensors[key]


def load_pickle(path: Path, replaced: list[str]) -> Any:
    """A plain pickle of dicts and numpy arrays, as Caffe2 and detectron2 write them; arrays come out as tensors.

    Args:
        path: of the file.
        replaced: the names of classes that stand-ins were put for are added here.

    Raises:
        OdcftError: not a pickle, or a damaged one.
        Refused: it names code that only harm has a use for.
    """
    try:
        refuse_endless_file(path)
        with path.open("rb") as file:
            return _tensors(_Unpickler(file, replaced).load(), {})
    except (Refused, Endless, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise OdcftError(f"{path} is a damaged pickle ({type(error).__name__}). Copy or download it again.") from None


def _tensors(tree: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """The tree with tensors for its arrays; what is shared stays shared."""
    if id(tree) in seen:
        return seen[id(tree)]
    made: Any = tree
    if isinstance(tree, np.ndarray):
        made = torch.from_numpy(np.array(tree)) if tree.dtype.kind in "fiub" and tree.dtype.isnative else None
    elif isinstance(tree, dict) and depth < 12:
        made = seen[id(tree)] = {}
        made |= {key: _tensors(value, seen, depth + 1) for key, value in tree.items()}
    elif isinstance(tree, list | tuple) and depth < 12:
        made = seen[id(tree)] = []
        made += [_tensors(value, seen, depth + 1) for value in tree]
    seen[id(tree)] = made
    return made


_ELEMENTS = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def load_tar(path: Path, replaced: list[str]) -> Any:
    """A file of torch before 0.1.10: a tar archive of storages, tensors that view them, and the pickle.

    Args and errors as `load_pickle`.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            parts = {}
            for name in ("storages", "tensors", "pickle"):
                member = archive.extractfile(name)
                assert member is not None
                assert not archive.getmember(name).issparse()  # it could swell
                parts[name] = BytesIO(member.read())
        storages: dict[Any, Tensor] = {}
        file = parts["storages"]
        for _ in range(_load_next(file, replaced)):
            key, _, kind = _load_next(file, replaced)
            (count,) = struct.unpack("<q", file.read(8))
            dtype = _ELEMENTS[kind]
            data = file.read(count * dtype.itemsize)
            storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        for key, root, offset, size in _load_next(file, replaced):  # views of storages
            storages[key] = storages[root][offset : offset + size]
        tensors: dict[str, Tensor] = {}
        file = parts["tensors"]
        for _ in range(_load_next(file, replaced)):
            key, storage, _ = _load_next(file, replaced)
            (dims,) = struct.unpack("<i4x", file.read(8))
            shape, stride = (struct.unpack(f"<{dims}q", file.read(8 * dims)) for _ in range(2))
            (start,) = struct.unpack("<q", file.read(8))
            tensors[str(key)] = storages[storage].as_strided(shape, stride, start)
        return _load_next(parts["pickle"], replaced, tensors)
    except (Refused, Endless, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise OdcftError(
            f"{path} is a tar archive, but none that PyTorch wrote, or a damaged one ({type(error).__name__})."
        ) from None


def _load_next(file: BinaryIO, replaced: list[str], tensors: dict[str, Tensor] | None = None) -> Any:
    """The next of several pickles, one after another in a file."""
    start = file.tell()
    refuse_endless(file)
    file.seek(start)
    return _Unpickler(file, replaced, tensors).load()
