"""A lock that lets only one run at a time work in a folder."""

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
from odcft.files import new_folder
from odcft.run.folder import LOCK


@contextmanager
def locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep every other run out of a folder while this one works in it; rank 0 holds the lock for all ranks.

    The kernel keeps the lock, on the file `lock`, so it ends with the process, however that ends. It is a POSIX lock:
    forked data workers, which outlive a killed run by seconds, do not inherit it, and NFS servers support it.

    Args:
        out: created if it does not exist, and removed if it is still empty at the end.
        say: called with a note if the file system does not support locks.

    Raises:
        OdcftError: another run works there, or the folder cannot be written.
    """
    with ExitStack() as stack:
        file, note, refused = _lock_or_why_not(out, stack) if dist.rank() == 0 else (None, "", "")
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
                    (out / LOCK).unlink(missing_ok=True)  # while we still hold it
                file.close()


def _lock_or_why_not(out: Path, stack: ExitStack) -> tuple[BinaryIO | None, str, str]:
    """Lock a folder, creating it if need be.

    Args:
        out: the folder.
        stack: on closing, removes the folder if it was created here and is empty.

    Returns:
        The locked file, a note if the file system does not support locks, and why the folder could not be locked or "".
    """
    try:
        stack.enter_context(new_folder(out))
        return *_lock(out / LOCK), ""
    except FileExistsError:
        return None, "", f"{out / LOCK} is not a lock that odcft wrote. Move it away, or choose another --out."
    except BlockingIOError:
        who = _holder(out / LOCK)
        return None, "", f"Another run is writing to {out} ({who}). Wait for it, or choose another --out."
    except OSError as error:
        return None, "", f"{out} cannot be written: {error.strerror}. Choose another --out."


def _lock(path: Path) -> tuple[BinaryIO, str]:
    """Create and lock the file that names the process working here.

    The previous holder may remove the file while we open and lock it; and somebody may keep the file under a second
    name (a hard link). Either way this tries again, until it has locked a file that has this name and no other.

    Returns:
        The file, locked as long as it is open, and a note if the file system does not support locks.

    Raises:
        BlockingIOError: another process holds the lock.
        FileExistsError: there is something else of this name.
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
            return file, f"{path.parent} cannot be locked ({error.strerror}): make sure that no other run writes to it."
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
    """What a lock says of the process that holds it, or ""."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
