"""A phone that is a folder, behind tests/fake_adb.py, and small bundles without graphs that can run."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.manifest import GOLDEN, MANIFEST, PLAN, FileEntry, describe_files
from gemma3.config import parse_config
from runtime_py.phone.folder import ROOT
from tests.manifests import manifest_of
from tests.shapes import SHAPES

SERIAL = "0A1B2C3D"
PROGRAMS = ("cat", "find", "mkdir", "mv", "rm", "sha256sum", "stat")
RATE = {"mean": 30.0, "sd": 0.5, "median": 30.1}
ROW = {
    "prefill": RATE,
    "decode": RATE,
    "load_seconds": 1.25,
    "peak_rss_bytes": 400_000_000,
    "libraries_rss_bytes": 90_000_000,
    "thermal_status": 1,
}
DEVICE = {"model": "Pixel 8", "soc": "Tensor G3", "android": "15", "abi": "arm64-v8a", "cores": 9}
REPORT = {"schema_version": 1, "device": DEVICE, "measurements": [ROW]}


class Phone:
    """The phone and its adb. ``home`` holds the program, its state, and the folder that is /sdcard."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.app = home / ROOT.lstrip("/")  # the app's folder
        (self.app / "benchmarks").mkdir(parents=True)
        self.bundles = self.app / "bundles"
        tools = home / "tools"
        tools.mkdir()
        # Android's own programs where they can be had (Debian: apt install toybox mksh).
        for program in PROGRAMS:
            found = shutil.which("toybox") or shutil.which(program)
            assert found is not None
            (tools / program).symlink_to(found)
        program = Path(__file__).with_name("fake_adb.py").read_text(encoding="utf-8")
        self.script("adb", f"#!{sys.executable} -SE\n{program}", home)
        self.script("pm", "#!/bin/sh\necho package:/data/app/~~x==/org.gemmaedge.demo-y==/base.apk\n")
        self.script("am", f'#!/bin/sh\nexec {sys.executable} -SE {home / "adb"} --am "$@"\n')
        self.script(
            "pidof",
            '#!/bin/sh\nread p < "$FAKE_ADB/pid" && read a b state c < /proc/$p/stat && [ $state != Z ] && echo $p\n',
        )
        self.free(10_000_000)
        self.sh = shutil.which("mksh") or "/bin/sh"
        self.state: dict[str, Any] = {}
        self.set(
            devices=[[SERIAL, "device"]],
            sh=self.sh,
            push=None,
            shell=None,
            noise="",
            crlf=False,
            app={"how": "report", "report": REPORT},
        )
        monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("ANDROID_SERIAL", raising=False)

    def script(self, name: str, text: str, folder: Path | None = None) -> None:
        path = (folder or self.home / "tools") / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def set(self, **changes: Any) -> None:
        self.state |= changes
        if self.state.get("app"):
            self.state["app"] = {"reports": f"{ROOT.lstrip('/')}/benchmarks", **self.state["app"]}
        (self.home / "state.json").write_text(json.dumps(self.state), encoding="utf-8")

    def free(self, kibibytes: int) -> None:
        """What df says: the columns of toybox."""
        rows = (
            "Filesystem     1K-blocks     Used Available Use% Mounted on\n"
            f"/dev/fuse      115249236 50000000 {kibibytes:9} 56% /storage/emulated"
        )
        self.script("df", f"#!/bin/sh\necho '{rows}'\n")

    def calls(self, word: str) -> list[list[str]]:
        """The arguments of each call of adb that has the word, since the last time. Forgets them all."""
        path = self.home / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [arguments for arguments in map(json.loads, lines) if word in arguments]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.bundles.iterdir()) if self.bundles.is_dir() else []


def write_bundle(directory: Path, **more: bytes) -> Path:
    """A bundle whose files have the right sizes and sha256, and nothing else. ``more`` are further files."""
    files = {
        "tokenizer.model": b"tokens" * 50,
        "model": bytes(range(256)) * 200,
        PLAN: b"{}",
        GOLDEN: b"golden" * 100,
        "genai_config.json": b"{}",
    } | more
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory, describe_files(directory))
    return directory


def write_manifest(directory: Path, files: dict[str, FileEntry]) -> None:
    manifest = manifest_of(parse_config(SHAPES["like-270m"]))
    tokenizer = replace(manifest.tokenizer, sha256=files["tokenizer.model"].sha256)
    text = replace(manifest, tokenizer=tokenizer, files=files).to_json()
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def assert_same(bundle: Path, copy: Path) -> None:
    """Both directories hold the same files."""
    contents = [
        {path.relative_to(top).as_posix(): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
        for top in (bundle, copy)
    ]
    assert contents[0] == contents[1]
