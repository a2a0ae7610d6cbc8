"""The check that R8 kept what native code looks up by name, against classes that javac makes."""

import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.android_demo.tools import load

dex = load("dex")
entry_points = load("entry_points")

SOURCE = """package ai.onnxruntime;
public final class Session {
    native long open(String path);
    private static native void close(long handle);
    void plain() {}
    static final class Inner { native int size(); }
}
"""
EVERYTHING = {"ai.onnxruntime.Session": ["open", "close", "plain"], "ai.onnxruntime.Session$Inner": ["size"]}


def dex_file(classes: dict[str, list[str]]) -> bytes:
    """A .dex file with the tables that name classes and methods, and no code."""
    types = ["L" + name.replace(".", "/") + ";" for name in classes]
    methods = [(index, name) for index, names in enumerate(classes.values()) for name in names]
    strings = sorted({*types, *(name for _, name in methods)})
    tables = {"string": 4, "type": 4, "method": 8, "class": 32}
    counts = {"string": len(strings), "type": len(types), "method": len(methods), "class": len(types)}
    offsets, end = {}, 0x70
    for table, width in tables.items():
        offsets[table] = end
        end += width * counts[table]
    texts, places = b"", []
    for text in strings:
        places.append(end + len(texts))
        texts += bytes([len(text)]) + text.encode() + b"\0"
    body = struct.pack(f"<{len(places)}I", *places)
    body += struct.pack(f"<{len(types)}I", *(strings.index(name) for name in types))
    body += b"".join(struct.pack("<HHI", owner, 0, strings.index(name)) for owner, name in methods)
    body += b"".join(struct.pack("<I28x", index) for index in range(len(types)))
    header = bytearray(0x70)
    header[:8] = b"dex\n039\0"
    for at, table in ((0x38, "string"), (0x40, "type"), (0x58, "method"), (0x60, "class")):
        struct.pack_into("<II", header, at, counts[table], offsets[table])
    return bytes(header) + body + texts


def shrunk(folder: Path, classes: dict[str, list[str]]) -> Path:
    file = folder / "shrunk.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("classes.dex", dex_file(classes))
    return file


@pytest.fixture
def jar(tmp_path: Path) -> Path:
    if shutil.which("javac") is None or shutil.which("javap") is None:
        pytest.skip("no JDK")
    source = tmp_path / "Session.java"
    source.write_text(SOURCE)
    subprocess.run(["javac", "-d", str(tmp_path), str(source)], check=True)
    file = tmp_path / "runtime.jar"
    with zipfile.ZipFile(file, "w") as archive:
        for compiled in tmp_path.rglob("*.class"):
            archive.write(compiled, compiled.relative_to(tmp_path))
    return file


def test_reads_classes_and_methods() -> None:
    assert dex.classes(dex_file(EVERYTHING)) == {name: set(methods) for name, methods in EVERYTHING.items()}


def test_native_methods_are_javap_s(jar: Path) -> None:
    assert entry_points.native_methods([jar]) == {
        "ai.onnxruntime.Session": {"open", "close"},
        "ai.onnxruntime.Session$Inner": {"size"},
    }


def test_passes_when_all_is_kept(tmp_path: Path, jar: Path) -> None:
    said = entry_points.check(shrunk(tmp_path, EVERYTHING), [jar], [b"\0ai/onnxruntime/Session\0"], [jar])
    assert said == "R8 kept the 1 classes that native code names and the 3 native methods; 2 classes in all, of 2"


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        ({"ai.onnxruntime.Session": ["open", "close"]}, "ai.onnxruntime.Session$Inner"),
        (EVERYTHING | {"ai.onnxruntime.Session": ["open", "a"]}, "ai.onnxruntime.Session.close"),
        ({"a.a": ["open", "close"], "ai.onnxruntime.Session$Inner": ["size"]}, "ai.onnxruntime.Session"),
    ],
)
def test_names_what_is_lost(tmp_path: Path, jar: Path, kept: dict[str, list[str]], lost: str) -> None:
    with pytest.raises(SystemExit) as error:
        entry_points.check(shrunk(tmp_path, kept), [jar], [], [jar])
    assert str(error.value) == f"R8 dropped or renamed what native code needs: {lost}"


def test_a_class_that_only_native_code_names_must_be_kept(tmp_path: Path, jar: Path) -> None:
    """As exceptions are: no native method, no caller in Java."""
    with pytest.raises(SystemExit, match=r"ai\.onnxruntime\.Session"):
        entry_points.check(shrunk(tmp_path, {}), [jar], [b"\0Lai/onnxruntime/Session;\0"], [])
