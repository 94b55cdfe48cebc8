"""Files behind a URL (`s3://…`, `gs://…`, `memory://…`), through fsspec. Nothing is read but what the user names."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from odcft.data.image_files import skipped_ending, special_kind
from odcft.errors import OdcftError

Result = TypeVar("Result")


def open_file(url: str) -> Any:
    """Open for reading, as a binary file."""

    def open_it(fs: Any, path: str) -> Any:
        _refuse_special(fs, path)
        return fs.open(path, "rb")

    return _told(url, open_it)


def read_file(url: str, most: int) -> bytes:
    """The whole content, at most `most` bytes."""

    def read(fs: Any, path: str) -> bytes:
        _refuse_special(fs, path)
        size = fs.info(path).get("size") or 0
        if size > most:
            raise OdcftError(f"{size:,} bytes are more than the {most:,} that odcft reads")
        return fs.cat_file(path)

    return _told(url, read)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from an offset on."""
    return _told(url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + size)) if size else b""


def _refuse_special(fs: Any, path: str) -> None:
    """Refuse a pipe, a device or a socket of this machine (file://…): reading it might never end."""
    here = "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
    if here and (kind := special_kind(os.stat(path).st_mode)):
        raise OdcftError(f"a {kind}, not a file")


def file_size(url: str) -> int:
    """In bytes; -1 if the server does not say."""
    size = _told(url, lambda fs, path: fs.info(path)).get("size")
    return size if isinstance(size, int) else -1


def is_folder(url: str) -> bool:
    """Whether there are files below a URL. Raises an OdcftError if there is nothing at all."""
    try:
        return _told(url, lambda fs, path: fs.isdir(path) or (not fs.isfile(path) and bool(fs.ls(path))))
    except FileNotFoundError:
        raise OdcftError(f"{url} does not exist. Check the address.") from None


def matches(pattern: str, root: str) -> list[str]:
    """The names of what a pattern with * or ? matches, relative to the URL of a folder and sorted."""

    def find(fs: Any, path: str) -> list[str]:
        top = fs._strip_protocol(root).rstrip("/")
        return [found[len(top) :].lstrip("/") for found in fs.glob(path) if found.startswith(f"{top}/")]

    return sorted(_told(pattern, find))


def search(url: str, endings: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """The names of the files below a URL that have these endings, relative to it and sorted; and what else there is."""
    names, skipped = [], Counter[str]()

    def find(fs: Any, path: str) -> tuple[str, list[str]]:
        return path.rstrip("/"), fs.find(path)

    top, found = _told(url, find)
    for path in found:
        name = path[len(top) :].lstrip("/")
        hidden, wanted = f"/{name}".count("/."), name.lower().endswith(endings)
        if hidden:
            skipped["hidden image"] += wanted
        elif wanted:
            names.append(name)
        else:
            skipped[skipped_ending(name)] += 1
    return sorted(names), +skipped


def stamps_of(urls: Iterable[str]) -> np.ndarray:
    """A digest of what the server says about each file (size, time, checksum), as int64 (number of URLs, 5)."""

    def one(url: str) -> list[int]:
        try:
            said = str(_told(url, lambda fs, path: fs.ukey(path)))
        except (OSError, OdcftError):
            return [0] * 5
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
        return [0, *np.frombuffer(digest[:16], np.int64).tolist(), 0, 0]

    return np.array([one(url) for url in urls], np.int64).reshape(-1, 5)


def _told(url: str, work: Callable[[Any, str], Result]) -> Result:
    """Do `work(file system, path)`; errors of any library become an OSError, or an OdcftError with what to do."""
    fs, path = _file_system(url, os.getpid())
    try:
        return work(fs, path)
    except (OSError, OdcftError):
        raise
    except Exception as error:  # each server's library has errors of its own
        raise OSError(0, f"{type(error).__name__}: {error}"[:300]) from None


@lru_cache(maxsize=256)
def _file_system(url: str, process: int) -> tuple[Any, str]:
    """The file system of a URL and the path in it. A forked process makes its own: connections cannot be shared."""
    protocol = url.split("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise OdcftError(f'{url}: addresses need fsspec. Install it: pip install "odcft[remote]".') from None
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise OdcftError(f"{url}: {str(error).rstrip('.')}, the library for {protocol}://.") from None
    except ValueError as error:
        raise OdcftError(f"{url} is not an address that fsspec knows ({error}).") from None
    except Exception as error:
        raise OdcftError(f"{url} cannot be opened ({type(error).__name__}: {error}).") from None
