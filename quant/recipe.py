"""Recipes: what to quantize, as data. Ordered rules map name patterns to schemes; the first match wins.

A recipe refers to weights by name only, so the network's code does not depend on it. Works without torch.
"""

import fnmatch
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gemma3.errors import BadInput
from gemma3.host.files import read_text
from gemma3.names import EMBEDDING, HEAD


@dataclass(frozen=True)
class Integers:
    """Integers of ``bits`` bits with one scale per ``group_size`` columns (None: per channel, one scale per row).

    If the group size does not divide the columns, the weight is refused; with ``pad`` its last group is shorter.
    """

    bits: int
    group_size: int | None
    pad: bool = False


@dataclass(frozen=True)
class Sfp8:
    """SFP8 codes with one scale per row, as the JAX library stores them, or one per tensor, as gemma.cpp does."""

    per_channel: bool


Scheme = Integers | Sfp8 | None

# What happens to the input of a linear layer with integer weights: nothing, or it is rounded to int8.
Activations = Literal["float", "int8"]

_GROUPED = {f"int{bits}-block{size}": Integers(bits, size) for bits in (4, 8) for size in (32, 128)}
# How a weight can be stored, by name. "float32" keeps it in floating point.
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
    """Weights whose name matches ``pattern`` (as in a shell) are stored in ``scheme``, a key of SCHEMES.

    Kernels multiply integers with int8 inputs, because that is fast. With ``activations`` "float" the inputs of these
    linear layers stay in float32, where the target can do that.
    """

    pattern: str
    scheme: str
    activations: Activations = "int8"


@dataclass(frozen=True)
class Recipe:
    """Ordered rules. A weight that no rule matches is an error, and so is a rule that matches no weight."""

    name: str
    rules: tuple[Rule, ...]

    def rule(self, name: str) -> Rule:
        """The first rule that matches. Raises BadInput when none does."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.pattern):
                return rule
        raise BadInput(f"{name}: no rule of recipe {self.name} matches; add one (scheme 'float32' keeps it)")

    def with_activations(self, activations: Activations) -> "Recipe":
        """The same schemes, with ``activations`` for every weight."""
        return replace(self, rules=tuple(replace(rule, activations=activations) for rule in self.rules))

    @property
    def schemes(self) -> tuple[tuple[str, str], ...]:
        """Pattern and scheme of each rule: what decides the weights."""
        return tuple((rule.pattern, rule.scheme) for rule in self.rules)


@dataclass(frozen=True)
class Verdict:
    """What was decided about one weight: ``scheme`` is a key of SCHEMES."""

    scheme: str
    reason: str  # how its values were chosen, or why it was kept

    def __str__(self) -> str:
        return f"{self.scheme}: {self.reason}"


# The values of --scheme and --embedding: how the linear layers and the embedding table are stored.
LINEAR_SCHEMES = {
    "fp32": "float32",
    "int4-block32": "int4-block32",
    "int4-channel": "int4-channel",
    "sfp8": "sfp8-channel",
}
EMBEDDING_SCHEMES = {"int8": "int8-channel", "int4": "int4-block32", "sfp8": "sfp8-channel"}

# What no recipe quantizes: norms, biases, the vision model's embeddings, and its projection into the text model.
KEPT = (
    Rule("*norm*.weight", "float32"),
    Rule("vision_tower.*.bias", "float32"),
    Rule("vision_tower.*_embedding.weight", "float32"),
    Rule("multi_modal_projector.*", "float32"),
)
VISION_LINEARS = (
    Rule("vision_tower.*_proj.weight", "int8-channel"),
    Rule("vision_tower.*.fc[12].weight", "int8-channel"),
)
# Rules that may match nothing: a tied model has no head of its own, and a text-only model has no vision model.
OPTIONAL_PATTERNS = frozenset({HEAD, *(rule.pattern for rule in (*KEPT[1:], *VISION_LINEARS))})
LINEARS = "*_proj.weight"


def _table_rules(embedding: str) -> tuple[Rule, Rule]:
    if embedding not in EMBEDDING_SCHEMES:
        raise BadInput(f"embedding {embedding!r} is unknown; use one of {', '.join(EMBEDDING_SCHEMES)}")
    scheme = EMBEDDING_SCHEMES[embedding]
    return Rule(EMBEDDING, scheme), Rule(HEAD, scheme)


def _of_linears(name: str, *linears: Rule, embedding: str = "int8") -> Recipe:
    return Recipe(name, (*KEPT, *_table_rules(embedding), *VISION_LINEARS, *linears))


def _preset(name: str, mlp: str) -> Recipe:
    return _of_linears(name, Rule("*.self_attn.*_proj.weight", "int8-channel"), Rule("*.mlp.*_proj.weight", mlp))


# The values of --preset. Attention is a tenth to a third of the linear layers' weights, but two fifths of what int4
# costs came from it, so every preset keeps it in int8. docs/experiments.md has the figures.
PRESETS = {
    "fast": _preset("fast", "int4-channel"),
    "balanced": _preset("balanced", "int4-block32"),
    "exact": _preset("exact", "int8-channel"),
}
DEFAULT = PRESETS["balanced"]


def scheme_recipe(scheme: str, embedding: str | None = None) -> Recipe:
    """The recipe for a command's ``--scheme`` and ``--embedding``.

    Linear layers get the scheme, norms stay in floating point, and the embedding table (with the head, tied or not)
    has a setting of its own. The default is int8 per row: in int4 the table costs a small model more accuracy than all
    its linear layers together, and in SFP8, which takes as much space as int8, the table costs twenty times as much
    accuracy as in int8. The vision model's linear layers are int8 per row: they are a tenth of the 4B model's weights,
    and SigLIP's 4304 columns are not a multiple of 32. Raises BadInput for values that do not exist, and for an
    ``embedding`` with the scheme "fp32".
    """
    if scheme not in LINEAR_SCHEMES:
        raise BadInput(f"scheme {scheme!r} is unknown; use one of {', '.join(LINEAR_SCHEMES)}")
    if scheme == "fp32":
        if embedding is not None:
            raise BadInput(f"embedding {embedding!r} has no meaning with scheme fp32; leave it out")
        return Recipe("fp32", (Rule("*", "float32"),))
    table = embedding or "int8"
    return _of_linears(f"{scheme}+embedding-{table}", Rule(LINEARS, LINEAR_SCHEMES[scheme]), embedding=table)


def named_recipe(name: str) -> Recipe:
    """The preset of this name, or the recipe for the scheme of this name. Raises BadInput when there is neither."""
    if name in PRESETS:
        return PRESETS[name]
    if name in LINEAR_SCHEMES:
        return scheme_recipe(name)
    raise BadInput(f"recipe {name!r} is unknown; use one of {', '.join((*PRESETS, *LINEAR_SCHEMES))}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file, which has [[rule]] tables in order, and optionally ``embedding`` (as --embedding).

        embedding = "int8"
        [[rule]]
        pattern = "*.layers.0.*_proj.weight"
        scheme = "int8-channel"
        [[rule]]
        pattern = "*_proj.weight"
        scheme = "int4-block32"
        activations = "float"

    ``activations`` is "int8" unless the rule says otherwise (see ``Rule``).

    Norms stay float32 whatever the rules say, and so do the vision model's biases, embeddings and projector. The vision
    model's linear layers are int8-channel unless one of the file's rules matches them. The recipe is named after the
    file. Raises BadInput for a file that cannot be read, without rules, or with unknown keys or schemes.
    """
    text = read_text(path, "give a TOML file with [[rule]] tables")
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise BadInput(f"{path}: not TOML: nested too deeply") from None
    except ValueError as error:  # tomllib's own error, or a number of thousands of digits
        raise BadInput(f"{path}: not TOML: {error}") from None
    try:
        if extra := data.keys() - {"embedding", "rule"}:
            raise BadInput(f"key {min(extra)!r} is unknown; use embedding and [[rule]]")
        table = _table_rules(str(data["embedding"])) if "embedding" in data else ()
        rules = data.get("rule")
        if not isinstance(rules, list) or not rules:
            raise BadInput("there is no rule; write [[rule]] tables with pattern and scheme")
        own = [_rule(rule) for rule in rules]
        patterns = {rule.pattern for rule in own}
        encoder = (rule for rule in VISION_LINEARS if rule.pattern not in patterns)
        return Recipe(path.stem, (*KEPT, *table, *own, *encoder))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _rule(data: Any) -> Rule:
    needed, optional = {"pattern", "scheme"}, {"activations"}
    if not isinstance(data, dict) or data.keys() - optional != needed:
        seen = sorted(data) if isinstance(data, dict) else data
        raise BadInput(f"a rule has {seen}; it needs pattern and scheme, may have activations, and nothing else")
    pattern, scheme, activations = str(data["pattern"]), str(data["scheme"]), data.get("activations", "int8")
    if scheme not in SCHEMES:
        raise BadInput(f"scheme {scheme!r} of {pattern!r} is unknown; use one of {', '.join(SCHEMES)}")
    if activations not in get_args(Activations):
        raise BadInput(
            f"activations {activations!r} of {pattern!r} is unknown; use {' or '.join(get_args(Activations))}"
        )
    return Rule(pattern, scheme, activations)
