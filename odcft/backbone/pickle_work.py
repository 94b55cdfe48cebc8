"""How much work a pickle asks for, found without running it.

A pickle is a program, and a few bytes of it can ask for endless work: hashing a tuple that holds the same tuple twice,
nested forty levels deep, takes 2^40 steps. Here its instructions are simulated with the sizes of values alone.
"""

import mmap
import pickletools
from pathlib import Path
from typing import Any

MAX_INSTRUCTIONS = 5_000_000  # in a pickle; a checkpoint of 1,000 tensors has 50,000
MAX_SIZE = 1 << 40  # sizes are not counted beyond this


class TooMuchWork(Exception):
    """Loading the file would take far more time or memory than its length justifies."""


class _StackItem:
    """A value on the stack of the simulated unpickler.

    Attributes:
        size: how many values it is made of; shared ones count each time.
        name: its text, which may be the name of a class.
    """

    __slots__ = ("name", "size")

    def __init__(self, size: int, name: str = "") -> None:
        self.size, self.name = min(size, MAX_SIZE), name


# Modules from which names stand for the real thing, also as Python 2 called them.
_REAL_MODULES = (
    *("builtins", "__builtin__", "exceptions", "itertools", "collections", "User", "numpy", "torch", "_codecs"),
)
# Pickle instructions that call something, change a container, hash values, and write to or read from the memo.
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_CHANGES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}
_HASHES = {"ADDITEMS", "FROZENSET", "PERSID", "BINPERSID", "INST"}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}


def _runs_real_code(items: list[_StackItem]) -> bool:
    """Whether a call may reach real code; stand-ins do nothing, whatever they are called with."""
    return not items or not items[0].name or items[0].name.startswith(_REAL_MODULES)


def refuse_excessive_work(program: Any) -> int:
    """Check one pickle without running it, and leave the file at its end.

    Keys, members of sets and arguments of real functions are traversed when the program runs, shared parts again each
    time. In total that may come to no more than a hundred times the length of the file.

    Args:
        program: a file, or an mmap.

    Returns:
        How many instructions it has.

    Raises:
        TooMuchWork: running it would take time or memory far beyond the file's length.
        ValueError: it is not a pickle.
    """
    start, work, instructions = program.tell(), 0, 0
    stack: list[_StackItem | None] = []  # None is a mark
    memo: dict[int, _StackItem] = {}
    for op, argument, _ in pickletools.genops(program):
        instructions += 1
        if op.name in _PUTS:
            place = len(memo) if op.name == "MEMOIZE" else int(argument or 0)
            if place > 10 * instructions + 1000:  # the unpickler allocates a memo up to this place
                raise TooMuchWork
            memo[place] = _top(stack)
        elif op.name in _GETS:
            stack.append(memo[int(argument or 0)])
        elif not _only_moves_values(op, argument, stack):
            items = _pop_arguments(stack, op)
            work += _traversed(op, items)
            if instructions > MAX_INSTRUCTIONS or (work > 10_000_000 and work > 100 * (program.tell() - start)):
                raise TooMuchWork
            _push_result(op, items, stack)
    return instructions


def _only_moves_values(op: pickletools.OpcodeInfo, argument: Any, stack: list[_StackItem | None]) -> bool:
    """Simulate an instruction that pushes a constant or a mark, duplicates the top or pops a mark; False for others."""
    if op.name == "MARK":
        stack.append(None)
    elif not op.stack_before:  # a number, a text, the name of a class
        if op.stack_after:
            stack.append(_StackItem(1, argument if isinstance(argument, str) and len(argument) < 200 else ""))
    elif op.name == "DUP":
        stack.append(_top(stack))
    elif op.name == "POP" and stack and stack[-1] is None:
        stack.pop()
    else:
        return False
    return True


def _traversed(op: pickletools.OpcodeInfo, items: list[_StackItem]) -> int:
    """How many values an instruction visits when it runs: what it hashes, or what it calls real code with."""
    if op.name in ("SETITEM", "SETITEMS"):
        return sum(item.size for item in items[1::2])
    if op.name == "DICT":
        return sum(item.size for item in items[::2])
    if op.name in _HASHES or (op.name in _CALLS and _runs_real_code(items)):
        return sum(item.size for item in items)
    return 0


def _push_result(op: pickletools.OpcodeInfo, items: list[_StackItem], stack: list[_StackItem | None]) -> None:
    """Simulate what an instruction leaves on the stack."""
    if op.name in _CHANGES:
        items[0].size = min(sum(item.size for item in items), MAX_SIZE)
        stack.append(items[0])
    elif op.name == "BUILD":
        stack.append(items[0])
    elif op.stack_after:
        named = op.name == "STACK_GLOBAL" and all(item.name for item in items)
        name = ".".join(item.name for item in items) if named else ""
        stack.append(_StackItem(1 + sum(item.size for item in items), name))


def _top(stack: list[_StackItem | None]) -> _StackItem:
    if not stack or stack[-1] is None:
        raise ValueError("a value is missing")
    return stack[-1]


def _pop_arguments(stack: list[_StackItem | None], op: pickletools.OpcodeInfo) -> list[_StackItem]:
    """Take an instruction's arguments off the stack."""
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


def refuse_excessive_work_in_file(path: Path, pickles: int = 1) -> int:
    """Apply `refuse_excessive_work` to the first pickles of a file; returns their number of instructions in total."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        return sum(refuse_excessive_work(program) for _ in range(pickles))
