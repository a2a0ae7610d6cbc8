"""GPTQ (arXiv 2210.17323): round one column, and let the columns not yet rounded compensate for its error.

GPTQ does not minimize the error of a weight, but the error of its products with the inputs on some text. For a linear
layer with inputs X [tokens, columns], this is the sum of (error · H · errorᵀ) over the rows of the weight, where
H = Xᵀ X (the "Hessian" below). Each row is an independent problem. A row for which rounding to nearest gives a smaller
error is rounded to nearest, so no row is ever worse.

Columns are rounded in order, because neighbours in a group share a scale. The scale is chosen when the first column
of the group is reached, from the compensated weight: among the absmax scale and some smaller ones, it is the scale
with the least cost-weighted error. (Absmax alone left 1.15 times the KL divergence on the demo checkpoint.)
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.integers import IntegerWeight, least_costly_scales, nearest_codes, round_to_nearest
from quant.methods import IntegerMethod, mse
from quant.recipe import SCHEMES, Integers, Recipe

log = logging.getLogger(__name__)

# The damping: this share of the mean of H's diagonal is added to the diagonal, as in the paper.
DAMPING = 0.01
# The candidates for a scale, as shares of the absmax scale.
SHARES_OF_ABSMAX = [1 - step / 64 for step in range(20)]
# The size of a block of columns. One matrix product applies the errors of all earlier columns to a whole block.
COLUMNS_AT_ONCE = 128

# Runs the network's layers on token ids [B, S]; its result is not used.
Run = Callable[[Tensor], object]


def gptq(layers: Sequence[tuple[str, nn.Module]], run: Run, batches: Sequence[Tensor], recipe: Recipe) -> IntegerMethod:
    """A method for ``quantize_weights``: calibrated integers inside ``layers``, those of ``mse`` elsewhere.

    ``layers`` are the network's layers in order, as (name, module). Each takes its predecessor's output as its first
    argument. ``run`` runs the network on one of ``batches``, token ids [B, S]. The weights of the layers are replaced
    by the dequantized integers one layer after another, so that each layer is calibrated on activations of the already
    quantized layers before it. Only one H is in memory at a time. Raises ValueError when a weight is NaN or infinite,
    and BadInput when no rule matches it.
    """
    found: dict[str, tuple[IntegerWeight, float]] = {}
    with torch.no_grad():
        calls = [_calls(layers, run, batch) for batch in batches]
        states = [call[0][0] for call in calls]
        for index, (prefix, layer) in enumerate(layers):
            log.info("gptq: %s", prefix)
            inputs = [(x, *call[index][1:]) for x, call in zip(states, calls, strict=True)]
            for linears in _sharing_inputs(layer, inputs[0]):
                found |= _quantize_together(prefix, linears, layer, inputs, recipe)
            states = [layer(*arguments) for arguments in inputs]

    def method(name: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
        if name not in found:
            integers, how = mse(name, weight, scheme)
            return integers, f"{how} (not in a layer)"
        integers, ratio = found[name]
        return integers, f"gptq, {ratio:.3f} of the calibration error of round to nearest"

    return method


def _quantize_together(
    prefix: str,
    linears: Sequence[tuple[str, nn.Linear]],
    layer: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    recipe: Recipe,
) -> dict[str, tuple[IntegerWeight, float]]:
    """Quantize ``linears``, which have the same input and so the same H: name → integers, relative error."""
    schemes = {name: SCHEMES[recipe.rule(f"{prefix}.{name}.weight").scheme] for name, _ in linears}
    if not any(isinstance(scheme, Integers) for scheme in schemes.values()):
        return {}
    h = hessian(layer, linears[0][1], inputs)
    found = {}
    for name, linear in linears:
        scheme = schemes[name]
        if isinstance(scheme, Integers):
            integers, ratio = gptq_weight(linear.weight, h, scheme)
            linear.weight.copy_(integers.dequantize())
            found[f"{prefix}.{name}.weight"] = integers, ratio
    return found


def gptq_weight(weight: Tensor, hessian: Tensor, scheme: Integers) -> tuple[IntegerWeight, float]:
    """Integers for weight [N, K] under hessian [K, K], and their error relative to that of round to nearest (≤ 1).

    A column whose inputs were all 0 is rounded to nearest. Raises ValueError as ``round_to_nearest`` does.
    """
    plain = round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad)
    integers = _corrected(weight.float(), _factor(hessian), plain)
    errors, plain_errors = (_errors(weight, candidate, hessian) for candidate in (integers, plain))
    better = (errors < plain_errors)[:, None]
    codes = torch.where(better, integers.codes, plain.codes)
    scales = torch.where(better, integers.scales, plain.scales)
    total = float(plain_errors.sum())
    ratio = float(torch.minimum(errors, plain_errors).sum()) / total if total else 1.0
    return IntegerWeight(codes, scales, plain.bits, plain.group), ratio


def _corrected(weight: Tensor, factor: Tensor, plain: IntegerWeight) -> IntegerWeight:
    """The integers that GPTQ chooses, in the form of ``plain``.

    With errors e = weight − values, GPTQ minimizes Σ over columns of (e · factor)²; the term of column j is
    (e_j factor_jj + Σ_{i<j} e_i factor_ij)². A block of columns starts from the values at which these terms would
    all be 0 without rounding. Within the block, rounding a column moves the columns after it, by the inverse of the
    block. This is the paper's update in another order, which needs neither the inverse of H nor that of ``factor``.
    """
    rows, columns = weight.shape
    size, bits = plain.group_size, plain.bits
    at_once = COLUMNS_AT_ONCE if plain.per_channel else size * max(1, COLUMNS_AT_ONCE // size)
    original = weight.T.contiguous()  # [K, N]: a column is contiguous
    codes, errors = torch.empty(2, columns, rows)
    scales = torch.empty(plain.scales.shape[1], rows)
    cost = factor.diagonal() ** 2
    for start in range(0, columns, at_once):
        end = min(start + at_once, columns)
        block = factor[start:end, start:end]
        inverse = torch.linalg.solve_triangular(block, torch.eye(end - start), upper=True)
        left = original[start:end] + inverse.T @ (factor[:start, start:end].T @ errors[:start])
        for column in range(start, end):
            group, place = divmod(column, size)
            here = column - start
            if place == 0:
                ahead = original if plain.per_channel else left[here : here + size]
                grouped, weights = ahead.T.unsqueeze(1), cost[column : column + size]
                scales[group] = least_costly_scales(grouped, bits, SHARES_OF_ABSMAX, weights)[:, 0]
            scale = scales[group]
            codes[column] = nearest_codes(left[here, :, None], scale, bits)[:, 0]
            values = codes[column] * scale
            errors[column] = original[column] - values
            step = (left[here] - values) / inverse[here, here]
            left[here + 1 :].addr_(inverse[here, here + 1 :], step, alpha=-1)
    return IntegerWeight(codes.T.to(torch.int8).contiguous(), scales.T.contiguous(), bits, plain.group)


def _factor(hessian: Tensor) -> Tensor:
    """The float32 upper triangle R with R Rᵀ = hessian + damping."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    # If all inputs are 0, so is H. With 1 on its diagonal every column is rounded independently of the others.
    diagonal += DAMPING * float(diagonal.mean()) or 1.0
    return torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1).float()


def _errors(weight: Tensor, integers: IntegerWeight, hessian: Tensor) -> Tensor:
    """float64 [rows]: error · hessian · errorᵀ of each row."""
    error = (integers.dequantize() - weight.float()).double()
    return ((error @ hessian.double()) * error).sum(-1)


# Running a network layer by layer.


class _SeenEnough(Exception):
    """Ends a run of a layer once the input of the wanted linear layer is known."""


def hessian(layer: nn.Module, linear: nn.Linear, inputs: Sequence[tuple[Any, ...]]) -> Tensor:
    """float64 [K, K]: Σ xᵀ x over the inputs x [tokens, K] that ``linear`` gets when its ``layer`` runs on ``inputs``.

    Each of ``inputs`` is the tuple of arguments of one run of ``layer``.
    """
    size = linear.in_features
    total = torch.zeros(size, size, dtype=torch.float64)

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(-1, size).float()
        total.add_(x.T @ x)
        raise _SeenEnough

    hook = linear.register_forward_pre_hook(add)
    try:
        for arguments in inputs:
            try:
                layer(*arguments)
            except _SeenEnough:
                continue
    finally:
        hook.remove()
    return total


def _sharing_inputs(layer: nn.Module, arguments: tuple[Any, ...]) -> list[list[tuple[str, nn.Linear]]]:
    """The layer's linear layers in the order in which they run, grouped by input: one list for each input tensor."""
    together: dict[Tensor, list[tuple[str, nn.Linear]]] = {}
    hooks = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):

            def note(_: nn.Module, given: tuple[Any, ...], entry: tuple[str, nn.Linear] = (name, module)) -> None:
                together.setdefault(given[0], []).append(entry)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        layer(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return list(together.values())


def _calls(layers: Sequence[tuple[str, nn.Module]], run: Run, batch: Tensor) -> list[tuple[Any, ...]]:
    """The arguments of each layer for ``batch`` when every layer before it returns its input."""
    calls = []

    def pass_on(x: Tensor, *others: Any) -> Tensor:
        calls.append((x, *others))
        return x

    try:
        # An attribute of the module hides the forward of its class. A hook could not prevent forward from running.
        for _, layer in layers:
            layer.__dict__["forward"] = pass_on
        run(batch)
    finally:
        for _, layer in layers:
            layer.__dict__.pop("forward", None)
    return calls
