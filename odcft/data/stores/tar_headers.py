"""The plain files in a tar archive, from its headers alone: usual headers are parsed here, all others by tarfile.

tarfile alone takes ten times as long, which is minutes for a million images.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from odcft.errors import OdcftError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 1 << 20  # bytes that may describe one member (long names, pax records, sparse maps)
# pax records that do not change where a member is or what it is called; writers add times and owners to every member.
HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}
_ZEROS = bytes(BLOCK)
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError, KeyError, RecursionError, MemoryError)


class Member(NamedTuple):
    """A plain file in an archive: its name, and where its content is, in bytes."""

    name: str
    offset: int
    size: int


def plain_files(path: str, file: Any, size: int, skipped: Counter[str]) -> Iterator[Member]:
    """The members of an archive that are plain files; the others are counted in `skipped`.

    Args:
        path: for messages.
        file: binary, can seek; the caller may move it between two members.
        size: of the file in bytes.
        skipped: what is not a plain file is counted here.

    Raises:
        OdcftError: the archive is damaged, cut off, or several in one file.
    """
    limited, offset, count = _LimitedReader(file), 0, 0
    try:
        file.seek(0)
        archive = tarfile.TarFile(fileobj=limited, mode="r", errorlevel=0)  # type: ignore[arg-type]
        while True:
            quick = _usual(file, offset)
            if quick is not None:
                member, after, kind = quick, _round_up(quick.offset + quick.size), ""
            else:
                limited.left = MAX_HEADER
                found = _unusual(archive, file, offset)
                if found is None:
                    break
                member, after, kind = Member(found.name, found.offset_data, found.size), archive.offset, _kind(found)
            if after <= offset or member.size < 0 or member.offset + max(0, member.size) > size:
                raise ValueError("a member goes beyond its end")
            offset, count = after, count + 1
            if not kind:
                yield member
            elif kind != "folder":
                skipped[f"{kind} in an archive"] += 1
        _check_end(path, file, offset, skipped)
    except _DAMAGED as error:
        why = str(error) or type(error).__name__
        raise OdcftError(
            f"{path} is not a whole tar archive: after {count:,} members, {why[:100]}. Make or copy it again."
        ) from None


def _round_up(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK


def _usual(file: Any, offset: int) -> Member | None:
    """The plain file whose header is at an offset; None if it is anything else than the usual kind of header."""
    file.seek(offset)
    header = _header(file.read(BLOCK))
    records: dict[bytes, bytes] = {}
    if header is not None and header[0] == b"x" and header[2] <= MAX_HEADER:
        found = _pax_records(file.read(_round_up(header[2]))[: header[2]])
        if found is None or found.keys() - HARMLESS - {b"path"}:
            return None
        records, offset = found, offset + BLOCK + _round_up(header[2])
        header = _header(file.read(BLOCK))
    if header is None or header[0] not in (b"0", b"\0"):
        return None
    name = records.get(b"path", header[1])
    if not name or name.endswith(b"/") or b"\0" in name:
        return None
    return Member(name.decode("utf-8", "surrogateescape"), offset + BLOCK, header[2])


def _header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Type, name and size of a header with a right checksum and plain octal numbers; None for others (POSIX ustar)."""
    if len(block) != BLOCK or block[257:262] != b"ustar":
        return None
    try:
        checksum, size = int(block[148:156].strip(b"\0 "), 8), int(block[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None
    if size < 0 or sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[262:263] == b"\0" and block[345]:  # GNU archives have other things there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return block[156:157], name, size


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """The records "length key=value\\n" of a pax header; None if they are not right."""
    records, position = {}, 0
    while position < len(content):
        blank = content.find(b" ", position, position + 10)
        digits = content[position:blank]
        if blank < 0 or not digits.isdigit():
            return None
        end = position + int(digits)
        key, equals, value = content[blank + 1 : end - 1].partition(b"=")
        if end <= blank or end > len(content) or content[end - 1 : end] != b"\n" or not equals:
            return None
        records[key], position = value, end
    return records


def _unusual(archive: tarfile.TarFile, file: Any, offset: int) -> tarfile.TarInfo | None:
    """The member at an offset, read by tarfile; None at the end of the archive."""
    file.seek(offset)
    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
    archive.firstmember = None  # type: ignore[attr-defined]
    archive.offset = offset
    return archive.next()


def _kind(member: tarfile.TarInfo) -> str:
    """What a member is, unless it is a plain file."""
    if member.issparse():
        return "sparse file"
    if member.isreg():
        return ""
    if member.isdir():
        return "folder"
    return "link" if member.islnk() or member.issym() else "device"


def _check_end(path: str, file: Any, end: int, skipped: Counter[str]) -> None:
    """Check that an archive ends where tarfile stopped: it also stops, silently, at a damaged header."""
    file.seek(end)
    rest = file.read(1 << 16)
    if not rest:
        skipped["archive without an end mark"] += 1
    elif rest[:BLOCK] != _ZEROS:
        raise ValueError("the next header is damaged")
    for block in range(0, len(rest) - BLOCK + 1, BLOCK):
        if rest[block + 257 : block + 262] == b"ustar":  # joined by `cat`
            raise OdcftError(
                f"{path} is several archives in one file, of which tar reads the first. "
                "Give them as separate files, or join them with `tar --concatenate`."
            )


class _LimitedReader:
    """A file that gives tarfile at most MAX_HEADER bytes for one member, whatever its header asks for."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MAX_HEADER

    def read(self, count: int = -1) -> bytes:
        self.left -= count
        if count < 0 or self.left < 0:
            raise tarfile.ReadError("a header is too long")
        return self.file.read(count)

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()
