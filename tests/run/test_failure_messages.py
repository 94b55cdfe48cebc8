"""Disk failures are explained in a sentence; bugs of odcft itself are not."""

import errno
import os

import pytest

from odcft.errors import OdcftError
from odcft.recipe import load_recipe
from odcft.run import failure_messages


@pytest.mark.parametrize(
    ("number", "name", "sentence"),
    [
        (errno.ENOSPC, "a/b", "a/b cannot be written: No space left on device. Make room and continue with --resume"),
        (errno.EDQUOT, None, "The output cannot be written: Disk quota exceeded. Make room and continue with --resume"),
        (errno.EFBIG, "a", "a cannot be written: File too large. Make room"),
        (errno.EROFS, "a", "a: Read-only file system. Fix it and continue with --resume"),
        (errno.EIO, "a", "a: Input/output error. Fix it"),
        (errno.ESTALE, "a", "a: Stale file handle. Fix it"),
    ],
)
def test_a_disk_failure_is_explained_in_a_sentence(number, name, sentence):
    with pytest.raises(OdcftError, match=sentence), failure_messages.explain_failures(load_recipe("small")):
        raise OSError(number, os.strerror(number), name)


def test_a_bug_is_not_mistaken_for_a_disk_failure():
    with pytest.raises(OSError, match="odd"), failure_messages.explain_failures(load_recipe("small")):
        raise OSError("odd")
    with pytest.raises(OSError, match="Read-only"), failure_messages.explain_failures(load_recipe("small")):
        raise OSError(errno.EROFS, "Read-only file system")
