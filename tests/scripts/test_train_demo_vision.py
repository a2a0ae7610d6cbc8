"""The training of the multimodal demo checkpoint."""

import torch

from scripts.train_demo import IGNORE
from scripts.train_demo_vision import Row, answer_loss


def test_all_answers_have_the_same_weight() -> None:
    """One word weighs as much as a sentence, also where one row ends in an answer and the next begins with one."""
    targets = [[IGNORE, 3, IGNORE, 5, 6, 7], [2, 1, IGNORE, IGNORE, 4, IGNORE]]
    answers = [[3], [5, 6, 7], [2, 1], [4]]
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    said = torch.tensor([3, 5, 6, 7, 2, 1, 4])
    losses = iter(-logits.log_softmax(-1)[range(7), said])
    expected = sum(sum(next(losses) for _ in answer) / len(answer) for answer in answers) / len(answers)
    found = answer_loss(logits, said, [Row([0] * 6, row, [], []) for row in targets])
    torch.testing.assert_close(found, expected)
