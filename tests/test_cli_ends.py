"""How a command ends when it is stopped, when nobody reads its output, and when a terminal cannot show it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import cli
from tests.bundles import EXPORT, Cli

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "cli"]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    cli.app(["export", str(checkpoint), "-o", str(out), "--format", "onnx", *EXPORT], standalone_mode=False)
    return out


def start(*arguments: object, **options: Any) -> Any:
    """A command in a process of its own, with its output as text unless ``options`` say otherwise."""
    given: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **given)


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    while not condition():
        assert process.poll() is None, "it ended before the signal"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_and_says_so(checkpoint: Path, tmp_path: Path, number: int) -> None:
    process = start("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT)
    wait_for(lambda: any(tmp_path.iterdir()), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"interrupted: {tmp_path / 'out'} was not written"
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_heeded(checkpoint: Path, tmp_path: Path) -> None:
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = start("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT, preexec_fn=ignore)
    wait_for(lambda: any(tmp_path.iterdir()), process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_during_imports_shows_no_traceback(delay: float) -> None:
    process = start("--version")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Before the first line of the program runs, Python answers; that is not ours to change.
    if "cli.py" in err or process.returncode in (0, 130):
        assert "Traceback" not in err


def test_a_bundle_that_is_already_there_is_not_denied(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma3.host import atomic

    def interrupt(path: Path) -> None:
        if path == tmp_path:  # the last step, after the rename
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "sync", interrupt)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT)
    assert result.code == 130
    assert result.err.splitlines()[-1] == f"interrupted: {tmp_path / 'out'} was written before"
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_what_a_library_made_of_a_signal_is_no_internal_error(
    gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime_py import text

    def swallow(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("a library failed to load") from None

    monkeypatch.setattr(text, "open_bundle", swallow)
    result = gemma_edge("generate", bundle, "a")
    assert (result.code, result.err) == (128 + signal.SIGTERM, "")


def test_a_reader_that_has_seen_enough(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The pipe is closed before the first byte."""
    for arguments in (
        ("--help",),
        ("generate", bundle, "Hello", "-n", "3"),
        ("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        process = start(*arguments, stdout=writer)
        os.close(writer)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGPIPE
        assert "Traceback" not in err
        assert "error" not in err
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_full_device(bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start("generate", bundle, "Hello", "-n", "3", stdout=full)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 4
        assert err.splitlines() == [
            "error: out of memory or disk space ([Errno 28] No space left on device); free some and try again"
        ]
        assert start("generate", "nowhere", "Hello", stderr=full).wait(timeout=60) == 3


def test_memory_that_torch_cannot_have(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime_py import text

    monkeypatch.setattr(text, "open_bundle", lambda *_, **__: torch.empty(1 << 50))
    result = gemma_edge("generate", bundle, "a")
    assert result.code == 4
    assert result.err.startswith("error: out of memory or disk space (")
    assert "can't allocate memory: you tried to allocate" in result.err


def test_a_file_that_torch_cannot_map(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of 54 GB, as a checkpoint of the 27B would be without shards, cannot be mapped with 24 GB of memory."""
    from runtime_py import text

    sparse, size = tmp_path / "sparse", 1 << 43
    with sparse.open("wb") as file:
        file.truncate(size)
    if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "1":
        pytest.skip("this machine maps files of any size")
    monkeypatch.setattr(text, "open_bundle", lambda *_, **__: torch.UntypedStorage.from_file(str(sparse), False, size))
    result = gemma_edge("generate", bundle, "a")
    assert result.code == 4, result.err
    assert "error: out of memory or disk space (unable to mmap" in result.err


@pytest.mark.parametrize("arena", [True, False])
def test_memory_that_onnx_runtime_cannot_have(
    gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch, arena: bool
) -> None:
    """It says so in other words when it has no arena."""
    from runtime_py import text

    shape = onnx.numpy_helper.from_array(np.array([1 << 50]), "shape")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Expand", ["x", "shape"], ["y"])],
        "huge",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])],
        [shape],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = arena
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(text, "open_bundle", lambda *_, **__: session.run(None, {"x": np.ones(1, np.float32)}))
    result = gemma_edge("generate", bundle, "a")
    assert result.code == 4, result.err
    assert "error: out of memory or disk space ([ONNXRuntimeError]" in result.err


def test_streams_that_are_closed(checkpoint: Path, tmp_path: Path) -> None:
    """No file of the bundle takes the place of a closed stream."""
    out = tmp_path / "out"
    command = [*COMMAND, "export", str(checkpoint), "-o", str(out), "--format", "onnx", *EXPORT]
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *command], cwd=ROOT).returncode == 0
    assert start("validate", out).wait(timeout=120) == 0


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_a_terminal_that_is_not_utf_8(bundle: Path, checkpoint: Path, tmp_path: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    for arguments in (
        ("validate", bundle),
        ("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT),
        ("generate", bundle, "Hello \U0001f600", "-n", "8", "--temperature", "5"),
        ("generate", "\U0001f600", "Hello"),
    ):
        process = start(*arguments, env=environment, text=False)
        _, err = process.communicate(timeout=120)
        assert process.returncode == (3 if "\U0001f600" in arguments else 0), err


@pytest.mark.parametrize("threads", [100_000, 2**31, 2**70])
def test_far_too_many_threads(gemma_edge: Cli, bundle: Path, threads: int) -> None:
    result = gemma_edge("generate", bundle, "Hello", "--threads", threads)
    assert result.code == 4
    assert f"{threads} threads are too many for" in result.err


def test_chat_from_a_pipe_that_is_not_text(bundle: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    process = start("chat", bundle, stdin=subprocess.PIPE, text=False, env=environment)
    _, err = process.communicate(b"\xff\n", timeout=60)
    assert process.returncode == 3
    assert b"error: standard input is not utf-8 text (byte 0xff)" in err
