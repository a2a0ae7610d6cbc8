"""Checks that the codes and scales in an exported file are the quantizer's. Compares every one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from export.checks import Check
from export.manifest import Manifest
from export.target import Target
from gemma3.host.memory import give_back
from quant.weights import QuantizedWeights, Weights, forms_of


@dataclass(frozen=True)
class IntegerCounts:
    """By weight, how many of its codes are equal, under equal scales, and how many are not.

    If the file uses a weight in several places, the place with the fewest equal codes counts. All codes of a weight
    that the file does not hold count as unequal.
    """

    equal: dict[str, int]
    unequal: dict[str, int]

    @property
    def total_equal(self) -> int:
        return sum(self.equal.values())

    @property
    def total_unequal(self) -> int:
        return sum(self.unequal.values())


def compare_integers(weights: Weights, target: Target, path: Path) -> IntegerCounts:
    """Compare the quantized weights among ``weights`` with those in the file ``path``, one at a time.

    Raises what the target's ``read_back`` raises.
    """
    forms = {name: form for name, form in forms_of(weights).items() if not isinstance(form, Tensor)}
    equal = dict[str, int]()
    for name, stored in target.read_back(path):
        weight = weights[name] if name in forms else None
        if weight is not None and not isinstance(weight, Tensor):
            alike = weight.equal_codes(stored)
            equal[name] = min(alike, equal.get(name, alike))
    unequal = {name: form.codes.numel() - equal.get(name, 0) for name, form in forms.items()}
    return IntegerCounts({name: equal.get(name, 0) for name in forms}, unequal)


def check_kv_scales(
    directory: Path, manifest: Manifest, weights: Mapping[str, QuantizedWeights], targets: Mapping[str, Target]
) -> list[Check]:
    """For each artifact whose file holds scales of keys and values, a check that they are those of ``weights``.

    Every place of their use counts. Raises what the target's ``read_kv`` raises.
    """
    checks = []
    for format, artifact in manifest.artifacts.items():
        read, expected = targets[format].read_kv, weights[format].kv
        if read is None or not expected:
            continue
        stored = list(read(directory / artifact.file))
        missing = len(expected.keys() - {layer for layer, _ in stored})
        equal = sum(one.equal(expected.get(layer)) for layer, one in stored)
        total = sum(one.count for _, one in stored) + missing
        name = f"scales of keys and values in the file are the calibrated ones ({equal} of {total})"
        checks.append(Check(format, "kv-scales", "equal", name, equal / total, 1.0, equal == total))
    return checks


def check_integers(
    directory: Path, manifest: Manifest, weights: Mapping[str, QuantizedWeights], targets: Mapping[str, Target]
) -> list[Check]:
    """For each artifact with quantized weights, a check that all codes in its file are those of ``weights``."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        if not weights[format].quantized:
            continue
        counts = compare_integers(weights[format].tensors, targets[format], directory / artifact.file)
        equal, total = counts.total_equal, counts.total_equal + counts.total_unequal
        name = f"integers in the file are the quantizer's ({equal} of {total})"
        checks.append(Check(format, "integers", "equal", name, equal / total, 1.0, equal == total))
        give_back()  # the matrices that were read
    return checks
