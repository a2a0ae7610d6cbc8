"""Recipes: what to quantize, as data. Ordered rules, pattern → scheme; the first match wins.

The network's file never hears of it: a recipe sees names and tensors. Every weight gets a verdict.
"""

import fnmatch
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quant.integers import IntegerWeight, require_finite, round_to_nearest
from quant.sfp8 import Sfp8Weight, encode_weight

Quantized = IntegerWeight | Sfp8Weight
# A weight as it is stored: kept, or quantized.
Weight = Tensor | Quantized


class RecipeError(ValueError):
    """A recipe that does not fit the model it is given. One line; exit code 3 on the command line."""

    exit_code = 3


@dataclass(frozen=True)
class Integers:
    """Integers of ``bits`` bits sharing a scale per ``group_size`` columns (None: per channel, one a row).

    Columns that groups do not divide are refused, or with ``pad`` the last group is shorter.
    """

    bits: int
    group_size: int | None
    pad: bool = False


@dataclass(frozen=True)
class Sfp8:
    """SFP8 codes over one scale a row, as the JAX library has it, or over one a tensor, as gemma.cpp has it."""

    per_channel: bool


Scheme = Integers | Sfp8 | None

_GROUPED = {f"int{bits}-block{size}": Integers(bits, size) for bits in (4, 8) for size in (32, 128)}
# How a weight can be stored. "float32" keeps it.
SCHEMES: dict[str, Scheme] = {
    "float32": None,
    "int4-channel": Integers(bits=4, group_size=None),
    "int8-channel": Integers(bits=8, group_size=None),
    **_GROUPED,
    **{f"{name}-padded": replace(scheme, pad=True) for name, scheme in _GROUPED.items()},
    "sfp8": Sfp8(per_channel=False),
    "sfp8-channel": Sfp8(per_channel=True),
}


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches ``pattern`` (shell-style) get ``scheme`` (a key of SCHEMES)."""

    pattern: str
    scheme: str


@dataclass(frozen=True)
class Recipe:
    """Ordered rules. A weight that none matches is an error, and so is a rule that matches none."""

    name: str
    rules: tuple[Rule, ...]

    def rule(self, name: str) -> Rule:
        """The first rule that matches. Raises RecipeError when none does."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.pattern):
                return rule
        raise RecipeError(f"{name}: no rule of recipe {self.name} matches; add one (scheme 'float32' keeps it)")


@dataclass(frozen=True)
class QuantizedWeights:
    """``tensors``: every weight by name, quantized or as it came. ``verdicts``: its scheme, or why it was kept."""

    tensors: dict[str, Weight]
    verdicts: dict[str, str]

    @property
    def integers(self) -> dict[str, IntegerWeight]:
        return {name: weight for name, weight in self.tensors.items() if isinstance(weight, IntegerWeight)}

    @property
    def quantized(self) -> dict[str, Quantized]:
        return {name: weight for name, weight in self.tensors.items() if not isinstance(weight, Tensor)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(weight.shape if isinstance(weight, Tensor) else weight.codes.shape)
            for name, weight in self.tensors.items()
        }

    @property
    def ideal_bytes(self) -> int:
        """The bare weights: quantized ones with their scales, floats at four bytes."""
        return sum(
            4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in self.tensors.values()
        )


# What a command's --scheme and --embedding name: how the linears and the embedding table are stored.
LINEAR_SCHEMES = {
    "fp32": "float32",
    "int4-block32": "int4-block32",
    "int4-channel": "int4-channel",
    "sfp8": "sfp8-channel",
}
EMBEDDING_SCHEMES = {"int8": "int8-channel", "int4": "int4-block32", "sfp8": "sfp8-channel"}


def preset(scheme: str, embedding: str | None = None) -> Recipe:
    """The recipe that a command's ``--scheme`` and ``--embedding`` name.

    Linears get the scheme, norms stay, and the embedding table (with the head, tied or not) gets a setting of its
    own. Unless said otherwise that is int8 per row: at int4 the table costs a small model more than all its linears,
    and in SFP8, of the same size, twenty times as much. The image encoder's linears are int8 per row: they are
    a tenth of the 4B's weights, and SigLIP's 4304 columns are no multiple of 32.
    """
    if scheme not in LINEAR_SCHEMES:
        raise RecipeError(f"scheme {scheme!r} is unknown; use one of {', '.join(LINEAR_SCHEMES)}")
    if scheme == "fp32":
        if embedding is not None:
            raise RecipeError(f"embedding {embedding!r} has no meaning with scheme fp32; leave it out")
        return Recipe("fp32", (Rule("*", "float32"),))
    table = embedding or "int8"
    linears = Rule("*_proj.weight", LINEAR_SCHEMES[scheme])
    return Recipe(f"{scheme}+embedding-{table}", (*KEPT, *_table_rules(table), *ENCODER, linears))


# What no recipe quantizes: norms, biases, and of the image half what is no linear or the last step into the text model.
KEPT = (
    Rule("*norm*.weight", "float32"),
    Rule("vision_tower.*.bias", "float32"),
    Rule("vision_tower.*_embedding.weight", "float32"),
    Rule("multi_modal_projector.*", "float32"),
)
ENCODER = (
    Rule("vision_tower.*_proj.weight", "int8-channel"),
    Rule("vision_tower.*.fc[12].weight", "int8-channel"),
)
# Rules that may stay unused: a tied model has no head of its own, a text-only model no encoder.
OPTIONAL_PATTERNS = frozenset({"lm_head.weight", *(rule.pattern for rule in (*KEPT[1:], *ENCODER))})


def _table_rules(embedding: str) -> tuple[Rule, Rule]:
    if embedding not in EMBEDDING_SCHEMES:
        raise RecipeError(f"embedding {embedding!r} is unknown; use one of {', '.join(EMBEDDING_SCHEMES)}")
    scheme = EMBEDDING_SCHEMES[embedding]
    return Rule("model.embed_tokens.weight", scheme), Rule("lm_head.weight", scheme)


def read_recipe(path: Path) -> Recipe:
    """A recipe file: TOML with an ``embedding`` setting (as ``--embedding``; optional) and [[rule]] tables in order.

        embedding = "int8"
        [[rule]]
        pattern = "*.layers.0.*_proj.weight"
        scheme = "int8-channel"
        [[rule]]
        pattern = "*_proj.weight"
        scheme = "int4-block32"

    Norms stay float32 whatever the rules say, and so do an image half's biases, embeddings and projector; its linears
    are int8-channel unless a rule says otherwise. The recipe's name is the file's. Raises RecipeError for a file
    that cannot be read, and for keys and schemes that there are not.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give a TOML file with [[rule]] tables") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    try:
        if extra := data.keys() - {"embedding", "rule"}:
            raise RecipeError(f"key {min(extra)!r} is unknown; use embedding and [[rule]]")
        table = _table_rules(str(data["embedding"])) if "embedding" in data else ()
        rules = data.get("rule")
        if not isinstance(rules, list) or not rules:
            raise RecipeError("there is no rule; write [[rule]] tables with pattern and scheme")
        own = [_rule(rule) for rule in rules]
        patterns = {rule.pattern for rule in own}
        encoder = (rule for rule in ENCODER if rule.pattern not in patterns)
        return Recipe(path.stem, (*KEPT, *table, *own, *encoder))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _rule(data: Any) -> Rule:
    if not isinstance(data, dict) or data.keys() != {"pattern", "scheme"}:
        seen = sorted(data) if isinstance(data, dict) else data
        raise RecipeError(f"a rule has {seen}; it needs pattern and scheme, and nothing else")
    pattern, scheme = str(data["pattern"]), str(data["scheme"])
    if scheme not in SCHEMES:
        raise RecipeError(f"scheme {scheme!r} of {pattern!r} is unknown; use one of {', '.join(SCHEMES)}")
    return Rule(pattern, scheme)


# Integers for a weight [rows, columns] by name, and in a few words how they were found.
Method = Callable[[str, Tensor, Integers], tuple[IntegerWeight, str]]


def rtn(_: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
    return round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad), "round to nearest"


def quantize(named_weights: Iterable[tuple[str, Tensor]], recipe: Recipe, method: Method = rtn) -> QuantizedWeights:
    """Each weight in the scheme of the first rule that matches its name; integers are chosen by ``method``.

    Weights are taken one at a time, so that a memory-mapped checkpoint is never whole in memory. Raises
    RecipeError when no rule matches a weight, a rule matches none, or a weight cannot take its scheme.
    """
    tensors: dict[str, Weight] = {}
    verdicts: dict[str, str] = {}
    unused = {rule.pattern for rule in recipe.rules} - OPTIONAL_PATTERNS
    for name, weight in named_weights:
        rule = recipe.rule(name)
        unused.discard(rule.pattern)
        try:
            tensors[name], how = _apply(name, weight, SCHEMES[rule.scheme], method)
        except ValueError as error:
            raise RecipeError(f"{name}: cannot be {rule.scheme}: {error}") from None
        verdicts[name] = f"{rule.scheme}: {how or f'kept by rule {rule.pattern}'}"
    if unused:
        raise RecipeError(f"recipe {recipe.name}: rule {', '.join(sorted(unused))} matches no weight; remove it")
    return QuantizedWeights(tensors, verdicts)


def _apply(name: str, weight: Tensor, scheme: Scheme, method: Method) -> tuple[Weight, str]:
    if scheme is None:
        require_finite(weight)
        return weight, ""
    if weight.dim() != 2:
        raise ValueError(f"it is no matrix but {list(weight.shape)}")
    if isinstance(scheme, Sfp8):
        return encode_weight(weight, per_channel=scheme.per_channel), "encoded"
    integers, how = method(name, weight, scheme)
    if integers.group:
        how += f", its last group {weight.shape[1] % integers.group} of {integers.group} columns"
    return integers, how
