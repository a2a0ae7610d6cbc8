"""The app: its Kotlin compiled, tested, and run on demo bundles beside Python. See android_demo/ci/check.sh."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "android_demo"
CHECK = APP / "ci" / "check.sh"


@pytest.mark.slow
def test_the_app_passes_its_checks(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [CHECK, "fast"],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with capfd.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout
    if done.stdout.startswith("skipped: the app"):
        pytest.skip(done.stdout.splitlines()[0])
    assert re.search(r"Tests run: [1-9]\d*, Failures: 0, Errors: 0", done.stdout), done.stdout


def test_what_cannot_be_had_is_skipped_by_name(tmp_path: Path) -> None:
    """A machine without the tools and without the network: one line, no failure."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "tail", "sed", "grep", "cat"):
        (tools / name).symlink_to(Path("/usr/bin") / name)
    (tools / "apt-get").write_text("#!/bin/bash\necho 'E: no network' >&2\nexit 100\n")
    (tools / "apt-get").chmod(0o755)
    done = subprocess.run([CHECK, "fast"], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "skipped: the app (no openjdk-17-jdk-headless maven unzip: E: no network)\n"


def test_the_native_libraries_are_those_that_ship() -> None:
    """The SDK under the tests is ExecuTorch's release that the app depends on."""
    catalog = tomllib.loads((APP / "gradle" / "libs.versions.toml").read_text())["versions"]
    (tested,) = re.findall(r"^EXECUTORCH=(\S+)", (APP / "ci" / "bridge" / "build.sh").read_text(), re.MULTILINE)
    assert tested == catalog["executorch"]
