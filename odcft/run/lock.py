"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.files import made
from odcft.run.folder import LOCK

# ---------------------------------------------------------------- one run at a time


@contextmanager
def locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep every other run out of a folder for as long as this one works in it; rank 0 does it for all.

    The lock is the kernel's, on the file `lock`: it ends with the process, however that ends. It is of the POSIX kind,
    which forked data workers do not inherit (they outlive a killed run by seconds) and NFS servers keep too.

    Args:
        out: made, where there is none; and removed, where it is still empty at the end.
        say: told where a file system cannot lock.

    Raises:
        OdcftError: another run works there, or the folder cannot be written.
    """
    file: BinaryIO | None = None
    refused, note = "", ""
    with ExitStack() as stack:
        if dist.rank() == 0:
            try:
                stack.enter_context(made(out))
                file, note = _lock(out / LOCK)
            except FileExistsError:
                refused = f"{out / LOCK} is not a lock that odcft wrote. Move it away, or choose another --out."
            except BlockingIOError:
                refused = (
                    f"Another run is writing to {out} ({_holder(out / LOCK)}). Wait for it, or choose another --out."
                )
            except OSError as error:
                refused = f"{out} cannot be written: {error.strerror}. Choose another --out."
        refused = dist.gather_dict({0: refused} if refused else {}).get(0, "")
        if refused:
            raise OdcftError(refused)
        if note:
            say(f"Note        {note}")
        try:
            yield
        finally:
            if file is not None:
                with suppress(OSError):
                    (out / LOCK).unlink(missing_ok=True)  # while it is held
                file.close()


def _lock(path: Path) -> tuple[BinaryIO, str]:
    """Make and lock the file that says who works here.

    Its last holder may remove it while we wait for the lock, and it may have a second name, under which somebody
    keeps it: what we write into is there under this name alone.

    Returns:
        The file, held as long as it is open, and what to say where the file system cannot lock.

    Raises:
        BlockingIOError: another process holds it.
        FileExistsError: what has its name is not ours.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from None
            return file, f"{path.parent} cannot be locked ({error.strerror}): let no other run write to it."
        found = os.fstat(descriptor)
        if not b"process ".startswith(file.read(8)):
            raise FileExistsError
        if found.st_nlink > 1:
            path.unlink()
        elif found.st_nlink and path.lstat().st_ino == found.st_ino:
            break
    file.seek(0)
    file.truncate()
    with suppress(OSError):  # a full disk
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file, ""


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
