"""The .onnx target: graphs for ONNX Runtime, which onnxruntime-genai can run too."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.target import FLOAT, Cost, ExportReport, Target
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig

if TYPE_CHECKING:
    from gemma3.model import RoundHeads
    from quant.activations import Rounding
    from quant.kv import PerChannel
    from quant.weights import QuantizedWeight, Weights


def _export(
    config: ModelConfig,
    weights: "Weights",
    layout: CacheLayout,
    eos_ids: Sequence[int],
    path: Path,
    float_activations: Collection[str],
    kv: "Mapping[int, RoundHeads]",
) -> ExportReport:
    from export.onnx.write import export

    return export(config, weights, layout, eos_ids, path, float_activations, kv)


def _read_back(path: Path) -> "Iterator[tuple[str, QuantizedWeight]]":
    from export.onnx.read_back import read_back_onnx

    return read_back_onnx(path)


def _read_kv(path: Path) -> "Iterator[tuple[int, PerChannel]]":
    from export.onnx.read_back import stored_kv_scales

    return stored_kv_scales(path)


def _per_block() -> "Rounding":
    from export.onnx.rounding import per_block

    return per_block


def _kleidiai() -> "Rounding":
    from export.onnx.rounding import kleidiai

    return kleidiai


def _float() -> "Rounding":
    from quant.activations import keep_float

    return keep_float


ONNX = Target(
    name="onnx",
    file="model.onnx",
    cache_style="compacting",
    kinds=frozenset({"integers", "sfp8"}),
    stand_ins={"sfp8": "int8-block32-padded"},
    packages=("onnx", "onnx-ir", "onnxruntime"),
    export=_export,
    read_back=_read_back,
    # The last one: ARM processors without dot products have no such kernels, and multiply in float32.
    roundings={"int8-per-block": _per_block, "int8-kleidiai": _kleidiai, FLOAT: _float},
    read_kv=_read_kv,
    can_keep_float=True,
    cost=Cost(tables=1.0, running=1.75, layer_seconds=0.2, trillion_seconds=150.0),
)
