"""A model's weights in the form that ships, and the verdict on each weight.

A model of 27 billion weights does not fit in memory, so weights may be made anew each time one is asked for by name
(``OnDemand``). What is known without its values is its form: the same weight on the meta device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from gemma3.model import RoundHeads
from quant.integers import IntegerWeight
from quant.recipe import Verdict


class QuantizedWeight(Protocol):
    """What every kind of quantized weight has: ``IntegerWeight``, ``Sfp8Weight``, and kinds to come.

    A target says which kinds its file can hold, and which scheme replaces a kind that it cannot hold.
    """

    kind: ClassVar[str]  # the kind's name in a target's record

    @property
    def codes(self) -> Tensor:
        """The codes [rows, columns], in an integer dtype."""

    @property
    def ideal_bytes(self) -> int:
        """The bytes of the codes at their bits, plus those of the scales."""

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""

    def rows(self, index: slice | Tensor) -> "QuantizedWeight":
        """Some of its rows."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The codes, then the scales."""

    def equal_codes(self, other: Any) -> int:
        """How many codes of ``other``, which may be of any kind, equal the code in their place under an equal scale."""


# A weight as it is stored: kept in floating point, or quantized.
Weight = Tensor | QuantizedWeight
Weights = Mapping[str, Weight]


W = TypeVar("W")


class OnDemand(Mapping[str, W]):
    """Weights that ``make`` makes each time one is asked for by name. Nothing is kept.

    ``forms`` has the form of each (see ``form_of``), so that names, kinds and sizes need no values.
    """

    def __init__(self, forms: Mapping[str, W], make: Callable[[str], W]) -> None:
        self.forms = forms
        self._make = make

    def __getitem__(self, name: str) -> W:
        if name not in self.forms:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __contains__(self, name: object) -> bool:
        return name in self.forms


def form_of(weight: Weight) -> Weight:
    """``weight`` without its values: a copy whose tensors are on the meta device, where reading a value raises."""
    if isinstance(weight, Tensor):
        return weight.to("meta")
    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}  # type: ignore[arg-type]
    return replace(weight, **{name: part.to("meta") for name, part in parts.items() if isinstance(part, Tensor)})  # type: ignore[type-var]


def forms_of(weights: Weights) -> Mapping[str, Weight]:
    """The form of each of ``weights``, by name."""
    return weights.forms if isinstance(weights, OnDemand) else {name: form_of(one) for name, one in weights.items()}


@dataclass(frozen=True)
class QuantizedWeights:
    """``tensors`` are all weights by name, quantized or kept. ``verdicts`` are the decisions about them.

    ``tensors`` may be made on demand: go through them one at a time, and keep none. The properties make no values.
    ``kv`` says how a file with these weights rounds keys and values (see quant/kv.py), by the number of the layer. A
    layer that is not in it keeps them in floating point.
    """

    tensors: Weights
    verdicts: dict[str, Verdict]
    kv: Mapping[int, RoundHeads] = field(default_factory=dict)

    @cached_property
    def forms(self) -> Mapping[str, Weight]:
        return forms_of(self.tensors)

    @property
    def integers(self) -> Mapping[str, IntegerWeight]:
        """The integer weights by name, each made when it is asked for."""
        forms = {name: form for name, form in self.forms.items() if isinstance(form, IntegerWeight)}
        return OnDemand(forms, self.tensors.__getitem__)  # type: ignore[arg-type]

    @property
    def quantized(self) -> Mapping[str, QuantizedWeight]:
        """The quantized weights by name, each made when it is asked for."""
        forms = {name: form for name, form in self.forms.items() if not isinstance(form, Tensor)}
        return OnDemand(forms, self.tensors.__getitem__)  # type: ignore[arg-type]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, by name; of a quantized one, that of its codes."""
        return {name: shape_of(form) for name, form in self.forms.items()}

    @property
    def ideal_bytes(self) -> int:
        return ideal_bytes(self.forms.values())


def shape_of(weight: Weight) -> tuple[int, ...]:
    """The shape of a weight; of a quantized one, that of its codes."""
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.codes.shape)


def ideal_bytes(weights: Iterable[Weight]) -> int:
    """The bytes of the bare ``weights``: quantized ones with their scales, kept ones at four bytes per value."""
    return sum(4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in weights)
