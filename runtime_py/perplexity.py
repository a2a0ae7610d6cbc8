"""Perplexity of a text, teacher-forced through any session."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime_py.golden import log_sum_exp
from runtime_py.session import Session


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats a token, its standard error over tokens, and how many tokens."""

    mean_nll: float
    standard_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    @property
    def perplexity_error(self) -> float:
        """The standard error carried through exp, to first order."""
        return self.perplexity * self.standard_error

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} ± {self.perplexity_error:.3f}"


def measure_perplexity(session: Session, ids: Sequence[int], bos_id: int) -> Perplexity:
    """Each of ``ids`` (without BOS; two or more) given those before it.

    A text longer than the context is cut into stretches that each begin with BOS and an empty cache.
    """
    losses: list[float] = []
    stretch = session.context - 1
    for start in range(0, len(ids), stretch):
        session.reset()
        logits = session.step(bos_id)
        for token in ids[start : start + stretch]:
            wide = logits.astype(np.float64)
            losses.append(log_sum_exp(wide) - float(wide[token]))
            logits = session.step(token)
    error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses))
    return Perplexity(float(np.mean(losses)), error, len(losses))
