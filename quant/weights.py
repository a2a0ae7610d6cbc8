"""A model's weights in the form that ships, and the verdict on each of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from quant.integers import IntegerWeight
from quant.recipe import Verdict


class QuantizedWeight(Protocol):
    """What every kind of quantized weight has: ``IntegerWeight``, ``Sfp8Weight``, and kinds to come.

    A backend says which kinds its files can hold, and which scheme replaces one that they cannot.
    """

    kind: ClassVar[str]  # the kind's name in a backend's record

    @property
    def codes(self) -> Tensor:
        """[rows, columns] of integers."""

    @property
    def ideal_bytes(self) -> int:
        """The codes at their bits, plus the scales."""

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The codes, then the scales."""

    def equal_codes(self, other: Any) -> int:
        """How many places of ``other``, of any kind, hold the same code under the same scale."""


# A weight as it is stored: kept in floating point, or quantized.
Weight = Tensor | QuantizedWeight
Weights = Mapping[str, Weight]


@dataclass(frozen=True)
class QuantizedWeights:
    """``tensors``: every weight by name, quantized or as it came. ``verdicts``: the decision about each."""

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
        return {
            name: tuple(weight.shape if isinstance(weight, Tensor) else weight.codes.shape)
            for name, weight in self.tensors.items()
        }

    @property
    def ideal_bytes(self) -> int:
        return ideal_bytes(self.tensors.values())


def ideal_bytes(weights: Iterable[Weight]) -> int:
    """The bytes of the bare ``weights``: quantized ones with their scales, floats at four bytes each."""
    return sum(4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in weights)
