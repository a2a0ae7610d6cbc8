"""Bundles with int8 KV caches, through the commands."""

import json
from pathlib import Path

import pytest

from export.manifest import read_manifest
from tests.bundles import Cli


@pytest.fixture
def bundle(gemma_edge: Cli, checkpoint: Path, tmp_path: Path, text: Path) -> Path:
    out = tmp_path / "bundle"
    done = gemma_edge("export", checkpoint, "-o", out, "--format", "onnx", "--kv", "int8", "--kv-data", text)
    assert done.code == 0, done.err
    assert "scales of keys and values in the file are the calibrated ones" in done.out
    return out


def test_every_command_takes_such_a_bundle(
    gemma_edge: Cli, checkpoint: Path, bundle: Path, text: Path, tmp_path: Path
) -> None:
    artifact = read_manifest(bundle).artifacts["onnx"]
    assert artifact.cache.dtype == "int8"
    assert {one.dtype for one in artifact.methods[0].inputs if one.name.startswith("past")} == {"int8"}
    for command in (
        ("validate", bundle),
        ("validate", bundle, "--checkpoint", checkpoint),
        ("generate", bundle, "Some", "-n", "4"),
        ("bench", bundle, "-p", "8", "-n", "2", "-r", "1"),
    ):
        done = gemma_edge(*command)
        assert done.code == 0, done.err
    done = gemma_edge("accuracy", bundle, "--reference", checkpoint, "--data", text, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)
    system, prefix = tmp_path / "system.txt", tmp_path / "prefix"
    system.write_text("Be brief.")
    done = gemma_edge("prefill", bundle, "--system", system, "-o", prefix)
    assert done.code == 0, done.err
    ask = ("generate", bundle, "one two one two one two", "--chat", "-n", "8")
    assert gemma_edge(*ask, "--prefix", prefix).out == gemma_edge(*ask, "--system", system).out
    done = gemma_edge(*ask, "--prefix", prefix, "--lookup")
    assert done.code == 0, done.err
    assert "guessed ahead" in done.err


def test_what_cannot_be_is_refused_before_the_export(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    def refusal(*options: object) -> str:
        done = gemma_edge("export", checkpoint, "-o", tmp_path / "refused", *options)
        assert done.code == 3
        assert not (tmp_path / "refused").exists()
        return done.err

    assert "a .pte has no int8 KV cache; leave out --kv, or choose --format onnx" in refusal("--kv", "int8")
    assert "--kv-data is for the scales of an int8 KV cache" in refusal("--format", "onnx", "--kv-data", "x")
    missing = refusal("--format", "onnx", "--kv", "int8", "--kv-data", tmp_path / "none")
    assert str(tmp_path / "none") in missing
    assert "quantizing" not in missing
