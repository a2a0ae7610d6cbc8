"""The demo app's folder on a device, and what it holds of a bundle."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.manifest import MANIFEST, FileEntry, Manifest, sha256_of
from gemma3.errors import BadInput, DeviceError
from gemma3.host.progress import Progress
from runtime_py.phone.adb import Device

PACKAGE = "org.gemmaedge.demo"
ROOT = f"/sdcard/Android/data/{PACKAGE}/files"  # where the app and adb's shell may both write
BUNDLES, BENCHMARKS = f"{ROOT}/bundles", f"{ROOT}/benchmarks"

NO_FOLDER, NO_SHA256SUM = 8, 9  # exit codes of the script that checks the app
# Bytes per second that any phone hashes.
SLOWEST_HASH = 5e6
# Characters of a script: adb gives an old device at most 64 KiB.
LONGEST_SCRIPT = 16_000
# Bytes to hash between two steps of a progress.
LITTLE_WORK = 50_000_000
# The names that the app takes.
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?", re.ASCII)
LONGEST_NAME = 60
# What Android's FAT file systems do not have in a name.
FORBIDDEN = '"*/:<>?\\|'


@dataclass(frozen=True)
class Held:
    """What a folder on a device holds of a bundle, by the files' names.

    ``whole`` have the right size and sha256, ``other`` (name to bytes) another content. ``foreign`` are files and
    folders that are not the bundle's; the app refuses a bundle with one.
    """

    whole: frozenset[str]
    other: dict[str, int]
    foreign: tuple[str, ...]

    def lacks(self, files: Iterable[str]) -> list[str]:
        return [name for name in files if name not in self.whole]


def folder_of(name: str) -> str:
    return f"{BUNDLES}/{name}"


def part_of(name: str) -> str:
    """The folder of a bundle that is being copied. The app ignores names that begin with a dot."""
    return f"{BUNDLES}/.{name}.part"


def name_of(bundle: Path) -> str:
    """The bundle's name on a device: that of its directory. Raises BadInput for one that the app does not take."""
    name = bundle.absolute().name if bundle.name not in ("", "..") else bundle.resolve().name
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        proposal = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:LONGEST_NAME].rstrip(".-") or "bundle"
        raise BadInput(
            f"{name[:80]!a} cannot be a bundle's name in the app (A to Z, a to z, 0 to 9, '.', '_' and '-', at most "
            f"{LONGEST_NAME} of them, no '.' or '-' at its ends); rename the directory, for example to {proposal}"
        )
    return name


def files_of(bundle: Path, manifest: Manifest) -> dict[str, FileEntry]:
    """Every file of the bundle that a device needs, the manifest last. Raises BadInput for a name it cannot have."""
    path = bundle / MANIFEST
    files = manifest.files | {MANIFEST: FileEntry(path.stat().st_size, sha256_of(path))}
    for name in files:
        base = name.rpartition("/")[2]
        bad = next((character for character in base if character in FORBIDDEN or not character.isprintable()), None)
        if bad is not None:
            raise BadInput(f"{bundle}: Android allows no {bad!a} in the name of a file, as in {name[:80]!a}; rename it")
    return files


def folders_of(files: Iterable[str]) -> set[str]:
    """The folders below the bundle's own that hold its files."""
    return {name.rpartition("/")[0] for name in files} - {""}


def check_app(device: Device) -> None:
    """Raises DeviceError unless the app is installed and was opened, and the device can check a copy."""
    answer = device.run(
        f"pm path {PACKAGE} || exit 1\n[ -d {ROOT} ] || exit {NO_FOLDER}\ncommand -v sha256sum || exit {NO_SHA256SUM}"
    )
    if "package:" not in answer.out:
        said = answer.words
        raise DeviceError(
            f"{device.serial}: the app {PACKAGE} is not installed{f' ({said})' if said else ''}; build it as "
            f"android_demo/README.md says, and adb -s {device.serial} install -r APK"
        )
    if answer.code == NO_FOLDER:
        raise DeviceError(f"{device.serial}: {ROOT} is not there yet; open the app once, then try again")
    if answer.code == NO_SHA256SUM:
        raise DeviceError(f"{device.serial}: has no sha256sum to check a copy with; Android 8 and newer have it")


def free_bytes(device: Device) -> int | None:
    """The free space of the app's folder. None when the device does not say."""
    # "Filesystem 1K-blocks Used Available Use% Mounted on", and a line of figures, which busybox may break after the
    # first column.
    found = re.findall(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%\s", device.run(f"df -k {ROOT}").out + "\n")
    return int(found[-1][2]) * 1024 if found else None


def held(device: Device, folder: str, files: Mapping[str, FileEntry]) -> Held | None:
    """What ``folder`` holds of ``files``, each compared by size and sha256; None if there is no such folder."""
    if device.run(f"[ -d {shlex.quote(folder)} ]").code != 0:
        return None
    sizes: dict[str, int] = {}
    for names in batches(files):
        script = f'for f in {quoted(names)}; do if [ -f "$f" ]; then stat -c %s "$f"; else echo none; fi; done'
        lines = device.ask(f"{inside(folder)}{script}").splitlines()
        if len(lines) != len(names):
            raise DeviceError(f"{device.serial}: cannot read {folder} ({lines[-1] if lines else 'no answer'})")
        sizes |= {name: int(line) for name, line in zip(names, lines, strict=True) if line.isdecimal()}
    found = device.ask(f"{inside(folder)}find . -print0").split("\0")[:-1]
    own = {".", *files, *folders_of(files)}
    foreign = tuple(name for path in found if (name := path.removeprefix("./")) not in own)
    candidates = [name for name, size in sizes.items() if size == files[name].size]
    hashes: dict[str, str] = {}
    done = 0
    with megabytes(sum(sizes[name] for name in candidates)) as show:
        for names in batches(candidates, sizes):
            show(done, f"comparing {names[0]}")
            hashes |= _hashes(device, folder, names, sum(sizes[name] for name in names))
            done += sum(sizes[name] for name in names)
    whole = {name for name, hash in hashes.items() if hash == files[name].sha256}
    return Held(frozenset(whole), {name: size for name, size in sizes.items() if name not in whole}, foreign)


def _hashes(device: Device, folder: str, names: Sequence[str], size: int) -> dict[str, str]:
    """The sha256 of files on the device, which have ``size`` bytes together."""
    answer = device.run(f'{inside(folder)}for f in {quoted(names)}; do sha256sum < "$f"; done', size / SLOWEST_HASH)
    hashes = re.findall(r"^([0-9a-f]{64})\b", answer.out, re.MULTILINE)
    if len(hashes) != len(names):
        raise DeviceError(f"{device.serial}: cannot compare {folder} ({answer.words or 'no answer'})")
    return dict(zip(names, hashes, strict=True))


def remove(device: Device, folder: str, names: Iterable[str]) -> None:
    for batch in batches(names):
        device.ask(f"{inside(folder)}rm -rf {quoted(batch)}")


def inside(folder: str) -> str:
    return f"cd {shlex.quote(folder)} || exit 1\n"


def quoted(names: Iterable[str]) -> str:
    """Names for a script that runs in their folder. The device's shell takes what is in quotes as it is, adb too."""
    return " ".join(shlex.quote(f"./{name}") for name in names)


def batches(names: Iterable[str], sizes: Mapping[str, int] | None = None) -> Iterator[Sequence[str]]:
    """The names in groups that are short enough for one script, and whose ``sizes`` are little work together."""
    batch: list[str] = []
    work = 0
    for name in names:
        size = sizes[name] if sizes else 0
        long = len(quoted([*batch, name]).encode("utf-8", "surrogateescape")) > LONGEST_SCRIPT
        if batch and (long or work + size > LITTLE_WORK):
            yield batch
            batch, work = [], 0
        batch.append(name)
        work += size
    if batch:
        yield batch


@contextmanager
def megabytes(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of ``total`` bytes. Yields the function that shows how many are done, with a text."""
    steps = -(-total // 1_000_000)
    progress = Progress(steps)
    try:
        yield lambda done, text: progress.show(steps if done >= total else done // 1_000_000, f"MB, {text}")
    finally:
        progress.close()
