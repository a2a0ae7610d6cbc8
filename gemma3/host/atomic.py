"""Directories and files that appear whole or not at all."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma3.errors import BadInput

# A staging directory has the beginning of its target's name, so that the whole is not too long for a file system.
NAME_BYTES = 100
STAGING = re.compile(r"\..*\.[0-9a-f]{8}\.partial", re.DOTALL)


def refuse_target(out: Path) -> None:
    """Raises BadInput unless ``out`` can be created: it must not exist, and its parent must be writable."""
    check_name(out)
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out}: exists; remove it or choose another -o")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent}: no such directory; create it or choose another -o")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{out.parent}: not writable; choose another -o")


def check_name(path: Path) -> None:
    """Raises BadInput when no file can have this path, because its name is too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BadInput(f"{str(path)[:60]}…: {error.strerror}; choose a shorter -o") from None


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new directory beside ``out``. When the block ends, it is synced to disk and renamed to ``out``.

    When the block raises, the directory is removed. Directories that killed processes left there are removed first.
    Raises BadInput when ``out`` cannot be created, on entry or at the end.
    """
    with _partial(out) as directory:
        yield directory
        for path in directory.rglob("*"):
            sync(path)
        sync(directory)
        refuse_target(out)  # rename would silently replace an empty directory
        directory.rename(out)
    sync(out.parent)


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """A path to write a file to. When the block ends, the file is synced to disk and renamed to ``out``.

    Nothing is left when the block raises. Raises BadInput as ``staging`` does.
    """
    with _partial(out) as directory:
        path = directory / "file"
        yield path
        sync(path)
        refuse_target(out)
        path.rename(out)
    sync(out.parent)


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A new directory beside ``out``, which is gone when the block ends."""
    refuse_target(out)
    sweep(out.parent)
    try:
        directory, lock = _locked_directory(out)
    except OSError as error:
        raise BadInput(f"{out.parent}: cannot write there ({error.strerror}); choose another -o") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def sweep(folder: Path) -> None:
    """Remove the staging directories in ``folder`` whose processes are gone.

    A process holds a lock on its staging directory, which the system releases however the process ends. Where locks do
    not work (some network file systems), nothing is removed.
    """
    for path in folder.iterdir():
        if not STAGING.fullmatch(path.name):
            continue
        try:
            if path.lstat().st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # its process lives, or there are no locks
        finally:
            os.close(lock)


def _locked_directory(out: Path) -> tuple[Path, int]:
    """A new staging directory for ``out``, and the file descriptor that holds its lock."""
    name = out.name.encode(errors="surrogateescape")[:NAME_BYTES].decode(errors="ignore")
    while True:
        directory = out.parent / f".{name}.{secrets.token_hex(4)}.partial"
        directory.mkdir()
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # swept by another process before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # being swept
            os.close(lock)
            continue
        except OSError:
            return directory, lock  # a file system without locks, where nobody sweeps
        if directory.exists():
            return directory, lock
        os.close(lock)


def sync(path: Path) -> None:
    """Wait until the file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
