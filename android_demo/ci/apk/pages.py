"""Checks that native libraries load on devices with pages of 16 KB, which Google Play asks of every app.

    python android_demo/ci/apk/pages.py FILE_OR_FOLDER...

Looks into .so files, and into .apk, .aar, .jar, .zip and .aab files. A library that an APK stores uncompressed must
also begin at a multiple of 16 KB there. Exit code 5 if one does not pass.
"""

import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

PAGE = 16384
ARCHIVES = {".apk", ".aar", ".jar", ".zip", ".aab"}
MACHINES = {0x03: "x86", 0x28: "armeabi-v7a", 0x3E: "x86_64", 0xB7: "arm64-v8a"}
# Devices of 32 bits have pages of 4 KB only.
WIDE = {"arm64-v8a", "x86_64"}


@dataclass(frozen=True)
class Library:
    """A native library: where it is, its processor, its bytes, the least alignment of its load segments in bytes, and
    where it begins in the archive that stores it uncompressed."""

    name: str
    processor: str
    size: int
    alignment: int
    offset: int | None = None

    @property
    def passes(self) -> bool:
        if self.processor not in WIDE:
            return True
        return self.alignment >= PAGE and (self.offset is None or self.offset % PAGE == 0)


def read_library(name: str, data: bytes, offset: int | None = None) -> Library:
    """Reads an ELF file. Raises ValueError if it is none, or of a byte order that no Android device has."""
    if data[:4] != b"\x7fELF" or data[5] != 1:
        raise ValueError(f"{name} is not a little-endian ELF file")
    wide = data[4] == 2
    machine = struct.unpack_from("<H", data, 18)[0]
    headers, size, count = (
        (struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54))
        if wide
        else (struct.unpack_from("<I", data, 28)[0], *struct.unpack_from("<HH", data, 42))
    )
    alignments = []
    for at in range(headers, headers + size * count, size):
        if struct.unpack_from("<I", data, at)[0] == 1:  # PT_LOAD
            alignments.append(
                struct.unpack_from("<Q", data, at + 48)[0] if wide else struct.unpack_from("<I", data, at + 28)[0]
            )
    processor = MACHINES.get(machine, f"machine {machine:#x}")
    return Library(name, processor, len(data), min(alignments, default=0), offset)


def libraries(path: Path) -> list[Library]:
    """Every native library in a file, an archive or a folder. An APK has them below lib/, an AAR below jni/."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix == ".so" or file.suffix in ARCHIVES)
        return [library for file in files for library in libraries(file)]
    if path.suffix not in ARCHIVES:
        return [read_library(str(path), path.read_bytes())]
    found = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".so"):
                stored = entry.compress_type == zipfile.ZIP_STORED and path.suffix == ".apk"
                offset = data_offset(path, entry) if stored else None
                found.append(read_library(f"{path.name}!/{entry.filename}", archive.read(entry), offset))
    return found


def data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin in the archive."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + int(name) + int(extra)


def table(found: list[Library]) -> str:
    lines = [f"{'library':<64} {'processor':<12} {'MB':>6} {'alignment':>9}"]
    for library in found:
        verdict = "" if library.passes else "  FAILS: not for pages of 16 KB"
        lines.append(
            f"{library.name:<64} {library.processor:<12} {library.size / 1e6:6.2f} {library.alignment:>9}{verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: pages.py FILE_OR_FOLDER...", file=sys.stderr)
        return 2
    try:
        found = [library for argument in sys.argv[1:] for library in libraries(Path(argument))]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(table(found))
    return 0 if all(library.passes for library in found) else 5


if __name__ == "__main__":
    sys.exit(main())
