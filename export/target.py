"""A target describes what an exporter writes: the file, what it can hold, how it is written and how it is read back.

Each folder beside this file defines one target (``export/onnx/target.py``, ``export/executorch/target.py``). Importing
it needs neither torch nor a runtime: ``export`` and ``read_back`` import what they need when they are called.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemma3.cache import CacheLayout, CacheStyle
from gemma3.config import ModelConfig
from gemma3.names import EMBEDDING, head_of

if TYPE_CHECKING:
    from gemma3.model import RoundHeads
    from quant.activations import Rounding
    from quant.kv import PerChannel
    from quant.weights import QuantizedWeight, Weights

# The names of a graph's methods: a text-only model has one, a multimodal model three. ExecuTorch's stock runners look
# for the methods of a .pte by these names.
FORWARD = "forward"
VISION_ENCODER, TOKEN_EMBEDDING, TEXT_DECODER = "vision_encoder", "token_embedding", "text_decoder"
# One call gives the logits of at most so many of its last positions, because a .pte plans memory for them: 8.4 MB for a
# vocabulary of 262 144.
MOST_LOGITS = 8
# A .pte is asked for k rows of logits with the position + (k − 1) · LOGITS_STRIDE.
LOGITS_STRIDE = 2**32


def most_logits(layout: CacheLayout) -> int:
    """The most rows of logits that one call of a graph gives."""
    return min(MOST_LOGITS, layout.chunk)


TensorDtype = Literal["int64", "float32", "int8"]


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. A string in ``shape`` is the name of a dynamic dimension."""

    name: str
    dtype: TensorDtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Method:
    """A callable of a graph, and the file of the bundle that holds it.

    A text-only model has one method, ``forward``. A multimodal model also has ``vision_encoder``, which turns pixels
    into soft tokens. In a .onnx that is a graph in a file of its own. In a .pte the text model then consists of
    ``token_embedding`` and ``text_decoder``.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StandIn:
    """How a file holds a weight of a kind that its runtime has no kernel for: in another scheme, at a distance.

    ``decibels`` is 10 · log₁₀(Σ value² / Σ (value − stand-in)²); larger is closer.
    """

    kind: str
    scheme: str
    decibels: float


@dataclass(frozen=True)
class ExportReport:
    """What an exporter reports about the files it wrote. Equal files have equal reports."""

    methods: tuple[Method, ...]
    files: tuple[str, ...]  # the graphs and their external data, by name
    opsets: dict[str, int] = field(default_factory=dict)  # ONNX operator sets by domain
    # JSON values that only this target has: delegates, undelegated operators, accuracy level, …
    details: dict[str, Any] = field(default_factory=dict)


def no_bytes(config: ModelConfig, weights: "Weights") -> int:
    """``repeated_bytes`` of a target whose files hold no weight twice."""
    return 0


def second_table(config: ModelConfig, weights: "Weights") -> int:
    """``repeated_bytes`` of a target whose files hold a tied table twice: for the embedding and for the head."""
    from quant.weights import forms_of, ideal_bytes

    return ideal_bytes([forms_of(weights)[EMBEDDING]]) if config.tie_word_embeddings else 0


@dataclass(frozen=True)
class Cost:
    """What exporting to a target takes, for ``export.preflight``. The records say how it was measured."""

    base: int = 0  # bytes of its compiler
    layer_bytes: int = 0  # of the graph of a layer
    file: float = 0.0  # how many times the file's weights are in memory while it is written
    tables: float = 0.0  # and how many more times a byte for each value of the largest matrix
    running: float = 2.0  # how many times they are in memory when it runs
    layer_seconds: float = 1.0
    trillion_seconds: float = 40.0  # for 10¹² times that a weight meets a position of the proof's sequence


class Export(Protocol):
    """A target's exporter."""

    def __call__(
        self,
        config: ModelConfig,
        weights: "Weights",
        layout: CacheLayout,
        eos_ids: Sequence[int],
        path: Path,
        float_activations: Collection[str],
        kv: "Mapping[int, RoundHeads]",
    ) -> ExportReport:
        """Write the graph to ``path``, and the files that belong to it beside it.

        ``weights`` are by checkpoint name. The inputs of the weights ``float_activations`` are not rounded; only a
        target with ``can_keep_float`` gets any. ``kv`` says how keys and values are rounded, by layer; it is empty
        unless the ``layout`` has another dtype than float32, which only a target with ``read_kv`` gets. The same
        arguments give the same bytes. Raises BadInput for weights that do not fit the configuration or the target's
        kernels.
        """


@dataclass(frozen=True)
class Target:
    """One format that a model can be exported to. ``runtime_py.backends`` adds how its files are run and proven."""

    name: str  # of --format, and of the artifact in the manifest
    file: str  # the graph's file name in a bundle
    cache_style: CacheStyle
    kinds: frozenset[str]  # the kinds of quantized weights that the file can hold
    stand_ins: Mapping[str, str]  # kind → the scheme that replaces it, unless exact weights are asked for
    packages: tuple[str, ...]  # the packages whose versions the manifest records
    export: Export
    # The quantized weights in the file at a path, by checkpoint name. A weight comes once for every place of its use.
    read_back: Callable[[Path], "Iterator[tuple[str, QuantizedWeight]]"]
    # How its kernels round the input of a linear layer with integer weights: an entry for each kind of kernel that may
    # run the file, by name, with a function that imports it. Empty: they multiply in float32.
    roundings: Mapping[str, Callable[[], "Rounding"]] = field(default_factory=dict)
    # The scales of int8 keys and values in the file at a path, by layer, once for every place of their use. None: its
    # caches can only be float32.
    read_kv: "Callable[[Path], Iterator[tuple[int, PerChannel]]] | None" = None
    can_keep_float: bool = False  # can it keep the activations of chosen weights in floating point?
    # The bytes of weights that the file holds a second time. They come on top of the weights' ideal bytes.
    repeated_bytes: Callable[[ModelConfig, "Weights"], int] = no_bytes
    cost: Cost = field(default_factory=Cost)


FLOAT = "float"  # the name of the reference whose activations are not rounded


def rounding_of(target: Target, name: str, float_activations: Collection[str] = ()) -> "Rounding":
    """The rounding ``name`` of ``target``, or FLOAT. The inputs of ``float_activations`` are not rounded."""
    from quant.activations import keep_float

    if name == FLOAT:
        return keep_float
    rounding = target.roundings[name]()
    return lambda weight_name, weight: None if weight_name in float_activations else rounding(weight_name, weight)


def multiplied(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """The weights of ``names`` that are multiplied with: all but an embedding table that is not also the head."""
    return [name for name in names if name != EMBEDDING or head_of(config) == EMBEDDING]


def references_of(
    target: Target, config: ModelConfig, integers: Iterable[str], float_activations: Collection[str]
) -> tuple[str, ...]:
    """The names of the references with which a file of ``target`` is compared: its roundings, or FLOAT.

    ``integers`` are the names of the file's integer weights, ``float_activations`` those whose inputs are not rounded.
    """
    rounded = set(multiplied(config, integers)) - set(float_activations)
    return tuple(target.roundings) if rounded and target.roundings else (FLOAT,)
