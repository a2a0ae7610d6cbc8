"""The .onnx target: graphs for ONNX Runtime, which onnxruntime-genai can run too."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.target import ExportReport, Target
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig

if TYPE_CHECKING:
    from quant.weights import QuantizedWeight, Weights


def _export(
    config: ModelConfig, weights: "Weights", layout: CacheLayout, eos_ids: Sequence[int], path: Path
) -> ExportReport:
    from export.onnx.write import export

    return export(config, weights, layout, eos_ids, path)


def _read_back(path: Path) -> "Iterator[tuple[str, QuantizedWeight]]":
    from export.onnx.read_back import read_back_onnx

    return read_back_onnx(path)


ONNX = Target(
    name="onnx",
    file="model.onnx",
    cache_style="compacting",
    # MatMulNBits rounds activations too, by block. The reference does not, so the proof counts it as a difference.
    activations="float",
    kinds=frozenset({"integers", "sfp8"}),
    stand_ins={"sfp8": "int8-block32-padded"},
    packages=("onnx", "onnx-ir", "onnxruntime"),
    export=_export,
    read_back=_read_back,
)
