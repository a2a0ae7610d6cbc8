"""The small tools that check an APK, against real files that this machine makes."""

import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.android_demo.tools import FOLDER, load

pages = load("pages")
package = load("package")


def linked(folder: Path, alignment: int) -> Path:
    """A shared library for this machine whose load segments have the alignment."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    source = folder / "empty.c"
    source.write_text("int answer(void) { return 42; }\n")
    library = folder / f"lib{alignment}.so"
    options = ["-shared", f"-Wl,-z,max-page-size={alignment}", f"-Wl,-z,common-page-size={alignment}"]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
    return library


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "pages.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(("alignment", "code"), [(16384, 0), (65536, 0), (4096, 5)])
def test_alignment_is_what_the_linker_was_told(tmp_path: Path, alignment: int, code: int) -> None:
    library = linked(tmp_path, alignment)
    (found,) = pages.libraries(library)
    assert found.alignment == alignment
    result = run(library)
    assert result.returncode == code
    assert ("FAILS" in result.stdout) == (code != 0)


def test_looks_into_archives_and_folders(tmp_path: Path) -> None:
    good, bad = linked(tmp_path, 16384), linked(tmp_path, 4096)
    aar = tmp_path / "some.aar"
    with zipfile.ZipFile(aar, "w") as archive:
        archive.write(good, "jni/x86_64/libgood.so")
        archive.write(bad, "jni/x86_64/libbad.so")
    assert {library.name: library.passes for library in pages.libraries(aar)} == {
        "some.aar!/jni/x86_64/libgood.so": True,
        "some.aar!/jni/x86_64/libbad.so": False,
    }
    assert len(pages.libraries(tmp_path)) == 4
    assert run(tmp_path).returncode == 5


def test_32_bits_may_keep_pages_of_4_kb(tmp_path: Path) -> None:
    """No device of 32 bits has larger pages: the same file, called an ARM one, passes."""
    data = bytearray(linked(tmp_path, 4096).read_bytes())
    struct.pack_into("<H", data, 18, 0x28)
    assert pages.read_library("lib.so", bytes(data)).passes


def test_a_file_that_is_no_library_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_text("not a library")
    result = run(file)
    assert result.returncode == 3
    assert result.stderr == f"error: {file} is not a little-endian ELF file\n"


def test_stored_entries_of_an_apk_are_aligned(tmp_path: Path) -> None:
    base = tmp_path / "base.apk"
    with zipfile.ZipFile(base, "w") as archive:
        for length in range(9):
            archive.writestr(f"res/{'x' * length}.png", b"p" * (length + 1))
        archive.writestr("resources.arsc", b"table")
        archive.writestr("AndroidManifest.xml", b"<manifest/>" * 20)
    output = tmp_path / "out.apk"
    package.write_apk(
        base, {"classes.dex": b"dex" * 100, "lib/x86_64/libx.so": linked(tmp_path, 16384).read_bytes()}, output
    )
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None
        assert archive.read("classes.dex") == b"dex" * 100
        for entry in archive.infolist():
            stored = entry.filename.endswith((".png", ".arsc"))
            assert (entry.compress_type == zipfile.ZIP_STORED) == stored, entry.filename
            if stored:
                assert pages.data_offset(output, entry) % 4 == 0
    # A library that is compressed is unpacked when installed, so where it lies does not matter.
    assert all(library.passes for library in pages.libraries(output))


def test_a_library_stored_off_a_page_fails(tmp_path: Path) -> None:
    output = tmp_path / "stored.apk"
    with zipfile.ZipFile(output, "w") as archive:
        archive.write(linked(tmp_path, 16384), "lib/x86_64/libx.so")
    (library,) = pages.libraries(output)
    assert library.alignment == 16384
    assert not library.passes
