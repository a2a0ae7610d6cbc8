"""Whether R8 kept the names by which native code finds classes and methods."""

import re
import subprocess
import zipfile
from pathlib import Path

import dex

# Classes as the strings of a native library spell them.
NATIVE_NAME = re.compile(rb"L?((?:org/pytorch/executorch|com/facebook/jni|ai/onnxruntime)/[\w/$]+)")


def check(shrunk: Path, program: list[Path], natives: list[bytes], jars: list[Path]) -> str:
    """What was kept, in words. ``natives`` are the native libraries, ``jars`` the classes that belong to them.

    Every class that a native library names and every native method must be in the .dex files under its own name.
    Raises SystemExit naming those that are not.
    """
    kept: dict[str, set[str]] = {}
    with zipfile.ZipFile(shrunk) as content:
        for name in content.namelist():
            if name.endswith(".dex"):
                kept |= dex.classes(content.read(name))
    given = {name for jar in program for name in class_names(jar)}
    named = {name.decode().replace("/", ".") for data in natives for name in NATIVE_NAME.findall(data)} & given
    methods = native_methods(jars)
    lost = sorted((named | set(methods)) - set(kept))
    lost += [f"{name}.{method}" for name in methods if name in kept for method in sorted(methods[name] - kept[name])]
    if lost:
        raise SystemExit("R8 dropped or renamed what native code needs: " + ", ".join(lost))
    count = sum(map(len, methods.values()))
    return (
        f"R8 kept the {len(named)} classes that native code names and the {count} native methods; "
        f"{len(kept)} classes in all, of {len(given)}"
    )


def class_names(jar: Path) -> list[str]:
    """The classes in a jar, as Java writes their names."""
    with zipfile.ZipFile(jar) as content:
        return [name[: -len(".class")].replace("/", ".") for name in content.namelist() if name.endswith(".class")]


def native_methods(jars: list[Path]) -> dict[str, set[str]]:
    """Class to the names of its native methods, as javap lists them."""
    found: dict[str, set[str]] = {}
    for jar in jars:
        command = ["javap", "-p", "-cp", str(jar), *class_names(jar)]
        owner = ""
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if match := re.search(r"\b(?:class|interface) ([\w.$]+)", line):
                owner = match[1]
            elif " native " in line and (match := re.search(r"([\w$]+)\(", line)):
                found.setdefault(owner, set()).add(match[1])
    return found
