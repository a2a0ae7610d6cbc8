"""Directories that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma3.errors import BadInput


def refuse_target(out: Path) -> None:
    """Raises BadInput unless ``out`` can be created: it must not exist, and its parent must be writable."""
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out}: exists; remove it or choose another -o")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent}: no such directory; create it or choose another -o")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{out.parent}: not writable; choose another -o")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new directory beside ``out``. When the block ends, it is synced to disk and renamed to ``out``.

    When the block raises, the directory is removed. Raises BadInput when ``out`` cannot be created, on entry or at
    the end.
    """
    refuse_target(out)
    directory = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        directory.mkdir()
    except OSError as error:
        raise BadInput(f"{out.parent}: cannot write there ({error.strerror}); choose another -o") from None
    try:
        yield directory
        for path in directory.rglob("*"):
            sync(path)
        sync(directory)
        refuse_target(out)  # rename would silently replace an empty directory
        directory.rename(out)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    sync(out.parent)


def sync(path: Path) -> None:
    """Wait until the file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
