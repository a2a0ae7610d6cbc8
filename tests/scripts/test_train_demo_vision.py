"""How the demo checkpoint that sees is trained."""

import sys
from pathlib import Path

import torch

# The scripts import their siblings by bare name, as Python lets a script that is run.
sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from scripts.train_demo import IGNORE
from scripts.train_demo_vision import Row, answer_loss


def test_answers_weigh_alike() -> None:
    """A word as much as a sentence, also where one row's answer ends where the next row's begins."""
    targets = [[IGNORE, 3, IGNORE, 5, 6, 7], [2, 1, IGNORE, IGNORE, 4, IGNORE]]
    answers = [[3], [5, 6, 7], [2, 1], [4]]
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    said = torch.tensor([3, 5, 6, 7, 2, 1, 4])
    losses = iter(-logits.log_softmax(-1)[range(7), said])
    expected = sum(sum(next(losses) for _ in answer) / len(answer) for answer in answers) / len(answers)
    found = answer_loss(logits, said, [Row([0] * 6, row, [], []) for row in targets])
    torch.testing.assert_close(found, expected)
