"""gemma-edge bench --device adb, with a phone that is a folder and an app that is a few lines of Python."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime_py.phone import bench
from tests.bundles import Cli, Run
from tests.phone import DEVICE, RATE, REPORT, ROW, SERIAL, Phone, write_bundle

FEW = ("-p", "16", "-n", "4")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LOOK", 0.05)


@pytest.fixture
def bundle(phone: Phone, tmp_path: Path) -> Path:
    """A bundle, also on the phone."""
    bundle = write_bundle(tmp_path / "demo-1.0")
    shutil.copytree(bundle, phone.bundles / bundle.name)
    return bundle


def last_error(result: Run) -> str:
    assert result.out == ""
    errors = [line for line in result.err.splitlines() if line.startswith(("error", "internal"))]
    assert len(errors) == 1, result.err
    return errors[0]


def test_the_table_of_the_host_with_the_phone_above_it(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    options = ("-p", "16", "-n", "4", "-r", "3", "--threads", "2")
    result = gemma_edge("bench", bundle, "--device", f"adb:{SERIAL}", *options)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "Pixel 8 (Tensor G3), Android 15, arm64-v8a, 9 cores"
    header = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert header == [
        *("format", "prefill 16, tok/s", "decode 4, tok/s", "load", "peak RSS", "of which libraries"),
        "thermal",
    ]
    cells = ["30.0 ± 0.5 (30.1)", "30.0 ± 0.5 (30.1)", "1.25 s", "400.0 MB", "90.0 MB", "light"]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6]] == [
        [".pte", *cells],
        [".onnx", *cells],
    ]
    assert lines[-1] == "mean ± sd (median) of 3 repetitions"
    assert list((phone.app / "benchmarks").iterdir()) == []


def test_json_has_the_keys_of_the_host(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    result = gemma_edge("bench", bundle, "--device", "adb", "--format", "onnx", "-p", "16", "-n", "4", "--json")
    report = json.loads(result.out)
    asked = {"format": "onnx", "prompt": 16, "new_tokens": 4, "repetitions": 5, "threads": None}
    assert report == {"measurements": [asked | ROW], "device": DEVICE}


def test_the_app_gets_what_was_asked_for(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    options = ("-p", "16", "-n", "4", "-r", "3", "--threads", "2", "--format", "pte")
    assert gemma_edge("bench", bundle, "--device", "adb", *options).code == 0
    (script,) = [call[-1] for call in phone.calls("shell") if "am start" in call[-1]]
    assert "am start -S -W -n org.gemmaedge.demo/org.gemmaedge.app.BenchmarkActivity " in script
    for words in (
        "--es bundle demo-1.0",
        *("--es format pte", "--es report ", "--ei prompt 16", "--ei new_tokens 4"),
        *("--ei repetitions 3", "--ei threads 2"),
    ):
        assert words in script


def test_a_bundle_that_is_not_there_or_another_one(gemma_edge: Cli, phone: Phone, bundle: Path) -> None:
    command = ("bench", bundle, "--device", "adb", *FEW)
    advice = f"run gemma-edge push {shlex.quote(str(bundle))} first"
    there = phone.bundles / bundle.name
    (there / "extra").write_text("")
    result = gemma_edge(*command)
    assert result.code == 3
    assert "differs in extra" in last_error(result)
    (there / "extra").unlink()
    (there / "model").write_bytes(bytes(256 * 200))
    error = last_error(gemma_edge(*command))
    assert "differs in model" in error
    assert advice in error
    shutil.rmtree(there)
    assert f"{bundle} --serial {SERIAL} first" in last_error(
        gemma_edge(*command[: -len(FEW) - 1], f"adb:{SERIAL}", *FEW)
    )
    result = gemma_edge(*command)
    assert result.code == 3
    error = last_error(result)
    assert "has no bundle demo-1.0" in error
    assert advice in error
    assert not any("am start" in call[-1] for call in phone.calls("shell"))


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ({"how": "report", "report": {"schema_version": 1, "error": "needs 3 GB\nof RAM"}}, ("needs 3 GB of RAM",)),
        ({"how": "dies"}, ("the app ended", "too big for the phone's memory")),
        ({"how": "idle"}, ("the app has done nothing for 1 s",)),
        ({"how": "missing"}, ("did not start", "does not exist", "install")),
    ],
)
def test_apps_that_fail(
    gemma_edge: Cli,
    phone: Phone,
    bundle: Path,
    app: dict[str, Any],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "IDLE", 1.0)
    phone.set(app={"report": REPORT} | app)
    result = gemma_edge("bench", bundle, "--device", "adb", *FEW)
    assert result.code == 4
    for word in (SERIAL, *words):
        assert word in last_error(result)


def test_an_app_that_computes_is_waited_for(
    gemma_edge: Cli, phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "IDLE", 0.5)
    monkeypatch.setattr(bench, "COMPUTED", 5)
    phone.set(app={"how": "late", "seconds": 1.0, "report": REPORT})
    assert gemma_edge("bench", bundle, "--device", "adb", "--format", "pte", *FEW).code == 0


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ([], ("schema_version",)),
        (REPORT | {"schema_version": 2}, ("schema_version",)),
        (REPORT | {"bundle": "another"}, ("'another'",)),
        (REPORT | {"measurements": []}, ("no measurements",)),
        (REPORT | {"measurements": [ROW | {"thermal_status": 7}]}, ("thermal_status is 7",)),
        (REPORT | {"measurements": [ROW | {"thermal_status": True}]}, ("thermal_status is True",)),
        (REPORT | {"measurements": [ROW | {"prefill": 3}]}, ("measurement.prefill",)),
        (REPORT | {"measurements": [ROW | {"prefill": RATE | {"mean": "1"}}]}, ("measurement.prefill.mean",)),
        (REPORT | {"measurements": [ROW | {"format": "gguf"}]}, ("gguf",)),
        (REPORT | {"measurements": [ROW | {"prompt": 1}]}, ("'prompt': 1",)),
        (REPORT | {"device": DEVICE | {"cores": "nine"}}, ("device.cores",)),
        ({"schema_version": 1, "bundle": "demo-1.0", "measurements": [ROW]}, ("device",)),
    ],
)
def test_reports_that_cannot_be_used(
    gemma_edge: Cli, phone: Phone, bundle: Path, report: Any, words: tuple[str, ...]
) -> None:
    filled = isinstance(report, dict)
    phone.set(app={"how": "report" if filled else "garbage", "report": report})
    result = gemma_edge("bench", bundle, "--device", "adb", *FEW)
    assert result.code == 4
    for word in ("cannot be used", *words):
        assert word in last_error(result)


@pytest.mark.parametrize("device", ["usb", "adb:", "adbx", ":adb", ""])
def test_devices_of_another_kind(gemma_edge: Cli, phone: Phone, bundle: Path, device: str) -> None:
    result = gemma_edge("bench", bundle, "--device", device)
    assert result.code == 2
    assert "adb:SERIAL" in result.err


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("-r", "0"), 3, "-r is 0"),
        (("-p", "90", "-n", "7"), 4, "context of 96"),
        (("-p", "9", "--device", "adb:X"), 3, "'X'"),
    ],
)
def test_what_is_refused_before_the_phone_is_asked(
    gemma_edge: Cli, phone: Phone, bundle: Path, options: tuple[str, ...], code: int, word: str
) -> None:
    result = gemma_edge("bench", bundle, "--device", "adb", *options)
    assert result.code == code
    assert word in last_error(result)
    assert phone.calls("shell") == []
