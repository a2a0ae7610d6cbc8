"""Tiny checkpoints with a tokenizer, and bundles made from them through the command line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cli
from gemma3.config import parse_config
from gemma3.tokenizer import END_OF_IMAGE, IMAGE_SOFT_TOKEN, START_OF_IMAGE
from scripts.random_checkpoint import made_up_tokenizer
from tests.shapes import SHAPES, VISION_SHAPES, random_model

# Enough rows for Gemma's special ids, the bytes and the printable characters.
CONFIG: dict[str, Any] = SHAPES["like-270m"] | {
    "vocab_size": 640,
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
    "max_position_embeddings": 160,
}
VOCABULARY = 640  # of the ``tokenizer`` fixture
IMAGE_PIECES = {637: START_OF_IMAGE, 638: END_OF_IMAGE, 639: IMAGE_SOFT_TOKEN}
SEEING_CONFIG = VISION_SHAPES["like-4b"] | {
    "text_config": CONFIG,
    **dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), IMAGE_PIECES, strict=True)),
}
EXPORT = ("--context", "96", "--chunk", "8")


def write_checkpoint(directory: Path, base: dict[str, Any] = CONFIG, **changes: Any) -> Path:
    """A random checkpoint at ``directory``, in Hugging Face's layout. With SEEING_CONFIG it is multimodal."""
    directory.mkdir(parents=True)
    config = base | changes
    parsed = parse_config(config)
    tensors = {name: tensor.clone() for name, tensor in random_model(parsed).state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.model").write_bytes(
        made_up_tokenizer(parsed.vocab_size, None if parsed.vision is None else IMAGE_PIECES)
    )
    return directory


def rewrite_tensors(checkpoint: Path, change: Any) -> None:
    """Apply ``change`` to the checkpoint's dict of tensors, in place."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


class Run:
    """One run of the command line in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Cli = Callable[..., Run]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Run:
    monkeypatch.setattr(sys, "argv", ["gemma-edge", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    captured = capsys.readouterr()
    return Run(code, captured.out, captured.err)


def copy_bundle(bundle: Path, to: Path) -> Path:
    return Path(shutil.copytree(bundle, to))


def refused(result: Run, code: int, *words: str) -> None:
    """The command ended with ``code`` and one error line with ``words`` in it, and wrote nothing to stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
