"""The distillation loss: the student learns the teacher's probabilities over the whole vocabulary, at every position.

Logits exist for a few tokens at a time, so that a vocabulary of 262 144 fits in memory.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quant.qat.fake import head_input

Loss = Literal["full", "sampled"]
SAMPLES = 256
# How many logits exist at once: 64 MiB of float32, in a few tensors of that size.
LOGITS_AT_ONCE = 1 << 24


class HeadLoss(torch.autograd.Function):
    """The cross-entropy of the student to its target over the vocabulary, and the KL divergence, summed over tokens.

    apply(hidden [T, E], table [V, E], teacher_hidden [T, E'], teacher_table [V, E'], generator) → float32 [2].
    Only the first, the cross-entropy, has a gradient. It is computed in the forward pass, where the logits are,
    ``LOGITS_AT_ONCE`` of them at a time: the logits [T, V] never exist all together.

    Without a generator the target is the teacher's distribution p. With one, p is estimated by SAMPLES draws from it
    with replacement, each worth 1/SAMPLES. This target is unbiased, so the gradient is right on average. Keeping only
    the teacher's 256 largest probabilities and renormalizing them does not work: it teaches a sharper distribution than
    the teacher's, and the result is worse than no training (tests/quant/qat/test_loss.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        teacher_hidden: Tensor,
        teacher_table: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, table = hidden.to(dtype), table.to(dtype)
            teacher_hidden, teacher_table = teacher_hidden.to(dtype), teacher_table.to(dtype)
        sums = torch.zeros(2, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        table_grad = torch.zeros_like(table, dtype=torch.float32)
        at_once = max(1, LOGITS_AT_ONCE // len(table))
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            teacher = F.linear(teacher_hidden[part], teacher_table).float().log_softmax(-1)
            student = F.linear(hidden[part], table).float().log_softmax(-1)
            p = teacher.exp()
            sums[1] += torch.sum(p * teacher.sub_(student))
            target = p if generator is None else sample(p, generator)
            sums[0] -= torch.sum(target * student)
            logits_grad = student.exp_().sub_(target).to(hidden.dtype)
            torch.mm(logits_grad, table, out=hidden_grad[part])
            if table_grad.dtype == hidden.dtype:
                table_grad.addmm_(logits_grad.t(), hidden[part])
            else:
                table_grad += logits_grad.t() @ hidden[part]
        ctx.save_for_backward(hidden_grad, table_grad)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, table_grad = ctx.saved_tensors
        factor = grads[0][0]
        return hidden_grad * factor, table_grad * factor, None, None, None


head_loss: Callable[..., Tensor] = HeadLoss.apply


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """An unbiased estimate of p [T, V] from SAMPLES draws per row: counts / SAMPLES."""
    drawn = torch.multinomial(p, SAMPLES, replacement=True, generator=generator)
    return torch.zeros_like(p).scatter_add_(1, drawn, torch.full_like(p[:, :1], 1 / SAMPLES).expand(-1, SAMPLES))


class Distillation(nn.Module):
    """tokens [B, S] → the sums of ``HeadLoss`` over the positions ``learned`` (bool [B, S]; None: all), float32 [2].

    Both networks have ``hidden(tokens)`` [B, S, E] and ``lm_head``. For data with images they also have
    ``encode_images(pixels)``, whose result ``hidden`` takes as ``soft_tokens``. ``pixels`` is float32
    [N, 3, size, size] in 0 … 1; N may be 0.
    """

    student: Any
    teacher: Any

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        learned: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        with torch.no_grad():
            teacher_hidden = _hidden(self.teacher, tokens, learned, pixels)
        with parametrize.cached():
            hidden = head_input(self.student.lm_head, _hidden(self.student, tokens, learned, pixels))
            table = self.student.lm_head.weight
        teacher_table = self.teacher.lm_head.weight
        return head_loss(hidden, table, teacher_hidden, teacher_table, generator)


def _hidden(network: Any, tokens: Tensor, learned: Tensor | None, pixels: Tensor | None) -> Tensor:
    """The hidden values [T, E] that the head takes, at the positions ``learned``."""
    if pixels is None:
        x = network.hidden(tokens)
    else:
        # A batch without images still runs the vision model once: under FSDP2 the other processes wait for this
        # process's share of its weights.
        given = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
        x = network.hidden(tokens, soft_tokens=network.encode_images(given)[: len(pixels)])
    return x.flatten(0, 1) if learned is None else x[learned]
