"""The .pte target: one ExecuTorch program with XNNPACK delegates."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.target import Cost, ExportReport, Target, second_table
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig

if TYPE_CHECKING:
    from gemma3.model import RoundHeads
    from quant.activations import Rounding
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
    from export.executorch.lower import export_pte

    assert not float_activations, "XNNPACK has no such kernel"
    return export_pte(config, weights, layout, eos_ids, path)


def _read_back(path: Path) -> "Iterator[tuple[str, QuantizedWeight]]":
    from export.executorch.read_back import read_back_pte

    return read_back_pte(path)


def _per_token() -> "Rounding":
    """XNNPACK's 8da4w and 8da8w kernels."""
    from quant.activations import per_token

    return per_token


PTE = Target(
    name="pte",
    file="model.pte",
    cache_style="ring",
    kinds=frozenset({"integers"}),
    stand_ins={"sfp8": "int8-channel"},
    packages=("executorch", "torch", "torchao"),
    export=_export,
    read_back=_read_back,
    roundings={"int8-per-token": _per_token},
    repeated_bytes=second_table,
    cost=Cost(
        base=150 << 20,
        layer_bytes=6 << 20,
        file=1.0,
        running=1.75,
        layer_seconds=4.0,
        trillion_seconds=150.0,
    ),
)
