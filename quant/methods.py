"""Quantizes weights by a recipe: each gets a scheme and a verdict. A method chooses the integers."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gemma3.errors import BadInput
from quant.integers import (
    IntegerWeight,
    blocks_of_rows,
    in_groups,
    least_costly_scales,
    require_finite,
    round_to_nearest,
    whole_group_size,
)
from quant.recipe import OPTIONAL_PATTERNS, SCHEMES, Integers, Recipe, Scheme, Sfp8, Verdict
from quant.sfp8 import Sfp8Weight, encode_weight
from quant.weights import OnDemand, QuantizedWeights, Weight, form_of

# (name, weight [rows, columns], scheme) → the integers of the weight, and in a few words how they were chosen.
IntegerMethod = Callable[[str, Tensor, Integers], tuple[IntegerWeight, str]]


# The candidates of ``mse`` for a scale: the largest weight of a group lies so many steps from 0. 7.5 is absmax, and the
# first, so that no group is worse. At 7 or 8 lies that of a checkpoint that was trained for 4 bits. The more steps, the
# more of the largest weights is clipped and the closer are all others, which pays in long rows. A bundle says no more
# than "mse" of how its integers were chosen: with other candidates they could not be made again.
STEPS = (7.5, 7, 8, 8.5, 9, 9.75, 10.75, 12, 14)
SEARCHED_AT_ONCE = 1 << 24  # values that are in float32 together: 67 MB, work for some 60 threads


def rtn(_: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
    """Round to nearest under absmax scales. Raises ValueError as ``round_to_nearest`` does."""
    return round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad), "round to nearest"


def mse(name: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
    """Round to nearest under the scales with the least squared error. Raises ValueError as ``round_to_nearest`` does.

    8 bits get absmax scales: a search would take off a tenth of an error that is a three-hundredth of that of 4 bits.
    """
    if scheme.bits == 8:
        return rtn(name, weight, scheme)
    size = whole_group_size(weight.shape[1], scheme.group_size, scheme.pad)
    shares = [STEPS[0] / steps for steps in STEPS]
    parts = blocks_of_rows(weight.shape, SEARCHED_AT_ONCE)
    scales = [least_costly_scales(in_groups(weight[part].float(), size), scheme.bits, shares) for part in parts]
    integers = round_to_nearest(weight, scheme.bits, size, pad=scheme.pad, scales=torch.cat(scales))
    return integers, "round to nearest with the least squared error"


def quantize_weights(
    named_weights: Iterable[tuple[str, Tensor]], recipe: Recipe, method: IntegerMethod = mse
) -> QuantizedWeights:
    """Each weight in the scheme of the first rule that matches its name. ``method`` chooses the integers.

    Weights are taken one at a time, so that a memory-mapped checkpoint is never whole in memory. Raises BadInput when
    no rule matches a weight, when a rule matches no weight, and when a weight cannot be stored in its scheme.
    """
    tensors: dict[str, Weight] = {}
    verdicts: dict[str, Verdict] = {}
    for name, weight, verdict in _quantized(named_weights, recipe, method):
        tensors[name], verdicts[name] = weight, verdict
    return QuantizedWeights(tensors, verdicts)


def round_on_demand(
    names: Iterable[str], read: Callable[[str], Tensor], recipe: Recipe, method: IntegerMethod = mse
) -> QuantizedWeights:
    """As ``quantize_weights``, but no weight is kept: it is read, and rounded to nearest, whenever it is used.

    For a ``method`` whose codes are the nearest ones under its scales. It chooses them once, here, where a weight that
    cannot be stored is found too. They are kept, as bfloat16, so each use gives the same integers, and takes about two
    seconds for a billion weights. Raises as ``quantize_weights``.
    """
    forms: dict[str, Weight] = {}
    verdicts: dict[str, Verdict] = {}
    scales: dict[str, Tensor] = {}
    for name, weight, verdict in _quantized(((name, read(name)) for name in names), recipe, method):
        forms[name], verdicts[name] = form_of(weight), verdict
        if isinstance(weight, IntegerWeight):
            scales[name] = weight.scales.bfloat16()

    def again(name: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
        return round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad, scales=scales[name]), ""

    def make(name: str) -> Weight:
        return _apply(name, read(name), SCHEMES[recipe.rule(name).scheme], again)[0]

    return QuantizedWeights(OnDemand(forms, make), verdicts)


def form_in(scheme: Scheme, shape: Sequence[int]) -> Weight:
    """The form of a weight of this shape in ``scheme``. Of a shape that the scheme cannot store, that of a float."""
    if scheme is None or len(shape) != 2:
        return torch.empty(*shape, device="meta")
    rows, columns = shape
    if isinstance(scheme, Sfp8):
        codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
        return Sfp8Weight(codes, torch.empty(rows if scheme.per_channel else 1, 1, device="meta"))
    size = min(scheme.group_size or columns, columns)
    codes = torch.empty(rows, columns, dtype=torch.int8, device="meta")
    scales = torch.empty(rows, -(-columns // size), device="meta")
    return IntegerWeight(codes, scales, scheme.bits, size if columns % size else None)


def _quantized(
    named_weights: Iterable[tuple[str, Tensor]], recipe: Recipe, method: IntegerMethod
) -> Iterator[tuple[str, Weight, Verdict]]:
    unused = {rule.pattern for rule in recipe.rules} - OPTIONAL_PATTERNS
    for name, weight in named_weights:
        rule = recipe.rule(name)
        unused.discard(rule.pattern)
        try:
            stored, how = _apply(name, weight, SCHEMES[rule.scheme], method)
        except ValueError as error:
            raise BadInput(f"{name}: cannot be stored as {rule.scheme}: {error}") from None
        yield name, stored, Verdict(rule.scheme, how or f"kept by rule {rule.pattern}")
    if unused:
        raise BadInput(f"recipe {recipe.name}: rule {', '.join(sorted(unused))} matches no weight; remove it")


def _apply(name: str, weight: Tensor, scheme: Scheme, method: IntegerMethod) -> tuple[Weight, str]:
    if scheme is None:
        require_finite(weight)
        return weight, ""
    if weight.dim() != 2:
        raise ValueError(f"it is not a matrix but has the shape {list(weight.shape)}")
    if isinstance(scheme, Sfp8):
        return encode_weight(weight, per_channel=scheme.per_channel), "encoded"
    integers, how = method(name, weight, scheme)
    if integers.group:
        how += f", its last group {weight.shape[1] % integers.group} of {integers.group} columns"
    return integers, how
