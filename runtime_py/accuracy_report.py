"""What ``gemma-edge accuracy`` measures of several models on the same tokens and questions, and how it shows it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.manifest import Check, sha256_of
from gemma3.config import VisionConfig
from gemma3.data import Document, documents
from gemma3.errors import BadInput, DoesNotFit
from gemma3.tokenizer import Tokenizer
from runtime_py.accuracy import Comparison, compare, comparison_table
from runtime_py.accuracy import stretches as cut
from runtime_py.questions import Score, score_table
from runtime_py.report import table
from runtime_py.session import Session

ORIGINAL, OWN = "the original model", "its own quantized eager model"


@dataclass(frozen=True)
class Text:
    """The tokens that all models predict: stretches of at most a context, each with a BOS of its own in front."""

    sha256: str  # of the file
    context: int
    stretches: tuple[Document, ...]
    tokens: int  # predicted: all but each stretch's BOS and image tokens


def read_text(
    path: Path,
    tokenizer: Tokenizer,
    context: int,
    limit: int | None = None,
    vision: VisionConfig | None = None,
    *,
    pan_and_scan: bool = False,
) -> Text:
    """Plain text, or conversations (.jsonl); at most the first ``limit`` tokens. Raises what ``documents`` does.

    A conversation with images is one stretch, never cut; DoesNotFit when it is over the context.
    """
    if limit is not None and limit < 2:
        raise BadInput(f"the number of tokens is {limit}; use 2 or more")
    image_token = None if vision is None else vision.image_token_id
    stretches, tokens = [], 0
    for stretch in _pieces(path, documents(path, tokenizer, vision, pan_and_scan=pan_and_scan), context):
        if limit is not None and not stretch.images:
            stretch = Document(stretch.ids[: limit - tokens + 1], [])
        stretches.append(stretch)
        tokens += sum(token != image_token for token in stretch.ids[1:])
        if limit is not None and tokens >= limit:
            break
    return Text(sha256_of(path), context, tuple(stretches), tokens)


def _pieces(path: Path, documents: Iterable[Document], context: int) -> Iterator[Document]:
    for document in documents:
        if not document.images:
            yield from cut(document.ids[1:], document.ids[0], context)
        elif len(document.ids) - 1 > context:
            raise DoesNotFit(
                f"{path}: a conversation with {len(document.images)} images has {len(document.ids)} tokens, "
                f"the context {context}; leave it out or export with a larger --context"
            )
        else:
            yield document


@dataclass(frozen=True)
class Candidate:
    """A model to measure; nothing of it is in memory before a session of it is opened."""

    open: Callable[[], Session]
    own: Callable[[], Session] | None = None  # the quantized eager model that its file was exported from
    integers: Check | None = None  # how many of that model's integers are in the file


@dataclass(frozen=True)
class AccuracyReport:
    """Figures by model. ``quality`` is what quantization cost, ``fidelity`` what the export changed."""

    data_sha256: str
    tokens: int
    context: int
    quality: dict[str, Comparison]  # against the original model
    fidelity: dict[str, Comparison]  # against the file's own quantized eager model
    integers: dict[str, Check]
    questions: dict[str, dict[str, Score]]  # by category
    baselines: tuple[str, ...]  # which of the models are there to be compared with

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self) -> str:
        blocks = [
            f"{self.tokens} tokens in stretches of at most {self.context}, data sha256 {self.data_sha256}",
            f"Quality: against {ORIGINAL}\n\n{comparison_table(self.quality)}",
        ]
        if self.baselines:
            blocks.append(f"How much of a baseline's loss is not lost\n\n{self._recovered()}")
        if self.fidelity:
            counts = "\n".join(f"{name}: {check.name}" for name, check in self.integers.items())
            blocks.append(f"Export fidelity: against {OWN}\n\n{comparison_table(self.fidelity)}\n\n{counts}".rstrip())
        if self.questions:
            blocks.append(f"Exact match of greedy chat answers\n\n{score_table(self.questions)}")
        return "\n\n".join(blocks)

    def _recovered(self) -> str:
        rows = [
            (name, *(recovered(figures, self.quality[baseline]) for baseline in self.baselines))
            for name, figures in self.quality.items()
            if name not in self.baselines
        ]
        return table(("KL, ΔNLL", *self.baselines), rows)


def recovered(model: Comparison, baseline: Comparison) -> str:
    """The share of the baseline's KL divergence and of its loss that the model does not have."""
    pairs = ((model.kl, baseline.kl), (model.delta_nll, baseline.delta_nll))
    return ", ".join(f"{1 - mine.value / its.value:.1%}" if its.value > 0 else "–" for mine, its in pairs)


def measure(
    candidates: dict[str, Candidate],
    baselines: dict[str, Candidate],
    original: Session,
    text: Text,
    ask: Callable[[Session], dict[str, Score]] | None = None,
    progress: Callable[[str, int], None] = lambda name, tokens: None,
) -> AccuracyReport:
    """Each candidate in turn, so that no more than one is in memory beside ``original``.

    ``ask`` puts the questions to a session; ``progress`` is told the model and how many tokens it has predicted.
    Raises what ``compare`` does.
    """
    quality, fidelity, questions = {}, {}, {}
    if ask:
        questions["original"] = ask(original)
    for name, candidate in (candidates | baselines).items():
        session = candidate.open()
        references = {ORIGINAL: original}
        if candidate.own:
            references[OWN] = candidate.own()
        figures = compare(session, references, text.stretches, partial(progress, name))
        quality[name] = figures[ORIGINAL]
        if OWN in figures:
            fidelity[name] = figures[OWN]
        if ask:
            questions[name] = ask(session)
    integers = {name: candidate.integers for name, candidate in candidates.items() if candidate.integers}
    return AccuracyReport(
        text.sha256, text.tokens, text.context, quality, fidelity, integers, questions, tuple(baselines)
    )
