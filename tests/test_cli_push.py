"""gemma-edge push, with a phone that is a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from export.manifest import MANIFEST, FileEntry, describe_files, sha256_of
from gemma3.errors import DeviceError
from runtime_py.phone import adb, folder
from tests.bundles import Cli, Run
from tests.phone import SERIAL, Phone, assert_same, write_bundle, write_manifest

ROOT = Path(__file__).parent.parent
FILES = 6  # of write_bundle, with the manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "demo")


def assert_refused(result: Run, code: int, *words: str) -> None:
    """One error, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "internal"))]
    assert len(lines) == 1, result.err
    assert lines == result.err.splitlines()[-1:]
    for word in words:
        assert word in lines[0]


def pushed(result: Run) -> Any:
    """What it printed, which with --json is an object."""
    assert result.code == 0, result.err
    return json.loads(result.out or "null")


def test_a_bundle_arrives_whole(gemma_edge: Cli, phone: Phone, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert pushed(gemma_edge("push", bundle)) is None
    assert f"demo on {SERIAL}: {FILES} of {FILES} files copied (0.1 of 0.1 MB)" in caplog.messages[-1]
    assert_same(bundle, phone.bundles / "demo")
    assert phone.names() == ["demo"]


def test_json_counts_what_was_copied(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    report = pushed(gemma_edge("push", bundle, "--json"))
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert report == {
        "serial": SERIAL,
        "name": "demo",
        "folder": "/sdcard/Android/data/org.gemmaedge.demo/files/bundles/demo",
        "files": FILES,
        "bytes": size,
        "copied_files": FILES,
        "copied_bytes": size,
    }


def test_a_second_push_copies_only_what_differs(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    pushed(gemma_edge("push", bundle))
    phone.calls("push")
    pushed(gemma_edge("push", bundle))
    assert phone.calls("push") == []
    # on the phone: a byte that changed, a file that went, one too many
    there = phone.bundles / "demo"
    (there / "model").write_bytes(b"\1" + (there / "model").read_bytes()[1:])
    (there / "proof" / "plan.json").unlink()
    (there / "a stranger's\n file").write_text("?")
    pushed(gemma_edge("push", bundle))
    assert [Path(call[-1]).name for call in phone.calls("push")] == ["model", "plan.json"]
    assert_same(bundle, there)
    # in the bundle
    (bundle / "genai_config.json").write_text("{ }")
    write_manifest(bundle, {name: entry for name, entry in describe_files(bundle).items()})
    pushed(gemma_edge("push", bundle))
    assert [Path(call[-1]).name for call in phone.calls("push")] == ["genai_config.json", MANIFEST]
    assert_same(bundle, there)
    assert phone.names() == ["demo"]


@pytest.mark.parametrize(
    "name",
    [
        "it's a demo",
        "$(reboot) `id` ; rm -rf & #",
        "-rf",
        "ünï 模型 🙂",
        "a  b ",
        "!~=[x]{1,2}%s",
        "proof/ '$x'",
        "x" * 255,
    ],
)
def test_files_that_a_shell_could_misread(gemma_edge: Cli, phone: Phone, tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "demo", **{name: b"content"})
    for copied in (FILES + 1, 0):
        assert pushed(gemma_edge("push", bundle, "--json"))["copied_files"] == copied
    assert_same(bundle, phone.bundles / "demo")


@pytest.mark.parametrize("name", ["x", "_", "Demo_1.0-b", "x" * 60])
def test_names_that_the_app_takes(gemma_edge: Cli, phone: Phone, tmp_path: Path, name: str) -> None:
    pushed(gemma_edge("push", write_bundle(tmp_path / name)))
    assert phone.names() == [name]


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("my demo", "my-demo"),
        ("it's", "it-s"),
        (".hidden", "hidden"),
        ("-x-", "x"),
        ("x.", "x"),
        ("a\nb", "a-b"),
        ("模型", "bundle"),
        ("x" * 61, "x" * 60),
        (b"a\xff".decode("utf-8", "surrogateescape"), "a"),
    ],
)
def test_names_that_the_app_does_not_take(
    gemma_edge: Cli, phone: Phone, tmp_path: Path, name: str, proposal: str
) -> None:
    result = gemma_edge("push", "--", write_bundle(tmp_path / name))
    assert_refused(result, 3, "cannot be a bundle's name in the app")
    assert result.err.endswith(f"for example to {proposal}\n")
    assert phone.calls("devices") == []


def test_a_file_that_android_cannot_have(gemma_edge: Cli, phone: Phone, tmp_path: Path) -> None:
    for name in ("what?", "tab\t"):
        bundle = write_bundle(tmp_path / f"bundle{len(name)}", **{name: b""})
        assert_refused(gemma_edge("push", bundle), 3, ascii(name), ascii(name[-1]))


def test_the_current_directory_has_a_name(
    gemma_edge: Cli, phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle / "proof")
    pushed(gemma_edge("push", ".."))
    monkeypatch.chdir(bundle)
    pushed(gemma_edge("push", "."))
    assert phone.names() == ["demo"]


def test_links_are_copied_as_files(gemma_edge: Cli, phone: Phone, bundle: Path, tmp_path: Path) -> None:
    (bundle / "model").rename(tmp_path / "blob")
    (bundle / "model").symlink_to(tmp_path / "blob")
    (tmp_path / "linked").symlink_to(bundle)
    pushed(gemma_edge("push", tmp_path / "linked"))
    assert phone.names() == ["linked"]
    assert not (phone.bundles / "linked" / "model").is_symlink()
    assert_same(bundle, phone.bundles / "linked")


def test_a_bundle_that_is_none_or_damaged(gemma_edge: Cli, phone: Phone, bundle: Path, tmp_path: Path) -> None:
    assert_refused(gemma_edge("push", tmp_path), 3, MANIFEST)
    (bundle / "model").write_bytes(bytes(256 * 200))
    assert_refused(gemma_edge("push", bundle), 5, "model", "sha256")
    assert phone.names() == []


# Devices


@pytest.mark.parametrize(
    ("devices", "options", "code", "words"),
    [
        ([], (), 4, ("no device", "USB debugging")),
        ([], ("--serial", "X"), 4, ("no device X",)),
        ([["A", "unauthorized"]], (), 4, ("A has not allowed this computer",)),
        ([["A", "offline"]], (), 4, ("A is offline",)),
        ([["A", "authorizing"]], (), 4, ("try again in a moment",)),
        ([["A", "recovery"]], (), 4, ("'recovery'", "start Android")),
        (
            [["????????????", "no permissions (user in plugdev group; are your udev rules wrong?); see [http://x]"]],
            (),
            4,
            ("????????????", "udev"),
        ),
        (
            [["A", "device"], ["emulator-5554", "offline"]],
            (),
            3,
            ("2 devices", "A (device)", "emulator-5554 (offline)"),
        ),
        ([["A", "device"]], ("--serial", "B"), 3, ("'B'", "A (device)")),
    ],
)
def test_devices_that_cannot_be_used(
    gemma_edge: Cli,
    phone: Phone,
    bundle: Path,
    devices: list[list[str]],
    options: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
) -> None:
    phone.set(devices=devices)
    assert_refused(gemma_edge("push", bundle, *options), code, *words)


def test_one_of_several_devices(gemma_edge: Cli, phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phone.set(devices=[["192.168.1.7:5555", "device"], ["B", "device"]])
    assert pushed(gemma_edge("push", bundle, "--json", "--serial", "192.168.1.7:5555"))["copied_files"] == FILES
    monkeypatch.setenv("ANDROID_SERIAL", "B")
    assert pushed(gemma_edge("push", bundle, "--json"))["serial"] == "B"
    monkeypatch.setenv("ANDROID_SERIAL", "C")
    assert_refused(gemma_edge("push", bundle), 3, "$ANDROID_SERIAL 'C'")


def test_no_adb(gemma_edge: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(gemma_edge("push", bundle), 4, "adb is not on the PATH", "install")
    (tmp_path / "adb").write_text("no program")
    (tmp_path / "adb").chmod(0o755)
    assert_refused(gemma_edge("push", bundle), 4, "cannot be run")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_server_that_starts_and_old_line_ends(gemma_edge: Cli, phone: Phone, bundle: Path, stream: str) -> None:
    phone.set(noise=stream, crlf=True)
    pushed(gemma_edge("push", bundle))
    assert_same(bundle, phone.bundles / "demo")


def test_a_server_that_does_not_start(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    words = (
        "* daemon not running; starting now at tcp:5037\nadb: failed to check server version: cannot connect to daemon"
    )
    phone.script("adb", f"#!/bin/sh\necho '{words}' >&2\nexit 1\n", phone.home)
    assert_refused(gemma_edge("push", bundle), 4, "(failed to check server version: cannot connect to daemon)")


# The app and its folder


def test_no_app(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    phone.script("pm", "#!/bin/sh\nexit 1\n")
    assert_refused(gemma_edge("push", bundle), 4, "org.gemmaedge.demo is not installed;", "android_demo/README.md")
    phone.script("pm", '#!/bin/sh\necho "cmd: Can\'t find service: package" >&2\nexit 20\n')
    assert_refused(gemma_edge("push", bundle), 4, "is not installed (cmd: Can't find service: package);")


def test_an_app_that_was_never_opened(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    shutil.rmtree(phone.app)
    phone.script("pm", "#!/bin/sh\necho WARNING: linker >&2\necho package:/data/app/base.apk\n")
    assert_refused(gemma_edge("push", bundle), 4, "open the app once")


def test_no_sha256sum(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    (phone.home / "tools" / "sha256sum").unlink()
    assert_refused(gemma_edge("push", bundle), 4, "no sha256sum", "Android 8")


def test_no_room(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    phone.free(49)
    assert_refused(gemma_edge("push", bundle), 4, "0 MiB free", "needs 1 MiB", "free 1 MiB")
    assert phone.names() == []
    phone.free(100)
    pushed(gemma_edge("push", bundle))
    phone.free(0)  # what is replaced makes room for what replaces it
    (phone.bundles / "demo" / "model").write_bytes(bytes(256 * 200))
    pushed(gemma_edge("push", bundle))
    assert_same(bundle, phone.bundles / "demo")


@pytest.mark.parametrize(
    ("rows", "free"),
    [
        ("/data/media  112500 100 7 1% /storage/emulated", 7),
        ("/dev/block/a very long name\n               112500 100 8 1% /storage/emulated", 8),
        ("/dev/fuse 3 2 9 100% /storage/emulated/0", 9),
        ("", None),
    ],
)
def test_forms_of_df(phone: Phone, rows: str, free: int | None) -> None:
    heading = "Filesystem     1K-blocks Used Available Use% Mounted on"
    phone.script("df", f"#!/bin/sh\necho '{heading}\n{rows}'\n")
    assert folder.free_bytes(adb.connect()) == (None if free is None else free * 1024)


# What can happen on the way


def test_a_full_device(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    phone.set(push={"file": "/model", "how": "full"})
    assert_refused(gemma_edge("push", bundle), 4, "is full")
    assert phone.names() == [".demo.part"]


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("unplug", 4, ("connection broke (failed to read copy response)", "same command")),
        ("hang", 4, ("nothing arrived for 3 s",)),
        ("corrupt", 5, ("model did not arrive as it was sent",)),
        ("denied", 4, ("may not write", "Permission denied", "open the app once")),
    ],
)
def test_a_copy_that_fails_is_continued(
    gemma_edge: Cli,
    phone: Phone,
    bundle: Path,
    how: str,
    code: int,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phone.set(push={"file": "/model", "how": how})
    with monkeypatch.context() as patch:
        if how == "hang":
            patch.setattr(adb, "STALL", 3.0)
        assert_refused(gemma_edge("push", bundle), code, SERIAL, *words)
    assert phone.names() == [".demo.part"]
    before = [Path(call[-1]).name for call in phone.calls("push")]
    phone.set(push=None, devices=[[SERIAL, "device"]])
    pushed(gemma_edge("push", bundle))
    after = [Path(call[-1]).name for call in phone.calls("push")]
    assert "model" in before
    assert "genai_config.json" in before
    assert "model" in after
    assert "genai_config.json" not in after
    assert_same(bundle, phone.bundles / "demo")
    assert phone.names() == ["demo"]


@pytest.mark.parametrize(("how", "code", "word"), [("replaced", 5, "was changed"), ("vanished", 3, "is gone")])
def test_a_bundle_that_changes_meanwhile(
    gemma_edge: Cli, phone: Phone, bundle: Path, how: str, code: int, word: str
) -> None:
    phone.set(push={"file": "/model", "how": how})
    assert_refused(gemma_edge("push", bundle), code, str(bundle / "model"), word)
    assert phone.names() == [".demo.part"]


def test_a_slow_copy_is_no_hang(gemma_edge: Cli, phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "STALL", 2.0)  # a piece comes every 0.5 s, all of them take 4 s
    phone.set(push={"file": "/model", "how": "slow"})
    pushed(gemma_edge("push", bundle))
    assert_same(bundle, phone.bundles / "demo")


@pytest.mark.parametrize("match", ["pm path", "stat -c", "sha256sum <", "mv "])
def test_a_script_that_is_cut_off(gemma_edge: Cli, phone: Phone, bundle: Path, match: str) -> None:
    """adb ends with 0 and the beginning of the answer."""
    phone.bundles.mkdir()
    shutil.copytree(bundle, phone.bundles / ".demo.part")
    phone.set(shell={"match": match, "how": "unplug"})
    assert_refused(gemma_edge("push", bundle), 4, "connection broke (adb said nothing)")
    assert phone.names() == [".demo.part"]


def test_a_script_that_hangs(gemma_edge: Cli, phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "QUICK", 4.0)
    phone.set(shell={"match": "df -k", "how": "hang"})
    assert_refused(gemma_edge("push", bundle), 4, "no answer for 4 s")
    assert phone.names() == []
    phone.script("adb", "#!/bin/sh\nexec sleep 1000\n", phone.home)
    assert_refused(gemma_edge("push", bundle), 4, "adb devices gave no answer for 4 s", "adb kill-server")


def test_a_part_beside_an_older_bundle(gemma_edge: Cli, phone: Phone, bundle: Path, tmp_path: Path) -> None:
    older = write_bundle(tmp_path / "older", model=b"older")
    phone.bundles.mkdir()
    shutil.copytree(older, phone.bundles / "demo")
    shutil.copytree(bundle, phone.bundles / ".demo.part")
    (phone.bundles / ".demo.part" / "model").unlink()
    assert pushed(gemma_edge("push", bundle, "--json"))["copied_files"] == 1
    assert_same(bundle, phone.bundles / "demo")
    assert phone.names() == ["demo"]


def test_files_and_folders_that_changed_places(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    there = phone.bundles / "demo"
    (there / "model" / "deep").mkdir(parents=True)
    (there / "model" / "deep" / "file").write_text("?")
    (there / "proof").write_text("a file")
    (there / "empty" / "folder").mkdir(parents=True)
    pushed(gemma_edge("push", bundle))
    assert_same(bundle, there)
    assert [path.name for path in there.rglob("*") if path.is_dir()] == ["proof"]


def test_many_long_names(gemma_edge: Cli, phone: Phone, tmp_path: Path) -> None:
    """Together they are longer than what adb gives an old device."""
    bundle = write_bundle(tmp_path / "demo")
    entry = FileEntry(0, sha256_of(Path(os.devnull)))
    names = [f"{number:03}" + "'" * 200 for number in range(20)]
    for name in names:
        (bundle / name).write_bytes(b"")
    write_manifest(bundle, describe_files(bundle) | dict.fromkeys(names, entry))
    pushed(gemma_edge("push", bundle))
    assert_same(bundle, phone.bundles / "demo")
    longest = max(len(argument) for call in phone.calls("shell") for argument in call)
    assert longest < 32_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_has_arrived(phone: Phone, bundle: Path, number: int) -> None:
    phone.set(push={"file": "/model", "how": "hang"})
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "push", str(bundle)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (phone.bundles / ".demo.part" / "model").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = "interrupted: what has arrived stays on the phone; run the same command to go on"
    assert err.splitlines()[-1] == last
    assert "Traceback" not in err
    assert phone.names() == [".demo.part"]


# The real program


@pytest.mark.skipif(shutil.which("adb") is None, reason="adb is not installed (Debian: apt install adb)")
def test_the_real_adb_without_a_device(
    gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = str(20_000 + os.getpid() % 20_000)  # a server of its own
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port)
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        listed = subprocess.run(["adb", "devices"], capture_output=True, text=True, check=True)
        if listed.stdout.strip() != "List of devices attached":
            pytest.skip("a device is connected")
        assert_refused(gemma_edge("push", bundle), 4, "adb sees no device")
        assert_refused(gemma_edge("push", bundle, "--serial", "none"), 4, "adb sees no device none")
        gone = adb.Device(str(shutil.which("adb")), "none")
        with pytest.raises(DeviceError, match=r"connection broke \(device 'none' not found\)"):
            gone.run("true")
        with pytest.raises(DeviceError, match=r"device 'none' not found\)"):
            gone.copy(bundle / "model", "/sdcard/x", lambda _: None)
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True)
