"""The Python API: one function for each step from a checkpoint to text. The command line calls these functions too.

    from runtime_py.api import export_bundle, generate, open_bundle, open_checkpoint, quantize

    checkpoint = open_checkpoint("demo")
    quantized = quantize(checkpoint, "int4-block32")
    export_bundle(quantized, "bundle", formats=["onnx"])
    for text in generate(open_bundle("bundle"), "What is the capital of France?", chat=True):
        print(text, end="", flush=True)

Heavy packages are imported when they are needed. Opening and running an .onnx does not import torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export.checks import Check
from export.manifest import Manifest
from gemma3.cache import CacheDtype
from gemma3.errors import BadInput
from quant.recipe import DEFAULT, Activations, Recipe, named_recipe
from runtime_py.backends import BACKENDS, backend_of
from runtime_py.backends import open_session as _open_session
from runtime_py.generate import Sampler
from runtime_py.proof.prove import prove
from runtime_py.proof.prove import validate as _validate
from runtime_py.sessions.protocol import Session
from runtime_py.text import OpenBundle, generate, prefill
from runtime_py.text import open_bundle as _open_bundle

if TYPE_CHECKING:
    from quant.source import QuantizedCheckpoint, Source

__all__ = [
    "Sampler",
    "export_bundle",
    "generate",
    "open_bundle",
    "open_checkpoint",
    "open_session",
    "prefill",
    "quantize",
    "save_checkpoint",
    "validate",
]


def open_checkpoint(model: str | Path) -> "Source":
    """Open a checkpoint, full-precision or quantized. ``model`` is a directory, "demo" or "demo-vision".

    A full-precision checkpoint's weights stay on disk until they are used. Raises BadInput for anything that is not a
    Gemma 3 checkpoint.
    """
    from gemma3.checkpoint import resolve_checkpoint
    from quant.source import open_source

    return open_source(resolve_checkpoint(str(model)))


def quantize(
    checkpoint: "Source",
    recipe: str | Recipe = DEFAULT,
    method: Literal["mse", "rtn", "gptq"] = "mse",
    *,
    data: Sequence[Path] = (),
    tokens: int | None = None,
) -> "QuantizedCheckpoint":
    """Quantize a full-precision checkpoint by ``recipe``, or the preset or scheme of this name, without training.

    ``method`` chooses the integers: "mse" rounds to nearest under the scales with the least squared error, "rtn" under
    absmax scales. "gptq" is calibrated on the first ``tokens`` tokens (None: 65,536) of the files
    ``data``. Raises BadInput when the checkpoint is quantized already, and for recipes and data that do not fit.
    """
    from quant.quantize import CALIBRATION_TOKENS
    from quant.quantize import quantize as run
    from quant.source import full_precision

    wanted = named_recipe(recipe) if isinstance(recipe, str) else recipe
    return run(full_precision(checkpoint), wanted, method, data=data, tokens=tokens or CALIBRATION_TOKENS)


def save_checkpoint(checkpoint: "QuantizedCheckpoint", out: str | Path) -> None:
    """Write a quantized checkpoint to the new directory ``out``, which appears whole.

    Raises BadInput as ``quant.stored.save_quantized`` does.
    """
    from quant.stored import save_quantized

    save_quantized(Path(out), checkpoint.weights, checkpoint.recipe, checkpoint.method, source=checkpoint.path)


def export_bundle(
    checkpoint: "str | Path | Source",
    out: str | Path,
    *,
    recipe: str | Recipe | None = None,
    activations: Activations | None = None,
    formats: Sequence[str] | None = None,
    context: int | None = None,
    chunk: int | None = None,
    exact_sfp8: bool = False,
    kv: CacheDtype = "float32",
    kv_data: Sequence[Path] = (),
) -> Manifest:
    """Export a checkpoint to ``formats`` (None: all known ones) and prove the files. Then the bundle ``out`` appears.

    A full-precision checkpoint is quantized by ``recipe``, or the preset or scheme of this name (None: the default
    preset), with the default method of ``quantize``; a quantized one keeps its integers. ``activations`` replaces what
    the recipe says about them (see ``quant.recipe.Rule``). ``kv`` is the dtype of the KV caches; scales of an int8 one
    are calibrated on the files ``kv_data`` (see ``quant.kv``). The other arguments are those of
    ``export.bundle.draft_bundle``. Raises BadInput and DoesNotFit for what cannot be exported, and VerificationFailed
    when a file does not agree with its reference. After any error nothing is left behind.
    """
    from gemma3.host.atomic import refuse_target

    out = Path(out)
    refuse_target(out)
    from export.bundle import cache_layouts, check_exportable, draft_bundle, seal
    from export.preflight import preflight
    from quant.kv import calibrate, calibration_rows
    from quant.quantize import in_recipe
    from quant.source import QuantizedCheckpoint

    source = open_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = [backend_of(format).target for format in formats or BACKENDS]
    if isinstance(recipe, str):
        recipe = named_recipe(recipe)
    wanted = recipe or (source.recipe if isinstance(source, QuantizedCheckpoint) else DEFAULT)
    if activations is not None:
        wanted = wanted.with_activations(activations)
    check_exportable(source, targets, wanted, context, chunk, kv)
    if kv_data and kv != "int8":
        raise BadInput("--kv-data is for the scales of an int8 KV cache; add --kv int8 or leave it out")
    preflight(source, targets, wanted, cache_layouts(source.config, targets, context, chunk, kv), out.parent)
    rows = calibration_rows(source, kv_data) if kv == "int8" else None
    quantized = in_recipe(source, wanted)
    scales = None if rows is None else calibrate(quantized, rows)
    with draft_bundle(
        quantized,
        out,
        targets=targets,
        context=context,
        chunk=chunk,
        exact_sfp8=exact_sfp8,
        kv=kv,
        kv_scales=scales,
    ) as draft:
        manifest = seal(draft, prove(draft))
    return manifest


def validate(bundle: str | Path, checkpoint: "str | Path | Source | None" = None) -> list[Check]:
    """Replay the proof of ``bundle``. Returns every check, whether it passed or not.

    With the checkpoint that the bundle was exported from, the references are computed again. A figure outside its limit
    does not raise; ``export.checks.require_passed`` does that. Raises as ``runtime_py.proof.prove.validate`` does.
    """
    source = open_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    return _validate(Path(bundle), source)


def open_session(bundle: str | Path, format: str | None = None, threads: int | None = None) -> Session:
    """A session over one graph of ``bundle``: token ids and images in, logits out.

    ``format`` None is the bundle's first; ``threads`` None is the runtime's choice. Raises as
    ``runtime_py.backends.open_session`` does.
    """
    return _open_session(Path(bundle), format, threads)


def open_bundle(
    bundle: str | Path,
    format: str | None = None,
    threads: int | None = None,
    *,
    prefix: str | Path | None = None,
    lookup: bool = False,
    draft: str | Path | None = None,
) -> OpenBundle:
    """A session over one graph of ``bundle`` and its tokenizer, for ``generate`` and ``prefill``.

    ``prefix`` is a file that ``prefill`` wrote: chats begin with it, and ``format`` None is the file's. ``lookup`` and
    ``draft``, another bundle, let the session guess ahead (docs/speculation.md). The other arguments are as above.
    Raises as ``runtime_py.text.open_bundle`` does.
    """
    return _open_bundle(
        Path(bundle),
        format,
        threads,
        prefix=None if prefix is None else Path(prefix),
        lookup=lookup,
        draft=None if draft is None else Path(draft),
    )
