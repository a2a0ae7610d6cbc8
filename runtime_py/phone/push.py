"""Copies a bundle to the demo app on a phone. There it appears whole, or not at all."""

import logging
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.manifest import FileEntry, read_manifest, sha256_of
from gemma3.errors import BadInput, DoesNotFit, VerificationFailed
from gemma3.host.files import reason
from runtime_py.phone.adb import Device, connect
from runtime_py.phone.folder import (
    Held,
    check_app,
    files_of,
    folder_of,
    folders_of,
    free_bytes,
    held,
    megabytes,
    name_of,
    part_of,
    remove,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """A bundle that is on a device: its name there, its files, and what of them this push has copied."""

    serial: str
    name: str
    folder: str
    files: int
    bytes: int
    copied_files: int
    copied_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(bundle: Path, serial: str | None = None) -> Pushed:
    """Copy ``bundle`` to the app on a device, where its name is that of its directory.

    Only files that differ are copied, into ``.NAME.part``. Each is compared by its sha256 on the device; then the
    folder is renamed. An interrupted push leaves that folder, and the next one goes on with it.

    Raises what ``read_manifest``, ``name_of`` and ``connect`` raise, DeviceError when the app is not installed or the
    device fails, DoesNotFit when the device has too little room, and VerificationFailed when a file of the bundle, or
    one that has arrived, has another sha256.
    """
    manifest = read_manifest(bundle)
    name, files = name_of(bundle), files_of(bundle, manifest)
    device = connect(serial)
    check_app(device)
    log.info("checking %s", bundle)
    _check_bundle(bundle, files)
    folder, part = folder_of(name), part_of(name)
    there = held(device, folder, files)
    if there is not None and not there.lacks(files) and not there.foreign:
        device.ask(f"rm -rf {shlex.quote(part)}")
        return _pushed(device, name, files, [])
    began = held(device, part, files)
    before = began or there or Held(frozenset(), {}, ())
    missing = before.lacks(files)
    _check_room(device, sum(files[one].size for one in missing) - sum(before.other.values()))
    if began is None and there is not None:
        device.ask(f"mv {shlex.quote(folder)} {shlex.quote(part)}")
    device.ask(f"mkdir -p {shlex.quote(part)}")
    for parent in folders_of(files):
        path = shlex.quote(f"{part}/{parent}")
        device.ask(f"[ -d {path} ] || rm -f {path}\nmkdir -p {path}")
    remove(device, part, [*before.foreign, *missing])
    copied = {one: files[one] for one in missing}
    _copy(device, bundle, part, copied)
    _check_copy(device, bundle, part, copied)
    device.ask(f"rm -rf {shlex.quote(folder)} && mv {shlex.quote(part)} {shlex.quote(folder)}")
    return _pushed(device, name, files, missing)


def _check_bundle(bundle: Path, files: dict[str, FileEntry]) -> None:
    for name, entry in files.items():
        try:
            same = sha256_of(bundle / name) == entry.sha256
        except OSError as error:
            raise BadInput(f"{bundle / name}: {reason(error)}") from None
        if not same:
            raise VerificationFailed(f"{bundle / name}: its sha256 is not its manifest's; copy or export it again")


def _check_room(device: Device, needed: int) -> None:
    free = free_bytes(device)
    if free is not None and free < needed:
        raise DoesNotFit(
            f"{device.serial}: {free >> 20} MiB free, the copy needs {-(-needed >> 20)} MiB; free "
            f"{-(-(needed - free) >> 20)} MiB more on the device"
        )


def _copy(device: Device, bundle: Path, part: str, files: dict[str, FileEntry]) -> None:
    done = 0
    with megabytes(sum(entry.size for entry in files.values())) as show:
        for name, entry in files.items():
            show(done, name)
            # A link is copied as the file that it names.
            device.copy((bundle / name).resolve(), f"{part}/{name}", partial(_show, show, done, name))
            done += entry.size
            show(done, name)


def _show(show: Callable[[int, str], None], before: int, name: str, arrived: int) -> None:
    show(before + arrived, name)


def _check_copy(device: Device, bundle: Path, part: str, files: dict[str, FileEntry]) -> None:
    """Compare what has arrived, and remove what is wrong. Raises VerificationFailed."""
    arrived = held(device, part, files)
    wrong = arrived.lacks(files) if arrived else list(files)
    if not wrong:
        return
    remove(device, part, wrong)
    changed = [name for name in wrong if not _is(bundle / name, files[name])]
    if changed:
        raise VerificationFailed(f"{bundle / changed[0]}: was changed while it was copied; push again")
    raise VerificationFailed(
        f"{device.serial}: {wrong[0]} did not arrive as it was sent (another sha256); push again, with another cable "
        "if it happens again"
    )


def _is(path: Path, entry: FileEntry) -> bool:
    try:
        return sha256_of(path) == entry.sha256
    except OSError:
        return False


def _pushed(device: Device, name: str, files: dict[str, FileEntry], copied: list[str]) -> Pushed:
    return Pushed(
        serial=device.serial,
        name=name,
        folder=folder_of(name),
        files=len(files),
        bytes=sum(entry.size for entry in files.values()),
        copied_files=len(copied),
        copied_bytes=sum(files[one].size for one in copied),
    )
