"""Tiny models as .onnx files, for the tests of the exporter and of the session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.onnx.text import OnnxReport, export_onnx, read_back_onnx
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.model import Gemma3
from quant.activations import with_integer_weights
from quant.recipe import QuantizedWeights, preset, quantize
from runtime_py.sessions.onnx import OnnxSession
from runtime_py.sessions.protocol import Pixels
from tests.seeing import eager_logits
from tests.shapes import random_model


@dataclass(frozen=True)
class TinyOnnx:
    path: Path
    config: ModelConfig
    layout: CacheLayout
    weights: QuantizedWeights
    report: OnnxReport

    def session(self, threads: int = 1) -> OnnxSession:
        return OnnxSession(self.path, self.layout, self.config, threads)

    def eager(self) -> Gemma3:
        """The eager model with the same integers and float activations."""
        return with_integer_weights(random_model(self.config), self.weights.integers, "float")

    def eager_logits(self, ids: list[int], images: Sequence[Pixels] = ()) -> torch.Tensor:
        """[len(ids), V] of it, fed at once."""
        return eager_logits(self.eager(), ids, images)

    def assert_integers_are_the_quantizers(self) -> None:
        expected, stored = self.weights.integers, read_back_onnx(self.path)
        assert stored.keys() == expected.keys()
        for name, weight in expected.items():
            assert stored[name].bits == weight.bits
            assert torch.equal(stored[name].codes, weight.codes), name
            assert torch.equal(stored[name].scales, weight.scales), name
        assert self.report.integers_equal == sum(weight.codes.numel() for weight in expected.values())
        assert self.report.integers_unequal == 0


def quantized_weights(config: ModelConfig, scheme: str, embedding: str | None) -> QuantizedWeights:
    state = random_model(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return quantize(state.items(), preset(scheme, embedding))


def tiny_onnx(
    config: ModelConfig,
    directory: Path,
    scheme: str = "fp32",
    embedding: str | None = None,
    *,
    context: int = 128,
    accuracy_level: int = 1,
) -> TinyOnnx:
    weights = quantized_weights(config, scheme, embedding)
    layout = cache_layout(config, "compacting", context, chunk=8)
    path = directory / "model.onnx"
    report = export_onnx(config, weights.tensors, layout, path, accuracy_level=accuracy_level)
    return TinyOnnx(path, config, layout, weights, report)
