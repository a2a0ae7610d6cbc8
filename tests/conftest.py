import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported: nested MKL threads halve ExecuTorch's speed on a small machine, and the oracles
# (transformers) must not use the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import ONNX Runtime and its oracles themselves

import pytest
from hypothesis import settings

from gemma3.tokenizer import Tokenizer
from runtime_py.phone import adb
from scripts.random_checkpoint import made_up_tokenizer
from tests.bundles import VOCABULARY, Cli, run, write_checkpoint
from tests.phone import Phone
from tests.schemas import check_every_file

# A shell that runs the tests in the background has them ignore SIGINT, and nohup SIGHUP. Tests send both.
for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(ending) is signal.SIG_IGN:
        signal.signal(ending, signal.default_int_handler if ending == signal.SIGINT else signal.SIG_DFL)

# Machines are shared: no test fails for being slow, and every run draws the same examples.
settings.register_profile("shared-machine", deadline=None, derandomize=True)
settings.load_profile("shared-machine")


@pytest.fixture(scope="session", autouse=True)
def _schemas() -> Iterator[None]:
    """Check every manifest and plan that a test writes against the schemas in docs/."""
    with pytest.MonkeyPatch.context() as patch:
        check_every_file(patch)
        yield


@pytest.fixture
def gemma_edge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """gemma_edge("export", checkpoint, …): the command line in this process."""
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A made-up tokenizer of ``VOCABULARY`` tokens, without image markers."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(made_up_tokenizer(VOCABULARY))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint. A module may write what it derives from it to the same parent directory."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 900 characters: enough to calibrate and train on."""
    path = tmp_path_factory.mktemp("data") / "some.txt"
    path.write_text("Some text of ordinary words, and more of it. " * 20)
    return path


@pytest.fixture
def phone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Phone:
    """A phone with the app, and an adb on the PATH that knows it."""
    monkeypatch.setattr(adb, "POLL", 0.05)
    return Phone(tmp_path_factory.mktemp("phone"), monkeypatch)
