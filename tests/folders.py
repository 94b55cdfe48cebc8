"""What several tests need to know about folders."""

import os


def tree(folder):
    """Everything in a folder, without following links: name to content, or what a link leads to."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found
