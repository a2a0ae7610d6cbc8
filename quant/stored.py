"""Quantized checkpoints: a directory with the exact codes and scales, how they were made, and the model's other files.

    config.json, and COMPANIONS       copied from the checkpoint that was quantized
    quantized.safetensors             for each weight either ``name`` (kept in its own dtype), or
                                      ``name.codes`` and ``name.scales``

Codes are int8 [rows, columns] (integers of 4 or 8 bits, one byte each) or uint8 [rows, columns] (SFP8). Scales are
bfloat16 [rows, groups] for integers, whose scales are on that grid, and float32 [1, 1] or [rows, 1] for SFP8. The
file's metadata gives the form of each weight: "float", "sfp8", or "int4/32" for integers of 4 bits in groups of 32
columns. The same weights give the same bytes.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma3.checkpoint import CONFIG
from gemma3.errors import BadInput
from gemma3.host.atomic import staging
from quant.integers import IntegerWeight, bf16_grid
from quant.recipe import Activations, Recipe, Rule, Verdict
from quant.sfp8 import Sfp8Weight
from quant.weights import OnDemand, QuantizedWeights, Weight, form_of

SCHEMA_VERSION = 2  # 2: a verdict is a scheme and a reason; 1 had one text, and is still read
READABLE = (1, 2)
FILE = "quantized.safetensors"
# All metadata is under one key, because safetensors writes several keys in no fixed order.
METADATA_KEY = "gemma-edge"
# The dtypes of codes and scales, by form.
DTYPES = {
    "int4": (torch.int8, torch.bfloat16),
    "int8": (torch.int8, torch.bfloat16),
    "sfp8": (torch.uint8, torch.float32),
}
BITS = {"int4": 4, "int8": 8}
GROUP_SIZE = re.compile("[1-9][0-9]{0,8}")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Files that are copied from the source if it has them: of its tokenizer, its chat template, its generation and its
# processor.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a quantized checkpoint, and the recipe and method ("mse", "gptq", "qat", …) that made them."""

    weights: QuantizedWeights
    recipe: Recipe
    method: str


def is_quantized(directory: Path) -> bool:
    """Does ``directory`` hold a quantized checkpoint?"""
    return (directory / FILE).is_file()


def save_quantized(directory: Path, weights: QuantizedWeights, recipe: Recipe, method: str, *, source: Path) -> None:
    """Write the weights, and ``config.json`` and COMPANIONS of ``source``, to the new directory ``directory``.

    Raises BadInput when it exists or cannot be written, and for integers whose scales are not on the bfloat16 grid.
    The directory appears whole; after any error nothing is left behind.
    """
    assert weights.tensors.keys() == weights.verdicts.keys()
    tensors: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, weight in weights.tensors.items():
        if isinstance(weight, Tensor):
            forms[name], tensors[name] = "float", weight.contiguous()
        elif isinstance(weight, IntegerWeight):
            scales = weight.scales.bfloat16()
            if not torch.equal(scales.float(), weight.scales):
                raise BadInput(f"{name}: its scales are not on the bfloat16 grid; take them from bf16_grid")
            forms[name] = f"int{weight.bits}/{weight.group_size}"
            tensors |= {f"{name}.codes": weight.codes.contiguous(), f"{name}.scales": scales.contiguous()}
        else:
            assert isinstance(weight, Sfp8Weight)
            forms[name] = "sfp8"
            tensors |= {f"{name}.codes": weight.codes.contiguous(), f"{name}.scales": weight.scale.contiguous()}
    header = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "recipe": asdict(recipe),
        "forms": forms,
        "verdicts": {name: asdict(verdict) for name, verdict in weights.verdicts.items()},
    }
    with staging(directory) as partial:
        shutil.copyfile(source / CONFIG, partial / CONFIG)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        save_file(tensors, partial / FILE, {METADATA_KEY: json.dumps(header)})
        shutil.copymode(partial / CONFIG, partial / FILE)  # safetensors lets only the owner read it


def load_quantized(directory: Path) -> StoredWeights:
    """The weights of a quantized checkpoint. Each is checked against the file's header, and kept in the file.

    A weight is mapped from the file whenever it is asked for, so its pages are released together with it. Raises
    BadInput for a file that is missing, damaged or of another version, and for a tensor that is missing, belongs to no
    weight, has another dtype or shape, or holds values that its form does not allow.
    """
    path = directory / FILE

    def read(name: str) -> Weight:
        with safe_open(path, framework="pt") as file:
            return _weight(name, header["forms"][name], file)

    try:
        with safe_open(path, framework="pt") as file:
            header = _header((file.metadata() or {}).get(METADATA_KEY))
            held = set(file.keys())
        forms = {}
        for name, form in header["forms"].items():
            weight = read(name)
            _check(name, form, weight)
            forms[name] = form_of(weight)
            held -= {name} if form == "float" else {f"{name}.codes", f"{name}.scales"}
            del weight  # before the next one is read
        if held:
            raise BadInput(f"{min(held)} belongs to no weight of its header")
        rules = tuple(Rule(**rule) for rule in header["recipe"]["rules"])
        recipe = Recipe(header["recipe"]["name"], rules)
    except BadInput as error:
        raise BadInput(f"{path}: {error}; copy it or quantize again") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not readable as safetensors ({error}); copy it or quantize again") from None
    return StoredWeights(QuantizedWeights(OnDemand(forms, read), _verdicts(header)), recipe, header["method"])


def _header(text: str | None) -> dict[str, Any]:
    """The parsed header. Raises BadInput for another version, and for a key that is missing or of another type."""
    if text is None:
        raise BadInput("has no gemma-edge header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput("its header is not JSON") from None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version not in READABLE:
        raise BadInput(f"schema_version is {version!r}, this program reads {' and '.join(map(str, READABLE))}")
    _expect(set(header), {"schema_version", "method", "recipe", "forms", "verdicts"}, "header")
    forms, verdicts, recipe = header["forms"], header["verdicts"], header["recipe"]
    if not _is_text(forms):
        raise BadInput("forms in its header does not map names to text")
    if version == 1:
        if not _is_text(verdicts):
            raise BadInput("verdicts in its header does not map names to text")
    elif not (isinstance(verdicts, dict) and all(map(_is_verdict, verdicts.values()))):
        raise BadInput("verdicts in its header does not map names to a scheme and a reason")
    if forms.keys() != verdicts.keys():
        raise BadInput(
            f"the {len(forms)} forms and {len(verdicts)} verdicts in its header do not name the same weights"
        )
    if not isinstance(header["method"], str):
        raise BadInput("method in its header is not text")
    _expect(set(recipe) if isinstance(recipe, dict) else set(), {"name", "rules"}, "recipe")
    if not isinstance(recipe["name"], str) or not isinstance(recipe["rules"], list):
        raise BadInput("the recipe in its header lacks a name or a list of rules")
    for rule in recipe["rules"]:
        # "activations" is missing in files that were written before it existed.
        _expect({*rule, "activations"} if _is_text(rule) else set(), {"pattern", "scheme", "activations"}, "rule")
        if rule.setdefault("activations", "int8") not in get_args(Activations):
            raise BadInput(f"activations of a rule in its header is {rule['activations']!r}")
    return header


def _verdicts(header: dict[str, Any]) -> dict[str, Verdict]:
    verdicts: dict[str, Any] = header["verdicts"]
    if header["schema_version"] == 1:  # one text: "scheme: reason"
        return {name: Verdict(*text.partition(": ")[::2]) for name, text in verdicts.items()}
    return {name: Verdict(**verdict) for name, verdict in verdicts.items()}


def _is_verdict(value: object) -> bool:
    return _is_text(value) and isinstance(value, dict) and value.keys() == {"scheme", "reason"}


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _expect(keys: set[str], wanted: set[str], where: str) -> None:
    if keys != wanted:
        raise BadInput(f"{where} in its header has the keys {sorted(keys)}, not {sorted(wanted)}")


def _weight(name: str, form: str, file: Any) -> Weight:
    """The weight ``name`` of an opened safetensors file, in ``form``. Its values are checked by ``_check``."""
    if form == "float":
        tensor = _tensor(name, file)
        if tensor.dtype not in FLOATS:
            raise BadInput(f"{name} is {tensor.dtype}, not floating point")
        return tensor
    codes, scales = _tensor(f"{name}.codes", file), _tensor(f"{name}.scales", file)
    kind, _, size = form.partition("/")
    if kind not in DTYPES or (kind != "sfp8" and not GROUP_SIZE.fullmatch(size)):
        raise BadInput(f"{name} is stored as {form!r}; this program reads {', '.join(DTYPES)} and float")
    if (codes.dtype, scales.dtype) != DTYPES[kind]:
        raise BadInput(f"{name} is {form} with {codes.dtype} codes and {scales.dtype} scales")
    if not _fit(codes, scales, size):
        raise BadInput(f"{name} is {form} with codes {list(codes.shape)} and scales {list(scales.shape)}")
    if kind == "sfp8":
        return Sfp8Weight(codes, scales)
    return IntegerWeight(codes, scales.float(), BITS[kind], int(size) if codes.shape[1] % int(size) else None)


def _check(name: str, form: str, weight: Weight) -> None:
    """Raises BadInput when ``weight`` holds values that ``form`` does not allow."""
    if isinstance(weight, Tensor):
        return
    codes, scales = weight.tensors()
    # Both comparisons are false for NaN too.
    allowed = scales > 0 if isinstance(weight, Sfp8Weight) else bf16_grid(scales) == scales
    if not bool((allowed & torch.isfinite(scales)).all()):
        raise BadInput(f"{name} has invalid scales: {_range(scales)}")
    if isinstance(weight, Sfp8Weight):
        if bool((codes == 0x80).any()):
            raise BadInput(f"{name} holds the code 0x80, which SFP8 does not have")
    elif form.startswith("int4") and bool((codes.amin() < -8) | (codes.amax() > 7)):
        raise BadInput(f"{name} is int4 with codes {_range(codes)}")


def _range(values: Tensor) -> str:
    return f"from {values.amin().item()} to {values.amax().item()}"


def _tensor(name: str, file: Any) -> Tensor:
    if name not in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
        raise BadInput(f"{name} is missing")
    tensor: Tensor = file.get_tensor(name)
    return tensor


def _fit(codes: Tensor, scales: Tensor, size: str) -> bool:
    """Do the shapes of codes and scales go together? ``size`` is the group size; "" for SFP8."""
    if codes.dim() != 2 or scales.dim() != 2 or 0 in codes.shape:
        return False
    rows, columns = codes.shape
    if not size:
        return scales.shape in ((1, 1), (rows, 1))
    return scales.shape == (rows, -(-columns // int(size)))
