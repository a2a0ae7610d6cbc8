"""The quantized eager model, a part at a time: each weight is made floating point once, for all ways to compute.

A proof needs one model several times over: in float32, in float64, and with its activations rounded as various kernels
round them. These variants differ in their inputs, not in their weights. So here every variant goes through one layer
before the next layer's weights are touched, and no more than one layer and a few rows of the head are in memory. The
network is that of gemma3.model; whole sequences go through it at once, without a cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3 import names
from gemma3.config import ModelConfig
from gemma3.model import Layer, embed, steps_of
from gemma3.norm import RMSNorm
from gemma3.vision import Embeddings, MultiModalProjector
from gemma3.vision import Layer as VisionLayer
from quant.activations import Round, Rounding, keep_float
from quant.eager import Matrix, rows_of
from quant.integers import ROWS_AT_ONCE, IntegerWeight
from quant.weights import QuantizedWeights

Part = TypeVar("Part", bound=nn.Module)

LOGITS_AT_ONCE = 32  # positions; for a vocabulary of 262 144 each takes a megabyte in each variant


@dataclass(frozen=True)
class Variant:
    """One way to compute the model.

    ``rounding``: how the inputs of linear layers are rounded. ``nudge``: the seed of a random change of the embeddings,
    and of the vision model's, by one unit in the last place; None: no change. With ``round_heads`` keys and values are
    rounded as the weights' ``kv`` says. ``adding``: the seed of random errors of all matrix products, see
    ``error_of_adding``; None: no errors.
    """

    dtype: torch.dtype = torch.float32
    rounding: Rounding = keep_float
    nudge: int | None = None
    round_heads: bool = False
    adding: int | None = None

    def nudged(self, x: Tensor) -> Tensor:
        if self.nudge is None:
            return x
        signs = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(self.nudge))
        return x * (1 + torch.finfo(torch.float32).eps * signs)


@dataclass(frozen=True)
class Streamed:
    """The model of ``config`` with ``weights``, in each of ``variants``. Results are in the order of the variants.

    ``report`` is called after each layer of the text or vision model. Each weight is taken from ``weights`` once for
    each method that needs it, in the order of the layers, and not kept.
    """

    config: ModelConfig
    weights: QuantizedWeights
    variants: Sequence[Variant]
    report: Callable[[], None] = lambda: None

    def soft_tokens(self, pixels: Tensor) -> list[Tensor]:
        """The soft tokens, float32 [N, T, E], of images float32 [N, 3, S, S] in 0 … 1."""
        vision = self.config.vision
        assert vision is not None
        tower, projector = names.VISION_TOWER, partial(MultiModalProjector, vision, self.config.hidden_size)
        x = self._through(
            f"{tower}.embeddings",
            partial(Embeddings, vision),
            [pixels.to(variant.dtype) for variant in self.variants],
        )
        x = [variant.nudged(one) for variant, one in zip(self.variants, x, strict=True)]
        for index in range(vision.num_hidden_layers):
            x = self._through(names.vision_layer(index), partial(VisionLayer, vision), x)
            self.report()
        norm = partial(nn.LayerNorm, vision.hidden_size, eps=vision.layer_norm_eps)
        x = self._through(f"{tower}.post_layernorm", norm, x)
        return [one.float() for one in self._through(names.PROJECTOR, projector, x)]

    def embed(self, tokens: Tensor, soft_tokens: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The first layer's input [1, S, E]. The arguments are those of ``hidden``."""
        rows = rows_of(self._matrix(names.EMBEDDING), tokens.flatten())[None]
        given = [None] * len(self.variants) if soft_tokens is None else soft_tokens
        return [
            embed(self.config, variant.nudged(rows.to(variant.dtype)), tokens, one)
            for variant, one in zip(self.variants, given, strict=True)
        ]

    def layers(self) -> Iterator[tuple[int, int, Layer]]:
        """Every layer for every variant: (the layer's index, the variant's number, the layer with its weights).

        A layer is valid until the next one is asked for.
        """
        for index, spec in enumerate(self.config.layers):
            for number, layer in self._part(names.layer(index), partial(Layer, self.config, spec)):
                rounds = self.variants[number].round_heads
                layer.self_attn.round_heads = self.weights.kv.get(index) if rounds else None
                yield index, number, layer
            self.report()

    def hidden(self, tokens: Tensor, soft_tokens: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The head's input [1, S, E] for tokens [1, S]. ``soft_tokens`` [1, N, T, E] are those of each variant."""
        x = self.embed(tokens, soft_tokens)
        images = soft_tokens is not None
        steps = {dtype: steps_of(self.config, tokens, dtype, images=images) for dtype in {one.dtype for one in x}}
        for index, number, layer in self.layers():
            x[number] = layer(x[number], steps[x[number].dtype][self.config.layers[index]], None)
        return self.norm(x)

    def norm(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The head's input from the last layer's output."""
        norm = partial(RMSNorm, self.config.hidden_size, self.config.rms_norm_eps)
        return self._through(names.FINAL_NORM.removesuffix(".weight"), norm, x)

    def logits(self, x: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The logits, float32 [V], of each variant at one position after the other, from the head's input [P, E]."""
        name = names.head_of(self.config)
        head = self._matrix(name)
        if isinstance(head, IntegerWeight):
            rounds = [variant.rounding(name, head) for variant in self.variants]
            x = [one if round is None else round(one) for one, round in zip(x, rounds, strict=True)]
        dtypes = dict.fromkeys(variant.dtype for variant in self.variants)
        for start in range(0, len(x[0]), LOGITS_AT_ONCE):
            some = [one[start : start + LOGITS_AT_ONCE] for one in x]
            found = [torch.empty(len(one), self.config.vocab_size) for one in some]
            for row in range(0, self.config.vocab_size, ROWS_AT_ONCE):
                part = slice(row, row + ROWS_AT_ONCE)
                rows = rows_of(head, part)
                wide = {dtype: rows.to(dtype) for dtype in dtypes}
                for one, inputs in zip(found, some, strict=True):
                    one[:, part] = F.linear(inputs, wide[inputs.dtype])
            for one, inputs, errors in zip(found, some, self._errors, strict=True):
                if errors is not None:
                    one += error_of_adding(one, inputs.shape[-1], errors)
            yield from map(list, zip(*found, strict=True))

    @cached_property
    def _errors(self) -> list[torch.Generator | None]:
        """What draws the errors of adding, of each variant that has any."""
        seeds = [variant.adding for variant in self.variants]
        return [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]

    def _matrix(self, name: str) -> Matrix:
        weight = self.weights.tensors[name]
        if isinstance(weight, IntegerWeight):
            return weight
        return weight.detach() if isinstance(weight, Tensor) else weight.dequantize()

    def _through(self, prefix: str, make: Callable[[], nn.Module], x: Sequence[Tensor]) -> list[Tensor]:
        """What a part of the model makes of each variant's x.

        Variants that have had the same x and rounding until here share the result: some kernels differ in the text
        model's layers, but not in the vision model's.
        """
        found: dict[tuple[int, tuple[Round | None, ...], int | None], Tensor] = {}
        results = list(x)
        for number, part in self._part(prefix, make):
            rounds = tuple(module.round for module in part.modules() if isinstance(module, RoundedLinear))
            key = (id(x[number]), rounds, self.variants[number].adding)
            if key not in found:
                found[key] = part(x[number])
            results[number] = found[key]
        return results

    def _part(self, prefix: str, make: Callable[[], Part]) -> Iterator[tuple[int, Part]]:
        """The part of the model whose weights' names begin with ``prefix``, for each variant: (its number, the part).

        The variants of one dtype come one after the other, because they share the part.
        """
        with torch.device("meta"):
            part = make().eval()
            linears = {
                path: RoundedLinear(module.in_features, module.out_features, module.bias is not None)
                for path, module in part.named_modules()
                if isinstance(module, nn.Linear)
            }
            for path, linear in linears.items():
                part.set_submodule(path, linear)
        own = {name: self.weights.tensors[f"{prefix}.{name}"] for name in part.state_dict()}
        floats = {
            name: weight.float() if isinstance(weight, Tensor) else weight.dequantize() for name, weight in own.items()
        }
        for dtype in dict.fromkeys(variant.dtype for variant in self.variants):
            part.load_state_dict({name: value.detach().to(dtype) for name, value in floats.items()}, assign=True)
            part.requires_grad_(False)
            for number, variant in enumerate(self.variants):
                if variant.dtype != dtype:
                    continue
                for path, linear in linears.items():
                    weight = own[f"{path}.weight"]
                    name = f"{prefix}.{path}.weight"
                    linear.round = variant.rounding(name, weight) if isinstance(weight, IntegerWeight) else None
                    linear.errors = self._errors[number]
                yield number, part


class RoundedLinear(nn.Linear):
    """A linear layer, x [..., K] → [..., N].

    It first rounds its input by ``round``, if there is one, and adds an error that ``errors`` draws, if it is there.
    """

    round: Round | None = None
    errors: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if self.round is None else self.round(x))
        return y if self.errors is None else y + error_of_adding(y, x.shape[-1], self.errors)


def error_of_adding(y: Tensor, terms: int, generator: torch.Generator) -> Tensor:
    """Random errors for sums y [..., N] of so many terms, as large as those of adding term after term in float32.

    Some kernels do that, while a library for large matrices adds sums of blocks. Of n terms without a common sign the
    sum of the first k grows with √k, and rounding it adds an error of up to half a unit in its last place. Together
    they are 2⁻²⁴ √(n / 12) of the sum's standard deviation, which is taken from y's rows. (Measured on ONNX Runtime's
    MatMulNBits with more than one row, n of 640 to 21 504: 0.9 to 1.0 times that.)
    """
    deviation = y.square().mean(-1, keepdim=True).sqrt() * (2.0**-24 * math.sqrt(terms / 12))
    return deviation * torch.randn(y.shape, dtype=y.dtype, generator=generator)
