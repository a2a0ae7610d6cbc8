"""Fake quantization: a network that trains floats but computes with exactly the codes and scales that will ship.

Each quantized weight gets a parametrization (torch.nn.utils.parametrize). The module holds the trained latent values,
its ``weight`` is their rounded and dequantized form, and the gradient passes straight through the rounding. The
network's own code needs no change. ``convert`` computes the final codes with the same rounding. The scales of integers
stay as they were at the start: training them too (arXiv 1902.08153) gained nothing on the demo checkpoint.

A table that embedding and head share is quantized by the embedding, and the head borrows the result. Under
``parametrize.cached()`` it is computed once per pass.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from gemma3.errors import BadInput
from quant.activations import fake_quantize_per_token
from quant.integers import IntegerWeight, bf16_grid, in_groups, nearest_codes
from quant.recipe import Activations, Verdict
from quant.sfp8 import Sfp8Weight, encode_weight
from quant.weights import QuantizedWeight, QuantizedWeights, Weight

# How far, in steps, a latent value may start from its given code. Less than half a step, so that it rounds to the code.
WITHIN = 0.49


class StraightThrough(torch.autograd.Function):
    """(x, its rounded values) → the rounded values. The gradient passes to x unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


straight_through: Callable[[Tensor, Tensor], Tensor] = StraightThrough.apply


class FakeInteger(nn.Module):
    """A parametrization: rounds latent values to integers under fixed scales, which are on the bfloat16 grid."""

    scales: Tensor

    def __init__(self, start: IntegerWeight) -> None:
        super().__init__()
        self.bits, self.group_size, self.group = start.bits, start.group_size, start.group
        assert torch.equal(start.scales, bf16_grid(start.scales))
        self.register_buffer("scales", start.scales)

    def forward(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            values = self._codes(latent).mul_(self.scales[..., None])
        return straight_through(latent, values.view(len(latent), -1)[:, : latent.shape[1]])

    def encode(self, latent: Tensor) -> IntegerWeight:
        """The codes and scales with which ``forward`` computes, for latent values [rows, columns]."""
        codes = self._codes(latent).to(torch.int8).view(len(latent), -1)[:, : latent.shape[1]]
        return IntegerWeight(codes, self.scales, self.bits, self.group)

    def _codes(self, latent: Tensor) -> Tensor:
        """The codes as floats [rows, groups, size]."""
        return nearest_codes(in_groups(latent, self.group_size), self.scales, self.bits)


class FakeSfp8(nn.Module):
    """A parametrization: rounds latent values to SFP8 codes. Each step chooses the scales, per tensor or per row."""

    def __init__(self, start: Sfp8Weight) -> None:
        super().__init__()
        self.per_channel = start.scale.shape[0] > 1

    def forward(self, latent: Tensor) -> Tensor:
        return straight_through(latent, self.encode(latent).dequantize())

    def encode(self, latent: Tensor) -> Sfp8Weight:
        return encode_weight(latent.detach(), per_channel=self.per_channel)


class BorrowedHead(nn.Module):
    """A head without a weight of its own: it multiplies with the embedding's quantized table."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._lender = (
            embedding,
        )  # in a tuple, so that the table is a parameter of the embedding alone, listed and saved once

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self._lender[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def prepare(model: nn.Module, start: QuantizedWeights, activations: Activations = "float") -> nn.Module:
    """Change ``model``, in place, to compute with the weights of ``start`` and to train from them; returns it.

    ``start`` names every weight of the model (a tied one once). Weights kept in floating point stay as they are and are
    not trained. For the others, the model's values become the latent values, moved just enough to round to the codes of
    ``start``. With ``activations`` "int8" every linear layer with a quantized weight rounds its input, as XNNPACK's
    8da4w does. Raises BadInput for a kind of weight that cannot be trained.
    """
    model.requires_grad_(False)
    owners: dict[Tensor, nn.Module] = {}
    for name, module, parameter in _weights(model):
        if parameter in owners:
            module = BorrowedHead(owners[parameter])
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        else:
            owners[parameter] = module
            weight = start.tensors[name]
            parameter.requires_grad_(not isinstance(weight, Tensor))
            if isinstance(weight, Tensor):
                continue
            with torch.no_grad():
                parameter.copy_(_latent(parameter.cpu(), weight))
            fake = _fake(name, weight).to(parameter.device)
            parametrize.register_parametrization(module, "weight", fake, unsafe=True)
        if activations == "int8" and (isinstance(module, BorrowedHead) or _is_quantized_linear(module)):
            module.register_forward_pre_hook(_round_input)
    return model


def convert(model: nn.Module, start: QuantizedWeights) -> QuantizedWeights:
    """The weights of ``start`` with the codes with which the prepared ``model`` now computes.

    Under FSDP2 every process must call this function, and each gets all the weights.
    """
    tensors: dict[str, Weight] = {}
    verdicts: dict[str, Verdict] = {}
    for name, weight in start.tensors.items():
        tensors[name], verdicts[name] = weight, start.verdicts[name]
        if not isinstance(weight, Tensor):
            trained: Any = model.get_submodule(name.removesuffix(".weight")).parametrizations
            (fake,) = trained.weight
            with torch.no_grad():
                tensors[name] = fake.cpu().encode(whole(trained.weight.original).cpu())
            if trained.weight.original.requires_grad:
                verdicts[name] = Verdict(verdicts[name].scheme, "trained")
    return QuantizedWeights(tensors, verdicts)


def head_input(head: nn.Module, x: Tensor) -> Tensor:
    """What ``head`` multiplies with its weight when its input is x: x itself, or x rounded to int8 by its hook."""
    for hook in head._forward_pre_hooks.values():
        (x,) = hook(head, (x,))
    return x


def _weights(model: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """(name of the weight, module, weight) of every module with one. A shared one comes first from the embedding."""
    return [
        (f"{prefix}.weight", module, module.weight)
        for prefix, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]


def _fake(name: str, start: QuantizedWeight) -> FakeInteger | FakeSfp8:
    if isinstance(start, IntegerWeight):
        return FakeInteger(start)
    if isinstance(start, Sfp8Weight):
        return FakeSfp8(start)
    raise BadInput(f"{name}: {start.kind} weights cannot be trained; give a recipe of integers or SFP8")


def _latent(values: Tensor, start: QuantizedWeight) -> Tensor:
    """The values nearest to ``values`` that round to the codes of ``start``.

    The smallest and the largest code have no bound on their outer side, because rounding clips there.
    """
    if not isinstance(start, IntegerWeight):
        return values
    limit = 2 ** (start.bits - 1)
    codes, scales = in_groups(start.codes, start.group_size).float(), start.scales[..., None]
    low = torch.where(codes > -limit, codes - WITHIN, -torch.inf) * scales
    high = torch.where(codes < limit - 1, codes + WITHIN, torch.inf) * scales
    return in_groups(values, start.group_size).clamp(low, high).view(len(values), -1)[:, : values.shape[1]]


def _is_quantized_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")


def _round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    (x,) = inputs
    with torch.no_grad():
        rounded = fake_quantize_per_token(x)
    return (straight_through(x, rounded),)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, detached. A tensor that FSDP2 has sharded is gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
