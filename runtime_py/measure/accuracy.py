"""The accuracy report: several models, measured on the same tokens and the same questions."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.checks import Check
from export.manifest import sha256_of
from gemma3.chat import GEMMA, ChatFormat
from gemma3.config import VisionConfig
from gemma3.data import Document, documents
from gemma3.errors import BadInput, DoesNotFit, counted
from gemma3.tokenizer import Tokenizer
from runtime_py.measure.comparison import Comparison, compare, comparison_table
from runtime_py.measure.comparison import stretches as cut
from runtime_py.measure.questions import Score, score_table
from runtime_py.report import table
from runtime_py.sessions.protocol import Session

ORIGINAL, OWN = "the original model", "its own quantized eager model"


@dataclass(frozen=True)
class Text:
    """The tokens that all models predict, in stretches that fit the context. Each stretch begins with a BOS."""

    sha256: str  # of the file
    context: int
    stretches: tuple[Document, ...]
    tokens: int  # the number of predicted tokens: all except the BOS of each stretch and image tokens


def read_text(
    path: Path,
    tokenizer: Tokenizer,
    context: int,
    limit: int | None = None,
    vision: VisionConfig | None = None,
    *,
    pan_and_scan: bool = False,
    chat: ChatFormat = GEMMA,
) -> Text:
    """The text of a file, plain or rows (docs/quantization.md), in stretches of at most ``context`` predicted tokens.

    It ends once ``limit`` tokens are predicted (None: no limit). A conversation with images is one stretch and is never
    cut. Raises DoesNotFit when such a conversation does not fit the context, BadInput for a limit below 2, and what
    ``documents`` raises.
    """
    if limit is not None and limit < 2:
        raise BadInput(f"the number of tokens is {limit}; use 2 or more")
    image_token = None if vision is None else vision.image_token_id
    read = documents(path, tokenizer, vision, pan_and_scan=pan_and_scan, chat=chat)
    stretches, tokens = [], 0
    for stretch in _stretches(path, read, tokenizer.bos_id, context):
        if limit is not None and not stretch.images:
            stretch = Document(stretch.ids[: limit - tokens + 1], [])
        stretches.append(stretch)
        tokens += sum(token != image_token for token in stretch.ids[1:])
        if limit is not None and tokens >= limit:
            break
    return Text(sha256_of(path), context, tuple(stretches), tokens)


def _stretches(path: Path, documents: Iterable[Document], bos_id: int, context: int) -> Iterator[Document]:
    for document in documents:
        if not document.images:
            # A chat template may write no BOS. Every stretch has one, as every row of gemma3.data.pack has.
            words = document.ids[1:] if document.ids[0] == bos_id else document.ids
            yield from cut(words, bos_id, context)
        elif len(document.ids) - 1 > context:
            raise DoesNotFit(
                f"{path}: a conversation with {counted(len(document.images), 'image')} has {len(document.ids)} tokens, "
                f"over the context of {context}; leave it out or export with a larger --context"
            )
        else:
            yield document


@dataclass(frozen=True)
class Candidate:
    """A model to measure. Its weights are not in memory before ``open`` is called, which opens a session over it."""

    open: Callable[[], Session]
    own: Callable[[], Session] | None = None  # opens the quantized eager model that the file was exported from
    integers: Check | None = None  # how many of that model's integers are in the file


@dataclass(frozen=True)
class AccuracyReport:
    """Figures by the models' names. ``quality`` says what quantization cost, ``fidelity`` what the export changed."""

    data_sha256: str
    tokens: int
    context: int
    quality: dict[str, Comparison]  # against the original model
    fidelity: dict[str, Comparison]  # against the file's own quantized eager model
    integers: dict[str, Check]
    questions: dict[str, dict[str, Score]]  # by category
    baselines: tuple[str, ...]  # which of the models are baselines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self) -> str:
        """The report as text with tables."""
        blocks = [
            f"{self.tokens} tokens in stretches of at most {self.context}, data sha256 {self.data_sha256}",
            f"Quality: against {ORIGINAL}\n\n{comparison_table(self.quality)}",
        ]
        if self.baselines:
            blocks.append(f"Share of a baseline's quantization loss recovered\n\n{self._recovered()}")
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
    """The share of the baseline's quantization loss that the model recovers, as text: of KL divergence, of ΔNLL."""
    pairs = ((model.kl, baseline.kl), (model.delta_nll, baseline.delta_nll))
    return ", ".join(f"{1 - mine.value / its.value:.1%}" if its.value > 0 else "–" for mine, its in pairs)


def measure_accuracy(
    candidates: dict[str, Candidate],
    baselines: dict[str, Candidate],
    original: Session,
    text: Text,
    ask: Callable[[Session], dict[str, Score]] | None = None,
    progress: Callable[[str, int], None] = lambda name, tokens: None,
) -> AccuracyReport:
    """Measure each candidate and each baseline in turn, so that only one is in memory beside ``original``.

    ``ask`` asks a session the questions. ``progress`` is called with the model's name and the number of tokens that it
    has predicted so far. Raises what ``compare`` raises.
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
