"""Writes the files of an APK as a zip archive, aligned as Android wants it."""

import zipfile
from pathlib import Path

# Stored as they are: Android maps the table of resources, and a compressed file gains nothing.
STORED = (".arsc", ".png", ".jpg", ".webp", ".ogg", ".mp3")
# The date of every entry, so that the same sources give the same bytes.
DATE = (1981, 1, 1, 1, 1, 2)


def write_apk(base: Path, entries: dict[str, bytes], output: Path) -> None:
    """The entries of ``base``, aapt2's output, and the others after them. Stored entries begin at multiples of 4."""
    with zipfile.ZipFile(base) as resources, zipfile.ZipFile(output, "w") as apk:
        everything = {name: resources.read(name) for name in resources.namelist()} | entries
        for name, data in everything.items():
            info = zipfile.ZipInfo(name, DATE)
            info.compress_type = zipfile.ZIP_STORED if name.endswith(STORED) else zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            if info.compress_type == zipfile.ZIP_STORED:
                assert apk.fp
                end = apk.fp.tell() + 30 + len(name.encode())
                # An extra field of zeroes, as zipalign writes it.
                info.extra = b"\0" * (-end % 4)
            apk.writestr(info, data, compresslevel=9)
