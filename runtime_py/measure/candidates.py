"""The models that ``accuracy`` measures: a bundle's graphs, or the eager model of a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from export.bundle import stored_kv, weights_behind
from export.checks import require_passed
from export.integers import check_integers
from export.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from gemma3.cache import DEFAULT_CHUNK, DEFAULT_CONTEXT
from gemma3.errors import BadInput, DoesNotFit
from gemma3.generation_config import stop_ids
from gemma3.host.progress import Progress
from gemma3.tokenizer import Tokenizer
from quant.source import Source, open_source
from runtime_py.backends import backend_of, formats_of, open_session
from runtime_py.measure.accuracy import AccuracyReport, Candidate, measure_accuracy, read_text
from runtime_py.measure.questions import exact_match, read_questions
from runtime_py.proof.references import eager_session
from runtime_py.sessions.eager import open_eager


@dataclass(frozen=True)
class Model:
    """What a model argument names: an opened bundle, or an opened checkpoint."""

    path: Path
    opened: Manifest | Source

    @property
    def context(self) -> int:
        """The largest number of positions that the model can hold."""
        return self.opened.context if isinstance(self.opened, Manifest) else self.opened.config.max_position_embeddings

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path / TOKENIZER) if isinstance(self.opened, Manifest) else self.opened.tokenizer


def open_model(path: Path) -> Model:
    """Open a bundle or a checkpoint. Raises BadInput when ``path`` is neither, and what ``read_manifest`` raises."""
    return Model(path, read_manifest(path) if (path / MANIFEST).exists() else open_source(path))


def accuracy(
    model: Path,
    *,
    reference: Path,
    data: Path,
    baselines: Sequence[Path] = (),
    checkpoint: Path | None = None,
    questions: Path | None = None,
    format: str | None = None,
    context: int | None = None,
    tokens: int | None = None,
    pan_and_scan: bool = False,
    threads: int | None = None,
) -> AccuracyReport:
    """Measure what quantization cost: the predictions of ``model``, on ``data``, against those of the original.

    ``model`` is a bundle or a checkpoint, ``reference`` the original, and ``baselines`` are measured too. With
    ``checkpoint``, which the bundle was exported from, the report also says what the export changed. ``questions`` is a
    file of questions whose right answers are counted. ``context`` bounds a stretch of text (None: what all models hold,
    at most 4096), ``tokens`` the number of predictions. Raises BadInput, DoesNotFit and VerificationFailed for models
    and data that cannot be used or do not belong together.
    """
    original = open_source(reference)
    asked = read_questions(questions) if questions else []
    opened, others = open_model(model), [open_model(path) for path in baselines]
    context = common_context([Model(reference, original), opened, *others], context)
    tokenizer, chat, vision = original.tokenizer, original.chat, original.config.vision
    text = read_text(data, tokenizer, context, tokens, vision, pan_and_scan=pan_and_scan, chat=chat)
    candidates = candidates_of(opened, context, tokenizer, format, threads, checkpoint)
    compared: dict[str, Candidate] = {}
    for other in others:
        compared |= candidates_of(other, context, tokenizer, format, threads)
    stops = stop_ids(original.config, original.generation, tokenizer)
    ask = partial(
        exact_match, tokenizer=tokenizer, questions=asked, stop_ids=stops, pan_and_scan=pan_and_scan, chat=chat
    )
    session = open_eager(original, context, min(DEFAULT_CHUNK, context))
    return measure_accuracy(candidates, compared, session, text, ask if asked else None, _bars(text.tokens))


def common_context(models: Sequence[Model], wanted: int | None) -> int:
    """``wanted``, or if None the most positions that all of ``models`` can hold, but at most 4096.

    Raises DoesNotFit when ``wanted`` is more than one of them can hold, and BadInput when it is below 1.
    """
    if wanted is not None and wanted < 1:
        raise BadInput(f"context {wanted} holds no text; use 1 or more")
    least = min(models, key=lambda model: model.context)
    if wanted is not None and wanted > least.context:
        raise DoesNotFit(
            f"context {wanted} is over the {least.context} positions of {least.path}; use --context {least.context}"
        )
    return min(least.context, DEFAULT_CONTEXT) if wanted is None else wanted


def candidates_of(
    model: Model,
    context: int,
    tokenizer: Tokenizer,
    format: str | None,
    threads: int | None,
    checkpoint: Path | None = None,
) -> dict[str, Candidate]:
    """The candidates of a model, by the names that the report shows: each graph of a bundle, or the checkpoint itself.

    ``checkpoint`` is what the bundle was exported from. Raises BadInput when the model has another tokenizer than
    ``tokenizer`` and when ``checkpoint`` does not belong to it, and VerificationFailed when the bundle does not hold
    that checkpoint's integers.
    """
    path, manifest = model.path, model.opened
    name = path.resolve().name
    if model.tokenizer.sha256 != tokenizer.sha256:
        raise BadInput(f"{path}: its tokenizer is not that of {tokenizer.path}; give the checkpoint it was made of")
    if not isinstance(manifest, Manifest):
        if checkpoint is not None:
            raise BadInput(f"{path}: is not a bundle; leave out --checkpoint, which names what a bundle was made from")
        return {name: Candidate(partial(open_eager, manifest, context, min(DEFAULT_CHUNK, context)))}
    sessions = {one: partial(open_session, path, one, threads) for one in formats_of(path, manifest, format)}
    if checkpoint is None:
        return {f"{name} .{one}": Candidate(session) for one, session in sessions.items()}
    targets = {one: backend_of(one).target for one in manifest.artifacts}
    weights = weights_behind(manifest, open_source(checkpoint), targets)
    checks = check_integers(path, manifest, weights, targets)
    weights = stored_kv(path, manifest, weights, targets)
    require_passed(checks)
    integers = {check.artifact: check for check in checks}
    candidates = {}
    for one, session in sessions.items():
        artifact = manifest.artifacts[one]
        # Its first reference rounds activations as the kernels of a workstation do.
        own = partial(eager_session, manifest, artifact, weights[one], targets[one], artifact.references[0])
        candidates[f"{name} .{one}"] = Candidate(session, own, integers.get(one))
    return candidates


def _bars(tokens: int) -> Callable[[str, int], None]:
    """A function that shows one progress bar after the other, one for each model."""
    bars: dict[str, Progress] = {}

    def show(name: str, done: int) -> None:
        bar = bars.get(name) or bars.setdefault(name, Progress(tokens))
        bar.show(done, f"tokens, {name}")
        if done == tokens:
            bar.close()

    return show
