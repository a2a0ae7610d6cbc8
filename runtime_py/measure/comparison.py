"""Compares the predictions of one model with another's on the same tokens, teacher-forced through any session.

The statistics are those of llama.cpp's ``llama-perplexity --kl-divergence`` (tools/perplexity/perplexity.cpp), but they
cover every token of a stretch of text (llama.cpp: its second half) and the whole vocabulary (llama.cpp leaves out
tokens to which the reference gives less than e^−16), and they use the logits as they are (llama.cpp keeps the
reference's in 16 bits). Logarithms are natural: losses and divergences are in nats per token. Standard errors treat
tokens as independent.

There are two separate questions. Against the original, the figures say what quantization cost. Against the file's own
quantized eager model, they say what the export changed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma3.data import Document
from gemma3.errors import BadInput, VerificationFailed
from runtime_py.report import table
from runtime_py.sessions.protocol import Logits, Session, chunks, every_position

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    @staticmethod
    def of(values: ArrayLike) -> "Estimate":
        """The mean of two or more independent values, and its standard error."""
        sample = np.asarray(values, np.float64)
        return Estimate(float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(len(sample)))

    def exp(self) -> "Estimate":
        """e to the power of this estimate. The error is propagated to first order."""
        value = math.exp(self.value)
        return Estimate(value, value * self.error)

    def sqrt(self) -> "Estimate":
        """The square root of this estimate. The error is propagated to first order; the root of 0 is 0 ± 0."""
        value = math.sqrt(self.value)
        return Estimate(value, 0.5 / value * self.error if value else 0.0)

    def show(self, format: str, scale: float = 1.0) -> str:
        return f"{self.value * scale:{format}} ± {self.error * scale:.2g}"


@dataclass(frozen=True)
class Comparison:
    """The figures of a model against a reference on the same tokens."""

    tokens: int
    perplexity: Estimate
    reference_perplexity: Estimate
    delta_nll: Estimate  # paired: the mean over tokens of (the model's loss − the reference's)
    perplexity_ratio: Estimate  # e^ΔNLL; paired too, so tokens that are hard for both models do not add to its error
    kl: Estimate  # KL(reference ‖ model) over the whole vocabulary
    kl_median: float
    kl_99: float  # percentiles, linearly interpolated
    kl_99_9: float
    kl_max: float
    same_top: Estimate  # share of tokens for which both models have the same most likely id
    rms_delta_p: Estimate  # root mean square difference of the probabilities of the actual next id


class Prediction:
    """The prediction of the next id that logits, float32 [V], make: log probabilities float64 [V], and the top id."""

    def __init__(self, logits: Logits) -> None:
        wide = logits.astype(np.float64)
        wide -= wide.max()
        wide -= math.log(float(np.exp(wide).sum()))
        self.log_probabilities: Floats = wide
        self.top = int(logits.argmax())  # from the logits, because the subtractions can make ties


@dataclass
class Tally:
    """The four numbers that are kept for each token. Its logits are not kept."""

    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)

    def add(self, reference: Prediction, model: Prediction, token: int) -> None:
        """Add the two predictions of a token, and the token that followed."""
        log_p, log_q = reference.log_probabilities, model.log_probabilities
        self.nll.append(-float(log_q[token]))
        self.reference_nll.append(-float(log_p[token]))
        self.kl.append(float(np.exp(log_p) @ (log_p - log_q)))
        self.same_top.append(reference.top == model.top)

    def comparison(self) -> Comparison:
        """The figures over all tokens added, which must be two or more."""
        nll, reference_nll = np.array(self.nll), np.array(self.reference_nll)
        delta = Estimate.of(nll - reference_nll)
        median, p99, p999 = np.quantile(self.kl, (0.5, 0.99, 0.999)).tolist()
        return Comparison(
            tokens=len(nll),
            perplexity=Estimate.of(nll).exp(),
            reference_perplexity=Estimate.of(reference_nll).exp(),
            delta_nll=delta,
            perplexity_ratio=delta.exp(),
            kl=Estimate.of(self.kl),
            kl_median=median,
            kl_99=p99,
            kl_99_9=p999,
            kl_max=max(self.kl),
            same_top=Estimate.of(self.same_top),
            rms_delta_p=Estimate.of((np.exp(-nll) - np.exp(-reference_nll)) ** 2).sqrt(),
        )


def stretches(ids: Sequence[int], bos_id: int, context: int) -> list[Document]:
    """Text (ids without BOS), cut into stretches that begin with BOS and have at most ``context`` predicted ids."""
    return [Document([bos_id, *stretch], []) for stretch in chunks(ids, context)]


def compare(
    model: Session,
    references: Mapping[str, Session],
    stretches: Iterable[Document],
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Comparison]:
    """Compare ``model`` with all ``references`` (by name) at once, so that a slow model runs only once.

    Each stretch is fed from an empty cache. All its ids are predicted, except the first and image tokens. ``progress``
    is called with the number of predicted tokens so far. Raises BadInput when fewer than two tokens are predicted or a
    reference has another vocabulary, and VerificationFailed when logits are not finite.
    """
    sessions = (model, *references.values())
    for name, reference in references.items():
        if reference.vocab_size != model.vocab_size:
            raise BadInput(
                f"{name} has {reference.vocab_size} tokens, the model {model.vocab_size}; "
                "compare models with the same vocabulary"
            )
    tallies = {name: Tally() for name in references}
    tokens = 0
    for stretch in stretches:
        if len(stretch.ids) < 2:
            continue
        for session in sessions:
            session.reset()
        fed = (every_position(session, stretch.ids[:-1], stretch.images) for session in sessions)
        for steps in zip(*fed, strict=True):
            (position,) = {position for position, _ in steps}
            token, logits = stretch.ids[position + 1], [one for _, one in steps]
            if model.vision is not None and token == model.vision.image_token_id:
                continue
            for name, one in zip(("the model", *references), logits, strict=True):
                if not np.isfinite(one).all():
                    raise VerificationFailed(
                        f"{name} gives NaN or infinite logits at position {position}; do not use it"
                    )
            mine, *theirs = map(Prediction, logits)
            for tally, other in zip(tallies.values(), theirs, strict=True):
                tally.add(other, mine, token)
            tokens += 1
            progress(tokens)
    if tokens < 2:
        raise BadInput("fewer than 2 tokens to predict; give more text")
    return {name: tally.comparison() for name, tally in tallies.items()}


def comparison_table(comparisons: Mapping[str, Comparison]) -> str:
    """A table with one column for each model. All are compared with the same reference on the same tokens."""
    figures = comparisons.values()
    rows = {
        "perplexity": [one.perplexity.show(".5g") for one in figures],
        "reference's perplexity": [one.reference_perplexity.show(".5g") for one in figures],
        "perplexity ratio": [one.perplexity_ratio.show(".5f") for one in figures],
        "ΔNLL, nats (paired)": [one.delta_nll.show("+.6f") for one in figures],
        "KL divergence, nats": [one.kl.show(".3g") for one in figures],
        "KL median": [f"{one.kl_median:.3g}" for one in figures],
        "KL 99 %": [f"{one.kl_99:.3g}" for one in figures],
        "KL 99.9 %": [f"{one.kl_99_9:.3g}" for one in figures],
        "KL max": [f"{one.kl_max:.3g}" for one in figures],
        "same top token, %": [one.same_top.show(".3f", 100) for one in figures],
        "RMS Δp, %": [one.rms_delta_p.show(".3f", 100) for one in figures],
    }
    return table(("", *comparisons), [(label, *cells) for label, cells in rows.items()])
