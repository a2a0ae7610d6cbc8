"""Tiny models as .onnx files, for the tests of the exporter and of the session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.integers import IntegerCounts, compare_integers
from export.onnx.read_back import read_back_onnx
from export.onnx.target import ONNX
from export.onnx.write import export_onnx
from export.target import ExportReport
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.images import Pixels
from gemma3.model import Gemma3
from quant.eager import with_integer_weights
from quant.integers import IntegerWeight
from quant.methods import quantize_weights
from quant.recipe import scheme_recipe
from quant.weights import QuantizedWeights
from runtime_py.sessions.onnx import OnnxSession
from tests.seeing import eager_logits
from tests.shapes import random_model


@dataclass(frozen=True)
class TinyOnnx:
    path: Path
    config: ModelConfig
    layout: CacheLayout
    weights: QuantizedWeights
    report: ExportReport

    def counts(self) -> IntegerCounts:
        """How many of the quantizer's integers are in the file."""
        return compare_integers(self.weights.tensors, ONNX, self.path)

    def session(self, threads: int = 1) -> OnnxSession:
        return OnnxSession(self.path, self.layout, self.config, threads)

    def eager(self) -> Gemma3:
        """The eager model with the same integers and float activations."""
        model = random_model(self.config)
        with_integer_weights(model, self.weights.integers)
        return model

    def eager_logits(self, ids: list[int], images: Sequence[Pixels] = ()) -> torch.Tensor:
        """The eager model's, [len(ids), V], all ids in one call."""
        return eager_logits(self.eager(), ids, images)

    def assert_integers_are_the_quantizers(self) -> None:
        expected, stored = self.weights.integers, dict(read_back_onnx(self.path))
        assert stored.keys() == expected.keys()
        for name, weight in expected.items():
            found = stored[name]
            assert isinstance(found, IntegerWeight)
            assert found.bits == weight.bits
            assert torch.equal(found.codes, weight.codes), name
            assert torch.equal(found.scales, weight.scales), name
        counts = self.counts()
        assert counts.total_equal == sum(weight.codes.numel() for weight in expected.values())
        assert counts.total_unequal == 0


def quantized_weights(config: ModelConfig, scheme: str, embedding: str | None) -> QuantizedWeights:
    state = random_model(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return quantize_weights(state.items(), scheme_recipe(scheme, embedding))


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
    report = export_onnx(config, weights.tensors, layout, path, weights.tensors if accuracy_level == 1 else ())
    return TinyOnnx(path, config, layout, weights, report)
