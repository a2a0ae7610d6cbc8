"""`gemma-edge qat`: from a checkpoint and text to a quantized checkpoint that exports as it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from quant.qat.loss import Distillation
from quant.stored import load_quantized
from tests.bundles import EXPORT, SEEING_CONFIG, Cli, Run, write_checkpoint

SMALL = ("--steps", "3", "--batch", "2", "--length", "16", "--save-every", "2")


def assert_refused(result: Run, *words: str) -> None:
    assert result.code == 3, result.err
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result.err
    for word in words:
        assert word in result.err


def test_the_trained_integers_are_stored_and_exported(
    gemma_edge: Cli, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trained"
    result = gemma_edge("qat", checkpoint, "-o", out, "--data", text, "--scheme", "int4-channel", *SMALL)
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]
    stored = load_quantized(out)
    assert (stored.method, stored.recipe.name) == ("qat", "int4-channel+embedding-int8")
    assert str(stored.weights.verdicts["model.layers.0.mlp.up_proj.weight"]) == "int4-channel: trained"
    assert str(stored.weights.verdicts["model.norm.weight"]).startswith("float32: kept")

    result = gemma_edge("export", out, "-o", tmp_path / "bundle", "--format", "onnx", *EXPORT)
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["weights"] == {name: asdict(verdict) for name, verdict in stored.weights.verdicts.items()}
    assert all(check["passed"] for check in manifest["validation"])


def test_interrupted_and_resumed(
    gemma_edge: Cli, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("qat", checkpoint, "--data", text, *SMALL)
    assert gemma_edge(*command, "-o", tmp_path / "whole").code == 0
    forward = Distillation.forward
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "forward", lambda *arguments: forward(*arguments) * float("nan"))
        result = gemma_edge(*command, "-o", tmp_path / "out")
    assert_refused(result_without_log(result), "step 1: loss nan", "nothing had been saved yet")

    calls: list[int] = []

    def fail_in_the_third(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "forward", fail_in_the_third)
        assert gemma_edge(*command, "-o", tmp_path / "out").code == 4
    assert (tmp_path / "out.training" / "step-00000002").is_dir()
    assert_refused(result_without_log(gemma_edge(*command, "-o", tmp_path / "out")), "at step 2; give --resume")
    other = gemma_edge(*command, "-o", tmp_path / "out", "--resume", "--scheme", "int4-channel")
    assert_refused(result_without_log(other), "was started with recipe balanced")
    assert gemma_edge(*command, "-o", tmp_path / "out", "--resume").code == 0
    whole, resumed = load_quantized(tmp_path / "whole").weights, load_quantized(tmp_path / "out").weights
    for name, weight in whole.integers.items():
        assert torch.equal(weight.codes, resumed.integers[name].codes)
    assert not (tmp_path / "out.training").exists()


def result_without_log(result: Run) -> Run:
    lines = [line for line in result.err.splitlines() if " rows of " not in line]
    return Run(result.code, result.out, "\n".join(lines))


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (b"", (), ("holds no text",)),
        (b"\x80", (), ("not UTF-8", "0x80")),
        (b"few", (), ("less than one row of 16",)),
        (b"text " * 40, ("--scheme", "fp32"), ("nothing to train",)),
        (b"text " * 40, ("--lr", "0"), ("lr is 0",)),
        (b"text " * 40, ("--resume",), ("no saved step",)),
        (b"text " * 40, ("--init", "/nowhere"), ("/nowhere",)),
        (b"text " * 40, ("--teacher", "/nowhere"), ("/nowhere",)),
    ],
)
def test_refusals(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path, data: bytes, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "data.txt").write_bytes(data)
    result = gemma_edge("qat", checkpoint, "-o", tmp_path / "out", "--data", tmp_path / "data.txt", *SMALL, *options)
    assert_refused(result_without_log(result), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def test_without_data(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(gemma_edge("qat", checkpoint, "-o", tmp_path / "out"), "training needs text", "--data")


def test_a_teacher_with_another_vocabulary(gemma_edge: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher", vocab_size=648)
    result = gemma_edge("qat", checkpoint, "-o", tmp_path / "out", "--data", text, "--teacher", teacher, *SMALL)
    assert_refused(result_without_log(result), "vocabulary of 648, the student of 640")


def test_image_conversations(gemma_edge: Cli, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "seeing", SEEING_CONFIG)
    PIL.Image.new("RGB", (600, 256), "red").save(tmp_path / "wide.png")
    content = [{"type": "image", "image": "wide.png"}, {"type": "text", "text": "what colour?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    options = (*SMALL, "--length", "200", "--pan-and-scan")
    result = gemma_edge("qat", checkpoint, "-o", tmp_path / "out", "--data", data, *options)
    assert result.code == 0, result.err
    verdicts = load_quantized(tmp_path / "out").weights.verdicts
    assert (
        str(verdicts["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"]) == "int8-channel: trained"
    )
    assert str(verdicts["multi_modal_projector.mm_input_projection_weight"]).startswith("float32: kept")

    text_only = write_checkpoint(tmp_path / "text-only")
    result = gemma_edge(
        "qat", checkpoint, "-o", tmp_path / "no", "--data", data, "--teacher", text_only, "--length", "200"
    )
    assert_refused(result_without_log(result), "text-only: its vision model is not that of")
    result = gemma_edge("qat", text_only, "-o", tmp_path / "no", "--data", data)
    assert_refused(result_without_log(result), "1 image for a text-only model")
    result = gemma_edge("quantize", checkpoint, "-o", tmp_path / "no", "--method", "gptq", "--data", data)
    assert result.code == 3
    assert "gptq uses text only" in result.err
