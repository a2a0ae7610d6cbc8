"""Recipes: what to quantize, as data. Ordered rules, pattern → scheme; the first match wins.

The network's file never hears of it: a recipe sees names and tensors. Every weight gets a verdict.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from quant.integers import IntegerWeight, round_to_nearest
from quant.sfp8 import Sfp8Weight

# A weight as it is stored: kept, or quantized.
Weight = Tensor | IntegerWeight | Sfp8Weight


class RecipeError(ValueError):
    """A recipe that does not fit the model it is given. One line; exit code 3 on the command line."""

    exit_code = 3


@dataclass(frozen=True)
class Scheme:
    """Integers of ``bits`` bits sharing a scale per ``group_size`` columns (None: per channel, one a row)."""

    bits: int
    group_size: int | None


# How a weight can be stored. "float32" keeps it.
SCHEMES: dict[str, Scheme | None] = {
    "float32": None,
    "int4-block32": Scheme(bits=4, group_size=32),
    "int4-channel": Scheme(bits=4, group_size=None),
    "int8-channel": Scheme(bits=8, group_size=None),
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


@dataclass(frozen=True)
class QuantizedWeights:
    """``tensors``: every weight by name, integers or as it came. ``verdicts``: its scheme, or why it was kept."""

    tensors: dict[str, Weight]
    verdicts: dict[str, str]

    @property
    def integers(self) -> dict[str, IntegerWeight]:
        return {name: weight for name, weight in self.tensors.items() if isinstance(weight, IntegerWeight)}

    @property
    def ideal_bytes(self) -> int:
        """The bare weights: quantized ones with their scales, floats at four bytes."""
        return sum(
            4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in self.tensors.values()
        )


EMBEDDING_SCHEMES = {"int8": "int8-channel", "int4": "int4-block32"}
LINEAR_SCHEMES = {"fp32": "float32", "int4-block32": "int4-block32", "int4-channel": "int4-channel"}


def preset(scheme: str, embedding: str | None = None) -> Recipe:
    """The recipe that a command's ``--scheme`` and ``--embedding`` name.

    Linears get the scheme, norms stay, and the embedding table (with the head, tied or not) gets a setting of its
    own: int8 per row unless said otherwise, because at int4 it costs a small model more than all its linears.
    """
    if scheme not in LINEAR_SCHEMES:
        raise RecipeError(f"scheme {scheme!r} is unknown; use one of {', '.join(LINEAR_SCHEMES)}")
    if scheme == "fp32":
        if embedding is not None:
            raise RecipeError(f"embedding {embedding!r} has no meaning with scheme fp32; leave it out")
        return Recipe("fp32", (Rule("*", "float32"),))
    table = embedding or "int8"
    if table not in EMBEDDING_SCHEMES:
        raise RecipeError(f"embedding {table!r} is unknown; use one of {', '.join(EMBEDDING_SCHEMES)}")
    return Recipe(
        f"{scheme}+embedding-{table}",
        (
            Rule("*norm.weight", "float32"),
            Rule("model.embed_tokens.weight", EMBEDDING_SCHEMES[table]),
            Rule("lm_head.weight", EMBEDDING_SCHEMES[table]),
            Rule("*_proj.weight", LINEAR_SCHEMES[scheme]),
        ),
    )


# Rules of the presets that may stay unused: a tied model has no head of its own.
OPTIONAL_PATTERNS = frozenset({"lm_head.weight"})


def quantize(named_weights: Iterable[tuple[str, Tensor]], recipe: Recipe) -> QuantizedWeights:
    """Round each weight to nearest under the first rule that matches its name.

    Weights are taken one at a time, so that a memory-mapped checkpoint is never whole in memory. Raises
    RecipeError when no rule matches a weight, a rule matches none, or a weight cannot take its scheme.
    """
    tensors: dict[str, Weight] = {}
    verdicts: dict[str, str] = {}
    unused = {rule.pattern for rule in recipe.rules} - OPTIONAL_PATTERNS
    for name, weight in named_weights:
        rule = next((rule for rule in recipe.rules if fnmatch.fnmatchcase(name, rule.pattern)), None)
        if rule is None:
            raise RecipeError(f"{name}: no rule of recipe {recipe.name} matches; add one (scheme 'float32' keeps it)")
        unused.discard(rule.pattern)
        scheme = SCHEMES[rule.scheme]
        if scheme is None:
            tensors[name], verdicts[name] = weight, f"float32: kept by rule {rule.pattern}"
            continue
        try:
            tensors[name] = round_to_nearest(weight, scheme.bits, scheme.group_size)
        except ValueError as error:
            raise RecipeError(f"{name}: cannot be {rule.scheme}: {error}") from None
        verdicts[name] = f"{rule.scheme}: round to nearest"
    if unused:
        raise RecipeError(f"recipe {recipe.name}: rule {', '.join(sorted(unused))} matches no weight; remove it")
    return QuantizedWeights(tensors, verdicts)
