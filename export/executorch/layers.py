"""The layers of which the text model and the vision model of the .pte are built, in a form that XNNPACK delegates.

* The mean in a normalization is a linear layer with the fixed weights 1/size. XNNPACK delegates linear layers for any
  rank, but ``mean`` only for images.
* Linear layers with integer weights that read the same activations share one rounding of these activations to int8.
* GELU's tanh form is spelled out, because XNNPACK computes the exact form whatever ``approximate`` says (4.7e-4 off).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import executorch.kernels.quantized  # noqa: F401  (registers the operators used below)
import torch
import torch.nn.functional as F
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (registers embedding_4bit)
from torch import Tensor, nn

from gemma3.errors import BadInput
from quant.integers import IntegerWeight
from quant.weights import QuantizedWeight, Weight, Weights, forms_of

GROUP_MULTIPLE = 32  # XNNPACK's blockwise int4 takes group sizes that are multiples of 32
# GELU(x) ≈ x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))), which is x · sigmoid(x · (A + B·x²)), because
# tanh(z) = 2·sigmoid(2z) − 1.
GELU_A = 2.0 * math.sqrt(2.0 / math.pi)
GELU_B = GELU_A * 0.044715


@dataclass(frozen=True)
class Later:
    """A weight that is read when its values are needed. It stands for one in ``Weights``.

    Layers made of it have hollow buffers: memory that is reserved and never touched, so that it takes no room. So a
    whole model can be traced and partitioned, which copies every buffer several times (see ``flatten``). ``fill`` puts
    the values in. ``hollow`` has the buffer of each tensor of ``form``, so that a tied table is one buffer.
    """

    form: Weight
    read: Callable[[], Weight]
    hollow: dict[Tensor, Tensor] = field(default_factory=dict)


def later(weights: Weights) -> Weights:
    """``weights`` as they stand for themselves until they are needed."""
    held = {name: Later(form, partial(weights.__getitem__, name)) for name, form in forms_of(weights).items()}
    return cast(Weights, held)


def form(weight: Weight) -> Weight:
    """``weight``, or the form of one that is read later."""
    return weight.form if isinstance(weight, Later) else weight


class Holder(nn.Module):
    """A layer with buffers that are made of one weight by a function ``make``. ``hollow`` names the hollow ones."""

    hollow: tuple[str, ...] = ()
    filled: Callable[[], dict[str, Tensor]]  # of one with hollow buffers: their values

    def hold(self, weight: Weight, make: Callable[[Weight], dict[str, Tensor]]) -> None:
        held = make(form(weight))
        if isinstance(weight, Later):
            self.hollow, self.filled = tuple(held), lambda: make(weight.read())
            for name, tensor in held.items():
                held[name] = weight.hollow.setdefault(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
        for name, tensor in held.items():
            self.register_buffer(name, tensor)


def flatten(state: dict[str, Tensor], model: nn.Module) -> None:
    """Make ``model``'s hollow buffers in ``state`` a single value each, expanded to the shape: copies stay as small."""
    layers = dict(model.named_modules())
    for name, tensor in state.items():
        path, _, buffer = name.rpartition(".")
        layer = layers.get(path)
        if isinstance(layer, Holder) and buffer in layer.hollow:
            state[name] = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def fill(state: dict[str, Tensor], model: nn.Module) -> None:
    """Put the values of ``model``'s hollow buffers into ``state``, which has some of its buffers by name."""
    layers = dict(model.named_modules())
    for path in dict.fromkeys(name.rpartition(".")[0] for name in state):
        layer = layers.get(path)
        if isinstance(layer, Holder) and layer.hollow:
            values = {f"{path}.{name}": value for name, value in layer.filled().items()}
            state.update({name: value for name, value in values.items() if name in state})


def rows(weight: Weight, index: Tensor) -> Weight:
    """The rows ``index`` (int64) of a weight. An integer weight keeps the codes and scales of these rows.

    Raises BadInput for a kind of quantized weight other than integers.
    """
    if isinstance(weight, Later):
        return cast(Weight, Later(rows(weight.form, index), lambda: rows(weight.read(), index)))
    return weight[index] if isinstance(weight, Tensor) else as_integers(weight).rows(index)


def rope_half(heads: int, dim: int, half: int) -> Tensor:
    """int64 [heads · dim / 2]: the rows of a projection that are in the first (0) or second (1) half of their head."""
    return torch.arange(heads * dim).view(heads, 2, dim // 2)[:, half].reshape(-1)


def as_integers(weight: QuantizedWeight) -> IntegerWeight:
    """``weight`` itself. Raises BadInput for any other kind of quantized weight."""
    if not isinstance(weight, IntegerWeight):
        raise BadInput(f"{weight.kind} weights have no XNNPACK kernel; see export/stand_ins.py for what replaces them")
    return weight


def require_whole_groups(weight: IntegerWeight) -> None:
    """Raises BadInput when the last group of ``weight`` is shorter than the others."""
    if weight.group:
        raise BadInput(
            f"{weight.codes.shape[1]} columns in groups of {weight.group} end in a shorter one, for which there is no "
            "kernel in a .pte; use one scale a channel"
        )


class Linear(Holder):
    """The weight [N, K] of a linear layer, and its bias [N] in float32.

    The weight is float32, or integers that XNNPACK multiplies with int8 activations. XNNPACK recognizes integers by the
    dequantize operator in front of a ``linear``. ``project`` runs the layer. Raises BadInput for weights that XNNPACK
    has no kernel for.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Buffer(bias.float())
        kind = form(weight)
        self.integer = not isinstance(kind, Tensor)
        if not isinstance(kind, Tensor):
            self._check(as_integers(kind))
        self.hold(weight, _linear_buffers)

    def _check(self, weight: IntegerWeight) -> None:
        self.bits = weight.bits
        self.group_size = None if weight.per_channel else weight.group_size
        if weight.bits not in (4, 8) or (weight.bits == 8 and not weight.per_channel):
            raise BadInput(
                f"{weight.bits}-bit weights in groups of {weight.group_size} have no XNNPACK kernel; "
                "use 4 bits, or 8 bits per channel"
            )
        if self.group_size is not None and self.group_size % GROUP_MULTIPLE:
            raise BadInput(
                f"groups of {self.group_size} have no XNNPACK kernel; use multiples of {GROUP_MULTIPLE} "
                "or one scale a channel"
            )
        require_whole_groups(weight)

    def value(self) -> Tensor:
        """The weight [N, K] in float32, in a graph behind a dequantize operator if it is of integers."""
        if not self.integer:
            return self.get_buffer("weight")
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        stored = (self.get_buffer("codes"), self.get_buffer("scales"), self.get_buffer("zero_points"))
        operators = torch.ops.quantized_decomposed
        if self.group_size is None:
            value = operators.dequantize_per_channel.default(*stored, 0, low, high, torch.int8)
        else:
            value = operators.dequantize_per_channel_group.default(
                *stored, low, high, torch.int8, self.group_size, torch.float32
            )
        return value


def _linear_buffers(weight: Weight) -> dict[str, Tensor]:
    if isinstance(weight, Tensor):
        return {"weight": weight.float()}
    integers = as_integers(weight)
    scales = integers.scales.flatten() if integers.per_channel else integers.scales
    return {"codes": integers.codes, "scales": scales, "zero_points": torch.zeros_like(scales, dtype=torch.int8)}


def round_activations(x: Tensor) -> Tensor:
    """x rounded to int8 per token, asymmetrically, and back. XNNPACK folds the operators into its int8 kernels."""
    operators = torch.ops.quantized_decomposed
    scale, zero_point = operators.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = operators.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
    return operators.dequantize_per_token.default(codes, scale, zero_point, -128, 127, torch.int8, torch.float32)


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """The output [..., N] of each linear layer for x [..., K]. Those with integer weights share one rounding of x."""
    rounded = round_activations(x) if any(linear.integer for linear in linears) else x
    return [F.linear(rounded if linear.integer else x, linear.value(), linear.bias) for linear in linears]


class Mean(nn.Module):
    """Σ x / ``divisor`` over the last axis: x [..., size] → [..., 1]."""

    def __init__(self, size: int, divisor: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((1, size), 1.0 / divisor))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), over the last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("gain", 1.0 + weight.float())
        self.mean = Mean(weight.numel(), weight.numel())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * self.get_buffer("gain")


class Embedding(Holder):
    """The rows of the table for tokens int64 [...]: float32 [..., E], without the embedding scale sqrt(E).

    Raises BadInput for a table that the kernels cannot read.
    """

    def __init__(self, table: Weight) -> None:
        super().__init__()
        self.bits = 32
        kind = form(table)
        if not isinstance(kind, Tensor):
            self.bits = as_integers(kind).bits
            require_whole_groups(as_integers(kind))
        self.hold(table, _table_buffers)

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.get_buffer("table")
        if self.bits == 32:
            return F.embedding(tokens, table)
        operators = torch.ops.quantized_decomposed
        operator = operators.embedding_byte.dtype if self.bits == 8 else operators.embedding_4bit.dtype
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return operator(table, self.get_buffer("scales"), None, low, high, tokens, dtype=torch.float32)


def _table_buffers(table: Weight) -> dict[str, Tensor]:
    """Raises BadInput for scales that are not exact in float16, which the kernel reads."""
    if isinstance(table, Tensor):
        return {"table": table.float()}
    integers = as_integers(table)
    scales = (integers.scales.flatten() if integers.per_channel else integers.scales).half()
    if not scales.is_meta and not torch.equal(scales.float().view(integers.scales.shape), integers.scales):
        raise BadInput("the embedding table's scales are not exact in float16; use quant.integers.bf16_grid")
    return {"table": integers.codes if integers.bits == 8 else pack_embedding(integers.codes), "scales": scales}


def pack_embedding(codes: Tensor) -> Tensor:
    """Codes int8 [V, E] as embedding_4bit reads them: uint8 [V, E/2], the even column in the high nibble, 8 added."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] << 4 | nibbles[:, 1::2]


def floating(weights: Weights, name: str) -> Tensor:
    """A weight that the network uses in float32. Raises BadInput when a recipe has quantized it."""
    weight = weights[name]
    if isinstance(weight, Later):
        weight = weight.read()
    if not isinstance(weight, Tensor):
        raise BadInput(f"{name} is quantized, but only linear layers and the table can be; add a rule 'float32' for it")
    return weight
