"""A model's weights in the form that ships, and the verdict on each weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

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

    def tensors(self) -> tuple[Tensor, ...]:
        """The codes, then the scales."""

    def equal_codes(self, other: Any) -> int:
        """How many codes of ``other``, which may be of any kind, equal the code in their place under an equal scale."""


# A weight as it is stored: kept in floating point, or quantized.
Weight = Tensor | QuantizedWeight
Weights = Mapping[str, Weight]


@dataclass(frozen=True)
class QuantizedWeights:
    """``tensors`` are all weights by name, quantized or kept. ``verdicts`` are the decisions about them."""

    tensors: dict[str, Weight]
    verdicts: dict[str, Verdict]

    @property
    def integers(self) -> dict[str, IntegerWeight]:
        return {name: weight for name, weight in self.tensors.items() if isinstance(weight, IntegerWeight)}

    @property
    def quantized(self) -> dict[str, QuantizedWeight]:
        return {name: weight for name, weight in self.tensors.items() if not isinstance(weight, Tensor)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, by name; of a quantized one, that of its codes."""
        return {
            name: tuple(weight.shape if isinstance(weight, Tensor) else weight.codes.shape)
            for name, weight in self.tensors.items()
        }

    @property
    def ideal_bytes(self) -> int:
        return ideal_bytes(self.tensors.values())


def ideal_bytes(weights: Iterable[Weight]) -> int:
    """The bytes of the bare ``weights``: quantized ones with their scales, kept ones at four bytes per value."""
    return sum(4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in weights)
