"""``gemma-edge demo``: exports both demo checkpoints in int4, proves and measures them, and asks them questions."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from export.checks import require_passed
from export.manifest import TOKENIZER, Manifest, chat_format, read_manifest
from gemma3.checkpoint import DEMOS
from gemma3.tokenizer import Tokenizer
from quant.recipe import DEFAULT
from quant.source import Source
from runtime_py.api import export_bundle, open_checkpoint, open_session, validate
from runtime_py.measure.bench import bench
from runtime_py.measure.comparison import compare, stretches
from runtime_py.measure.questions import Question, Score, answer, exact_match, read_questions, total
from runtime_py.proof.limits import walk_id
from runtime_py.proof.plan import ONE_BY_ONE
from runtime_py.proof.walks import figures_of
from runtime_py.report import megabytes, table
from runtime_py.sessions.eager import open_eager
from runtime_py.sessions.protocol import Session

log = logging.getLogger(__name__)

TOKENS, QUESTIONS, IMAGE_QUESTIONS, WIDE_QUESTIONS = 4000, 60, 40, 20
SHOWN = 3
ORIGINAL = "original"


def run_demo(out: Path | None = None) -> Iterator[str]:
    """Run the demo on both demo checkpoints. Yields the text to print. With ``out`` the bundles are kept there."""
    with tempfile.TemporaryDirectory() as scratch:
        for model, about in zip(DEMOS, (about_text, about_images), strict=True):
            bundle = (out or Path(scratch)) / model
            bundle.parent.mkdir(parents=True, exist_ok=True)
            source = open_checkpoint(model)
            export_bundle(source, bundle, recipe=DEFAULT)
            log.info("replaying the golden vectors, as `gemma-edge validate` does anywhere")
            require_passed(validate(bundle))
            yield from about(bundle, source)


def about_text(bundle: Path, source: Source) -> Iterator[str]:
    """The text-only model's part of the demo: some answers, then a table.

    The table shows the size of each file, its agreement with the quantized eager model, accuracy, speed and memory.
    """
    manifest = read_manifest(bundle)
    tokenizer = Tokenizer(bundle / TOKENIZER)
    asked = some(read_questions(source.path / "questions.jsonl"), QUESTIONS)
    held_out = tokenizer.encode((source.path / "heldout.txt").read_text(encoding="utf-8"), bos=False)[:TOKENS]
    texts = stretches(held_out, manifest.tokenizer.bos_id, manifest.context)
    sessions = open_all(bundle, source, manifest)
    original, *files = sessions
    quality = {}
    for name in files:
        log.info("%s: accuracy over %d held-out tokens", name, len(held_out))
        quality[name] = compare(sessions[name], {original: sessions[original]}, texts)[original]
    right = scores(sessions, tokenizer, asked, manifest)
    yield from answers(sessions, tokenizer, some(asked, SHOWN), manifest)
    log.info("measuring speed and memory")
    speeds = {f".{one.format}": one for one in bench(bundle)}
    artifacts = {f".{format}": artifact for format, artifact in manifest.artifacts.items()}
    figures = {
        f".{format}": figures_of(manifest.validation, format, walk_id(ONE_BY_ONE)) for format in manifest.artifacts
    }
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("file", lambda name: megabytes(artifacts[name].bytes)),
        ("file / ideal bytes", lambda name: f"{artifacts[name].bytes / artifacts[name].ideal_bytes:.3f}"),
        ("max |Δlogit| to quantized eager", lambda name: f"{figures[name]['max_abs']:.2g}"),
        ("KL to quantized eager, mean", lambda name: f"{figures[name]['kl_mean']:.2g}"),
        ("same top token", lambda name: f"{figures[name]['top1_agreement']:.1%}"),
        ("prefill, tok/s", lambda name: str(speeds[name].prefill)),
        ("decode, tok/s", lambda name: str(speeds[name].decode)),
        ("load", lambda name: f"{speeds[name].load_seconds:.2f} s"),
        ("peak RSS", lambda name: megabytes(speeds[name].peak_rss_bytes)),
    ]
    first, *_ = quality.values()
    perplexities = [first.reference_perplexity, *(one.perplexity for one in quality.values())]
    yield ""
    yield table(
        ("", *sessions),
        [
            *((label, "", *map(show, files)) for label, show in rows),
            (f"perplexity, {first.tokens} tokens", *(one.show(".3f") for one in perplexities)),
            ("ΔNLL to the original (paired), nats", "", *(one.delta_nll.show("+.4f") for one in quality.values())),
            ("KL to the original, mean", "", *(one.kl.show(".3g") for one in quality.values())),
            ("right answers", *map(str, right.values())),
        ],
    )


def about_images(bundle: Path, source: Source) -> Iterator[str]:
    """The multimodal model's part of the demo: answers about held-out images, then how many of each file are right."""
    manifest = read_manifest(bundle)
    tokenizer = Tokenizer(bundle / TOKENIZER)
    questions = read_questions(source.path / "questions_images.jsonl")
    wide = [question for question in questions if question.category.startswith("wide")]
    descriptions = [question for question in questions if question.category == "describe"]
    asked = some([question for question in questions if question not in wide], IMAGE_QUESTIONS)
    wide = some(wide, WIDE_QUESTIONS)
    sessions = open_all(bundle, source, manifest)
    yield ""
    yield from answers(sessions, tokenizer, [*some(descriptions, SHOWN), *some(asked, SHOWN)], manifest)
    rows = {
        "right answers about images": scores(sessions, tokenizer, asked, manifest),
        "about wide images": scores(sessions, tokenizer, wide, manifest),
        "the same with Pan & Scan": scores(sessions, tokenizer, wide, manifest, pan_and_scan=True),
    }
    artifacts = manifest.artifacts.values()
    soft = [
        max(one.value for one in manifest.validation if one.id.startswith("soft-tokens/") and one.artifact == format)
        for format in manifest.artifacts
    ]
    yield ""
    yield table(
        ("", *sessions),
        [
            ("file", "", *(megabytes(artifact.bytes) for artifact in artifacts)),
            ("soft tokens to quantized eager, relative RMS", "", *(f"{value:.2g}" for value in soft)),
            *((label, *map(str, right.values())) for label, right in rows.items()),
        ],
    )


def some(questions: Sequence[Question], count: int) -> list[Question]:
    """About ``count`` of the questions, spread evenly."""
    return list(questions[:: max(1, len(questions) // count)])


def open_all(bundle: Path, source: Source, manifest: Manifest) -> dict[str, Session]:
    """Sessions over the original and over each file, by the names that the table shows."""
    original: Session = open_eager(source, manifest.context, manifest.chunk)
    return {ORIGINAL: original, **{f".{format}": open_session(bundle, format) for format in manifest.artifacts}}


def answers(
    sessions: Mapping[str, Session], tokenizer: Tokenizer, asked: Sequence[Question], manifest: Manifest
) -> Iterator[str]:
    """Each question, then the answer of each file, line by line."""
    stop_ids, chat = manifest.tokenizer.eos_ids, chat_format(manifest)
    for question in asked:
        yield " ".join((">", *(path.name for path in question.images), question.prompt))
        for name, session in sessions.items():
            if name != ORIGINAL:
                yield f"{name}: {answer(session, tokenizer, question, stop_ids, chat=chat)}"


def scores(
    sessions: Mapping[str, Session],
    tokenizer: Tokenizer,
    asked: Sequence[Question],
    manifest: Manifest,
    pan_and_scan: bool = False,
) -> dict[str, Score]:
    """How many questions each session answers right, by the sessions' names."""
    stop_ids, chat = manifest.tokenizer.eos_ids, chat_format(manifest)
    right = {}
    for name, session in sessions.items():
        log.info("%s: asking %d questions%s", name, len(asked), " with Pan & Scan" if pan_and_scan else "")
        scored = exact_match(session, tokenizer, asked, stop_ids, pan_and_scan=pan_and_scan, chat=chat)
        right[name] = total(scored)
    return right
