from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quant.qat.loss as module
from quant.qat.loss import head_loss


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def head(tokens: int = 11, vocabulary: int = 50, seed: int = 0) -> list[Tensor]:
    """The student's hidden states and table, then the teacher's, which have another width."""
    torch.manual_seed(seed)
    hidden, table = torch.randn(tokens, 8), torch.randn(vocabulary, 8)
    return [hidden.requires_grad_(True), table.requires_grad_(True), torch.randn(tokens, 6), torch.randn(vocabulary, 6)]


@pytest.mark.parametrize("at_once", [1, 3 * 50, 1 << 24])
def test_the_loss_and_its_gradient_equal_autograds(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    hidden, table, teacher_hidden, teacher_table = head()
    sums = head_loss(hidden, table, teacher_hidden, teacher_table, None)
    (3.0 * sums[0]).backward()  # type: ignore[no-untyped-call]
    ours = hidden.grad, table.grad
    hidden.grad = table.grad = None
    teacher, student = F.linear(teacher_hidden, teacher_table).log_softmax(-1), F.linear(hidden, table).log_softmax(-1)
    loss = -(teacher.exp() * student).sum()
    (3.0 * loss).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(sums[0], loss)
    torch.testing.assert_close(sums[1], F.kl_div(student, teacher, reduction="sum", log_target=True))
    torch.testing.assert_close(ours, (hidden.grad, table.grad))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest tensor that is made in the block."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_of_all_tokens_never_exist_together() -> None:
    tokens, vocabulary = 300, 262_144
    hidden, table = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        loss = head_loss(hidden, table, hidden.detach(), table.detach(), None)[0]
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.elements == module.LOGITS_AT_ONCE == 64 * vocabulary < tokens * vocabulary


def test_sampling_is_right_on_average_and_the_top_alone_is_worse_than_no_training() -> None:
    """Free logits start near a teacher with a long tail and follow each target's gradient."""
    vocabulary, tokens = 4000, 4
    torch.manual_seed(0)
    teacher = (torch.arange(1, vocabulary + 1.0).pow(-0.7)).log().expand(tokens, -1).log_softmax(-1)
    p = teacher.exp()
    generator = torch.Generator().manual_seed(0)
    largest = p.topk(module.SAMPLES)
    top = torch.zeros_like(p).scatter_(1, largest.indices, largest.values / largest.values.sum(-1, keepdim=True))
    targets: dict[str, Callable[[], Tensor]] = {
        "full": lambda: p,
        "sampled": lambda: module.sample(p, generator),
        "top": lambda: top,
    }
    start = teacher + 0.5 * torch.randn_like(teacher)
    kl = {"start": float(F.kl_div(start.log_softmax(-1), teacher, reduction="batchmean", log_target=True))}
    for name, target in targets.items():
        logits = start.clone()
        for step in range(400):
            logits += 100 * (1 - step / 400) * (target() - logits.softmax(-1))
        kl[name] = float(F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True))
    assert kl["full"] < 0.5 * kl["start"]
    assert kl["sampled"] < 0.5 * kl["start"]
    assert kl["top"] > 2 * kl["start"]
