"""`gemma-edge accuracy` over a checkpoint, quantized checkpoints and bundles."""

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from gemma3.checkpoint import open_checkpoint
from quant.methods import quantize_weights
from quant.recipe import scheme_recipe
from quant.stored import save_quantized
from tests.bundles import EXPORT, Cli, Run, copy_bundle, rewrite_tensors, run, write_checkpoint


@pytest.fixture
def accuracy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return lambda *arguments: run(capsys, monkeypatch, "accuracy", *arguments)


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Path:
    """Longer than two contexts of 96 tokens."""
    path = checkpoint.parent / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(string.printable.strip()), 250)))
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Path:
    recipe = scheme_recipe("int4-block32", "int4")
    source = open_checkpoint(checkpoint)
    save_quantized(
        checkpoint.parent / "rtn", quantize_weights(source.items(), recipe), recipe, "rtn", source=checkpoint
    )
    return checkpoint.parent / "rtn"


def export(checkpoint: Path, scheme: str, *options: str) -> Path:
    out = checkpoint.parent / scheme
    arguments = ("export", checkpoint, "-o", out, "--format", "onnx", "--scheme", scheme, *options, *EXPORT)
    cli.app(list(map(str, arguments)), standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export(checkpoint, "int4-block32", "--embedding", "int4")


def report(result: Run) -> dict[str, Any]:
    assert result.code == 0, result.err
    parsed: dict[str, Any] = json.loads(result.out)
    return parsed


def assert_refused(result: Run, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_an_fp32_file_equals_the_original(accuracy: Cli, checkpoint: Path, text: Path) -> None:
    exact = export(checkpoint, "fp32")
    figures = report(accuracy(exact, "--reference", checkpoint, "--data", text, "--json"))
    assert figures["data_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert figures["context"] == 96
    assert figures["tokens"] > 192
    (quality,) = figures["quality"].values()
    assert quality["tokens"] == figures["tokens"]
    assert quality["kl_max"] < 1e-6
    assert quality["same_top"]["value"] == 1.0
    assert abs(quality["delta_nll"]["value"]) < 1e-5
    assert figures["fidelity"] == figures["integers"] == figures["questions"] == {}


def test_what_quantization_cost_and_what_the_export_changed(
    accuracy: Cli, checkpoint: Path, quantized: Path, bundle: Path, text: Path
) -> None:
    """The bundle holds the quantized checkpoint's integers, so their eager model explains its loss."""
    figures = report(
        accuracy(
            *(bundle, "--reference", checkpoint, "--data", text, "--tokens", "120"),
            *("--checkpoint", quantized, "--baseline", quantized, "--json"),
        )
    )
    assert figures["tokens"] == 120
    assert list(figures["quality"]) == ["int4-block32 .onnx", "rtn"]
    assert list(figures["fidelity"]) == ["int4-block32 .onnx"]
    of_file, of_eager = figures["quality"].values()
    (fidelity,) = figures["fidelity"].values()
    assert of_file["kl"]["value"] == pytest.approx(of_eager["kl"]["value"], rel=0.1)
    assert fidelity["kl"]["value"] < of_file["kl"]["value"] / 20
    # The file's own reference rounds activations, the checkpoint's eager model does not.
    assert fidelity["reference_perplexity"] == pytest.approx(of_eager["perplexity"], rel=0.01)
    (integers,) = figures["integers"].values()
    assert integers["value"] == 1.0
    assert figures["baselines"] == ["rtn"]


def test_tables_keep_the_two_references_apart(
    accuracy: Cli, checkpoint: Path, quantized: Path, bundle: Path, text: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"category": "sum", "prompt": "1+1?", "answer": "2"}\n')
    result = accuracy(
        *(bundle, "--reference", checkpoint, "--data", text, "--tokens", "40", "--context", "24"),
        *("--checkpoint", checkpoint, "--baseline", quantized, "--questions", questions),
    )
    assert result.code == 0, result.err
    assert "40 tokens in stretches of at most 24" in result.out
    quality, fidelity = result.out.split("Export fidelity: against its own quantized eager model")
    assert "Quality: against the original model" in quality
    assert "rtn" in quality
    assert "rtn" not in fidelity.split("Exact match")[0]
    assert "int4-block32 .onnx: integers in the file are the quantizer's" in fidelity
    assert "0 of 1" in fidelity
    assert "tokens, int4-block32 .onnx" in result.err


def test_a_checkpoint_against_itself(accuracy: Cli, checkpoint: Path, text: Path) -> None:
    figures = report(accuracy(checkpoint, "--reference", checkpoint, "--data", text, "--tokens", "50", "--json"))
    assert figures["quality"]["tiny"]["kl_max"] == 0
    assert figures["quality"]["tiny"]["delta_nll"] == {"value": 0.0, "error": 0.0}


def test_conversations(accuracy: Cli, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    figures = report(accuracy(checkpoint, "--reference", checkpoint, "--data", data, "--json"))
    assert figures["tokens"] % 3 == 0
    assert figures["tokens"] > 30


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no text"), (b"\n \n", "no text"), (b"\x89PNG\x00", "UTF-8"), (b"a\x00b", "binary")]
)
def test_data_that_is_not_text(accuracy: Cli, checkpoint: Path, tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "data").write_bytes(content)
    result = accuracy(checkpoint, "--reference", checkpoint, "--data", tmp_path / "data")
    assert_refused(result, 3, str(tmp_path / "data"), word)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--data", "/nowhere"), 3, ("/nowhere", "cannot be read")),
        (("--tokens", "1"), 3, ("number of tokens is 1",)),
        (("--context", "97"), 4, ("97", "96 positions", "--context 96")),
        (("--context", "0"), 3, ("context 0 holds no text",)),
        (("--questions", "/nowhere"), 3, ("/nowhere", "cannot be read")),
        (("--format", "pte"), 3, ("holds no .pte", "--format onnx")),
        (("--baseline", "/nowhere"), 3, ("/nowhere", "does not exist")),
        (("--reference", "/nowhere"), 3, ("/nowhere", "does not exist")),
    ],
)
def test_refusals(
    accuracy: Cli, checkpoint: Path, bundle: Path, text: Path, options: tuple[str, ...], code: int, words: Any
) -> None:
    assert_refused(accuracy(bundle, "--reference", checkpoint, "--data", text, *options), code, *words)


def test_a_checkpoint_that_the_bundle_was_not_exported_from(
    accuracy: Cli, checkpoint: Path, bundle: Path, text: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other")
    rewrite_tensors(other, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(-1))
    result = accuracy(bundle, "--reference", checkpoint, "--data", text, "--checkpoint", other)
    assert_refused(result, 5, "integers in the file")


def test_checkpoint_is_for_bundles(accuracy: Cli, checkpoint: Path, text: Path) -> None:
    result = accuracy(checkpoint, "--reference", checkpoint, "--data", text, "--checkpoint", checkpoint)
    assert_refused(result, 3, "is not a bundle")


def test_a_reference_with_another_vocabulary(
    accuracy: Cli, checkpoint: Path, bundle: Path, text: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", vocab_size=641)
    assert_refused(accuracy(bundle, "--reference", other, "--data", text), 3, "tokenizer")


def test_a_quantized_checkpoint_of_another_model(
    accuracy: Cli, checkpoint: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    wrong = copy_bundle(quantized, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text()) | {"num_hidden_layers": 4}
    (wrong / "config.json").write_text(json.dumps(config))
    result = accuracy(wrong, "--reference", checkpoint, "--data", text)
    assert_refused(result, 3, "model.layers.3", "is missing")
