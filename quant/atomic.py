"""Directories that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TargetError(ValueError):
    """A directory that cannot be created. One line; exit code 3 on the command line."""

    exit_code = 3


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A new directory beside ``directory`` that is synced and becomes it if the block ends, and vanishes if it raises.

    Raises TargetError when ``directory`` exists, on entry or by the end, or its parent cannot be written.
    """
    refuse_existing(directory)
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
    except OSError as error:
        raise TargetError(f"{directory.parent}: cannot write there ({error.strerror}); choose another -o") from None
    try:
        yield partial
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        refuse_existing(directory)  # rename would silently replace an empty directory
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(directory.parent)


def refuse_existing(directory: Path) -> None:
    """Raises TargetError when there is something at ``directory``."""
    if directory.exists() or directory.is_symlink():
        raise TargetError(f"{directory}: exists; remove it or choose another -o")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
