"""The comparison far out in a context, on tiny models with 131 072 positions and RoPE's factor 8."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.onnx.write import export_onnx
from gemma3.cache import CacheDtype, cache_layout
from gemma3.config import ModelConfig, Rope
from quant.eager import quantized_model
from runtime_py.sessions.onnx import OnnxSession
from scripts.long_context import Far, starts
from tests.export.onnx.test_kv import scales
from tests.onnx_models import quantized_weights
from tests.shapes import random_tokens, tiny_config

CONTEXT, CHUNK = 131_072, 8
TOLERANCE = 2e-4


def far_onnx(config: ModelConfig, kv: CacheDtype, path: Path, exported: ModelConfig | None = None) -> tuple[Far, int]:
    """The file and the eager model; ``exported`` is the configuration of the file, if it is another."""
    rounding = scales(config) if kv == "int8" else {}
    weights = replace(quantized_weights(config, "fp32", None), kv=rounding)
    layout = cache_layout(config, "compacting", CONTEXT, CHUNK, kv)
    export_onnx(exported or config, weights.tensors, layout, path, kv=rounding)
    session = OnnxSession(path, layout, config, threads=1)
    return Far(session, layout, quantized_model(config, weights), rounding), starts(layout, config.sliding_window, 4)[0]


@pytest.fixture
def config() -> ModelConfig:
    config = tiny_config("like-4b", max_position_embeddings=CONTEXT, num_hidden_layers=6)
    assert config.global_rope.factor == 8.0
    return config


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_the_file_equals_the_eager_model_at_wraps_and_at_the_end(
    kv: CacheDtype, config: ModelConfig, tmp_path: Path
) -> None:
    far, first = far_onnx(config, kv, tmp_path / "model.onnx")
    ids = random_tokens(config, 4)
    for start in (first, 2 * (8 + 16) - 9, 2**15 - 2, 2**16 - 2, CONTEXT - 4):
        far.go(start)
        seen = [position for position, found, wanted in far.steps(ids) if np.abs(found - wanted).max() <= TOLERANCE]
        assert seen == list(range(start, start + 4))


def test_a_wrong_factor_of_rope_shows_at_the_end(config: ModelConfig, tmp_path: Path) -> None:
    wrong = replace(config, global_rope=Rope(config.global_rope.theta, 8.001))
    far, _ = far_onnx(config, "float32", tmp_path / "model.onnx", wrong)
    far.go(CONTEXT - 4)
    assert all(
        np.abs(found - wanted).max() > 10 * TOLERANCE for _, found, wanted in far.steps(random_tokens(config, 4))
    )
