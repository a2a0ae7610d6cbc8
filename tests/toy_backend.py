"""A third backend, as docs/extending.md describes it: the weights in a safetensors file, run by the eager network."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.target import FORWARD, ExportReport, Method, Target, TensorSpec
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.model import RoundHeads
from quant.eager import quantized_model
from quant.integers import IntegerWeight
from quant.recipe import Verdict
from quant.weights import QuantizedWeight, QuantizedWeights, Weight, Weights
from runtime_py.backends import Backend, OpenGraph
from runtime_py.sessions.eager import EagerSession

CODES, SCALES = ".codes", ".scales"


def export(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    eos_ids: Sequence[int],
    path: Path,
    float_activations: Collection[str],
    kv: Mapping[int, RoundHeads],
) -> ExportReport:
    """Floats as float32, integers as their codes and scales. The bits are in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    bits: dict[str, str] = {}
    for name, weight in weights.items():
        if isinstance(weight, IntegerWeight):
            tensors |= {name + CODES: weight.codes, name + SCALES: weight.scales}
            bits[name] = str(weight.bits)
        else:
            assert isinstance(weight, Tensor)
            tensors[name] = weight.float().contiguous()
    save_file(tensors, path, {name: bits[name] for name in sorted(bits)} or None)
    tokens = TensorSpec("tokens", "int64", (1, "length"))
    logits = TensorSpec("logits", "float32", (1, 1, config.vocab_size))
    method = Method(FORWARD, path.name, (tokens,), (logits,))
    return ExportReport((method,), (path.name,), details={"tensors": len(tensors)})


def read_back(path: Path) -> Iterator[tuple[str, QuantizedWeight]]:
    return ((name, weight) for name, weight in read(path).items() if isinstance(weight, IntegerWeight))


def read(path: Path) -> dict[str, Weight]:
    with safe_open(path, framework="pt") as file:
        bits = {name: int(text) for name, text in (file.metadata() or {}).items()}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    floats: dict[str, Weight] = {name: tensor for name, tensor in stored.items() if not name.endswith((CODES, SCALES))}
    return floats | {name: IntegerWeight(stored[name + CODES], stored[name + SCALES], bits[name]) for name in bits}


def open_graph(path: Path, layout: CacheLayout, config: ModelConfig, threads: int | None) -> EagerSession:
    weights = read(path)
    verdicts = dict.fromkeys(weights, Verdict("as stored", ""))
    return EagerSession(quantized_model(config, QuantizedWeights(weights, verdicts)), layout)


def import_runtime() -> OpenGraph:
    return open_graph


TOY = Backend(
    Target(
        name="toy",
        file="model.toy",
        cache_style="ring",
        kinds=frozenset({"integers"}),
        stand_ins={"sfp8": "int8-channel"},
        packages=("torch", "safetensors"),
        export=export,
        read_back=read_back,
    ),
    import_runtime=import_runtime,
)
