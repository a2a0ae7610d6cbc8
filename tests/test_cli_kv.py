"""Bundles with int8 KV caches, through the commands."""

import json
from pathlib import Path

import pytest

from export.manifest import read_manifest
from tests.bundles import Cli, Run


@pytest.fixture
def bundle(gemma_edge: Cli, checkpoint: Path, tmp_path: Path, text: Path) -> Path:
    out = tmp_path / "bundle"
    done = gemma_edge("export", checkpoint, "-o", out, "--format", "onnx", "--kv", "int8", "--kv-data", text)
    assert done.code == 0, done.err
    assert "scales of keys and values in the file are the calibrated ones" in done.out
    return out


def test_every_command_takes_such_a_bundle(gemma_edge: Cli, checkpoint: Path, bundle: Path, text: Path) -> None:
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


def test_a_prefix_and_guesses_work_with_int8_caches(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    system, prefix = tmp_path / "system.txt", tmp_path / "prefix"
    system.write_text("Be brief.")
    assert gemma_edge("prefill", bundle, "--system", system, "-o", prefix).code == 0

    def answer(*options: object) -> Run:
        done = gemma_edge("generate", bundle, "one two one two one two", "--chat", "-n", "8", *options)
        assert done.code == 0, done.err
        return done

    assert answer("--prefix", prefix).out == answer("--system", system).out
    assert "guessed ahead" in answer("--prefix", prefix, "--lookup").err


def test_what_cannot_be_is_refused_before_the_export(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    def refusal(*options: object) -> str:
        done = gemma_edge("export", checkpoint, "-o", tmp_path / "refused", *options)
        assert done.code == 3
        assert not (tmp_path / "refused").exists()
        return done.err

    assert "a .pte has no int8 KV cache; leave out --kv, or choose --format onnx" in refusal("--kv", "int8")
    assert "--kv-data is for the scales of an int8 KV cache" in refusal("--format", "onnx", "--kv-data", "x")
    assert "none" in refusal("--format", "onnx", "--kv", "int8", "--kv-data", tmp_path / "none")
