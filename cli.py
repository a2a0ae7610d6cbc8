"""gemma-edge: each command is one call. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 internal error, 2 usage, 3 bad input, 4 does not fit, 5 verification failed.
Imports are inside the commands: --help and running an .onnx must not wait for torch.
"""

import errno
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma3.errors import DoesNotFit

if TYPE_CHECKING:
    from export.bundle import Draft
    from export.manifest import Check, Format, Manifest
    from gemma3.tokenizer import Tokenizer
    from quant.recipe import Recipe
    from runtime_py.accuracy_report import Candidate
    from runtime_py.session import Session

app = typer.Typer(
    help="Gemma 3 on phones: quantize, export to ExecuTorch and ONNX, prove the files against the eager model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = logging.getLogger("cli")
DEBUG = "GEMMA_EDGE_DEBUG"
# What `accuracy` uses where no bundle says: the defaults of `export`.
LARGEST_STRETCH, EAGER_CHUNK = 4096, 128

Scheme = Literal["fp32", "int4-channel", "int4-block32", "sfp8"]
OneFormat = Literal["pte", "onnx"]

Model = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face checkpoint directory, 'demo' or 'demo-vision'.")
]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `gemma-edge export` wrote.")]
SchemeOption = Annotated[
    Scheme | None,
    typer.Option("--scheme", help="How linear layers are stored [int4-block32; a quantized checkpoint's own]."),
]
EmbeddingOption = Annotated[
    Literal["int8", "int4", "sfp8"] | None,
    typer.Option("--embedding", help="How the embedding table is stored [int8; fp32 with that scheme]."),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe (.toml) instead of --scheme and --embedding.")
]
Which = Annotated[
    OneFormat | None, typer.Option("--format", help="Which of the bundle's graphs to run; its first if left out.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; the runtime's choice if left out.")]
MaxNew = Annotated[int | None, typer.Option("-n", "--max-new-tokens", help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the k likeliest; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that hold this much of the mass.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed draws the same tokens.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="PATH", help="A picture for the first <image> in the text, or in front of it."),
]
PanAndScan = Annotated[
    bool, typer.Option("--pan-and-scan", help="Also show up to 4 crops of each picture that is far from square.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def main() -> None:
    """The console script: errors a user can cause end in one line and their exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("cli", "export", "quant", "runtime_py"):
        logging.getLogger(package).setLevel(logging.INFO)
    if not os.environ.get(DEBUG):
        # torch, torchao and executorch warn about their own internals; ours are raised or logged.
        warnings.simplefilter("ignore")
        for noisy in ("torchao", "torch.utils._pytree"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        sys.exit(report_error(error))


def report_error(error: Exception) -> int:
    """Write one line to stderr; the exit code."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        error = DoesNotFit(f"this host ran out of room ({error or 'memory'}); free some and try again")
    code: int | None = getattr(error, "exit_code", None)
    if code is None:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"internal error: {line}; set {DEBUG}=1 to see where", file=sys.stderr)
        return 1
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's directory; must not exist.")],
    format: Annotated[Literal["pte", "onnx", "both"], typer.Option("--format")] = "both",
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Positions the caches hold [the model's, at most 4096].")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", help="Tokens per prefill call [128, at most the context].")
    ] = None,
    exact_sfp8: Annotated[
        bool, typer.Option("--exact-sfp8", help="Keep SFP8's codes in the .onnx: exact but slow, to validate with.")
    ] = False,
) -> None:
    """Export a checkpoint, quantized or to be rounded to nearest; the bundle appears once its files are proven."""
    from runtime_py.validate import validation_table

    wanted = recipe_of(scheme, embedding, recipe)
    manifest = export_proven(model, wanted, out, formats_of(format), context, chunk, exact_sfp8)
    print(validation_table(manifest.validation))
    print(bundle_line(out, manifest), file=sys.stderr)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The quantized checkpoint's directory; must not exist.")],
    method: Annotated[
        Literal["rtn", "gptq", "hqq"],
        typer.Option("--method", help="Round to nearest; GPTQ, which looks at text; HQQ's scales, without data."),
    ] = "rtn",
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE", help="Text, or conversations (.jsonl), for gptq.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How much of the text gptq looks at.")] = 65_536,
) -> None:
    """Quantize a checkpoint without training; `gemma-edge export` takes the result as it is."""
    from export.calibrate import quantize_checkpoint
    from export.source import DEFAULT_SCHEME
    from gemma3.checkpoint import open_checkpoint, resolve_checkpoint
    from gemma3.errors import BadInput
    from quant.atomic import refuse_target
    from quant.recipe import preset
    from quant.stored import is_quantized, save_quantized

    refuse_target(out)
    wanted = recipe_of(scheme, embedding, recipe) or preset(DEFAULT_SCHEME)
    source = resolve_checkpoint(model)
    if is_quantized(source):
        raise BadInput(f"{source}: is quantized already; give the checkpoint it was made of")
    checkpoint = open_checkpoint(source)
    weights = quantize_checkpoint(checkpoint, wanted, method, data or [], tokens)
    save_quantized(out, weights, wanted, method, source=checkpoint.path)
    for name, verdict in weights.verdicts.items():
        print(f"{name}: {verdict}")
    log.info("%s: %s by %s, %.1f MB of weights at best", out, wanted.name, method, weights.ideal_bytes / 1e6)


@app.command()
def qat(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The quantized checkpoint's directory; must not exist.")],
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Text, or conversations (.jsonl) [demo: a sample of its own]."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps")] = 500,
    batch: Annotated[int, typer.Option("--batch", help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option("--length", help="Tokens a row.")] = 256,
    pan_and_scan: PanAndScan = False,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", min=1, help="Rows at once; the rest of a step's is accumulated.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate, in root mean squares of each weight [0.001; 0.0005 with SFP8]."),
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps until the peak.")] = 10,
    loss: Annotated[
        Literal["full", "sampled"],
        typer.Option("--loss", help="The teacher's probabilities over the whole vocabulary, or 256 samples of them."),
    ] = "full",
    activations: Annotated[
        Literal["float", "int8"], typer.Option("--activations", help="int8: as the .pte's linears round their inputs.")
    ] = "float",
    init: Annotated[
        Path | None, typer.Option("--init", metavar="DIR", help="Start from what `quantize` wrote [round to nearest].")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="CHECKPOINT", help="Whom to agree with [the checkpoint itself].")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Multiply in bfloat16.")] = False,
    seed: Seed = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between saved states.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state saved beside --out.")] = False,
) -> None:
    """Train a checkpoint with the integers it will ship; `gemma-edge export` takes the result as it is.

    On several GPUs or machines: torchrun … -m cli qat … with the same options.
    """
    from export.distill import distill_checkpoint
    from export.source import DEFAULT_SCHEME
    from gemma3.checkpoint import resolve_checkpoint
    from quant.qat import Settings, default_lr
    from quant.recipe import preset

    wanted = recipe_of(scheme, embedding, recipe) or preset(DEFAULT_SCHEME)
    lr = default_lr(wanted) if lr is None else lr
    settings = Settings(steps, batch, lr, warmup, loss=loss, activations=activations, bf16=bf16, seed=seed)
    distill_checkpoint(
        resolve_checkpoint(model),
        wanted,
        out,
        settings,
        data=data or [],
        length=length,
        pan_and_scan=pan_and_scan,
        init=init,
        teacher=None if teacher is None else resolve_checkpoint(teacher),
        micro_batch=micro_batch,
        save_every=save_every,
        resume=resume,
    )


@app.command()
def validate(
    bundle: Bundle,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="Compute the eager logits afresh from it; else replay the golden vectors."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle's graphs with their own quantized eager model; exit code 5 when they differ."""
    from export.bundle import require_passed
    from runtime_py.validate import check_bundle, validation_table

    checks = check_bundle(bundle) if checkpoint is None else check_against(bundle, checkpoint)
    if as_json:
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}))
    else:
        print(validation_table(checks))
    require_passed(checks)


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    format: Which = None,
    chat: Annotated[bool, typer.Option("--chat", help="Make the prompt a user's turn and answer it.")] = False,
    image: Images = None,
    pan_and_scan: PanAndScan = False,
    max_new_tokens: MaxNew = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Continue a text, streaming. Pictures go where it says <image>, one for each; in front where it never does."""
    from gemma3.chat import encode_chat, encode_prompt
    from gemma3.errors import BadInput
    from runtime_py.conversation import stream_text
    from runtime_py.generate import Sampler
    from runtime_py.generate import generate as start
    from runtime_py.pictures import placed, read_pictures, views

    if not prompt:
        raise BadInput("the prompt is empty; give at least one character")
    sampler = Sampler(temperature, top_k, top_p, seed)
    session, tokenizer, stop_ids = open_bundle(bundle, format, threads)
    vision = session.vision
    pictures = read_pictures(image or [], vision, pan_and_scan)
    parts, size = placed(prompt, pictures, vision), None if vision is None else vision.tokens_per_image
    if chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": parts}], tokens_per_image=size)
    else:
        ids = encode_prompt(tokenizer, parts, size)
    generation = start(session, ids, sampler, images=views(pictures), stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    for piece in stream_text(generation, tokenizer):
        print(piece, end="", flush=True)
    print()
    if generation.reason == "context":
        print(f"stopped: the context of {session.context} tokens is full", file=sys.stderr)


@app.command()
def chat(
    bundle: Bundle,
    format: Which = None,
    image: Images = None,
    pan_and_scan: PanAndScan = False,
    max_new_tokens: MaxNew = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Talk to a bundle. One line is one turn; /image PATH shows it a picture with the next, as --image does with the
    first; /reset starts over, Ctrl-D ends.
    """
    from gemma3.errors import BadInput
    from runtime_py.conversation import Conversation
    from runtime_py.generate import Sampler
    from runtime_py.pictures import read_pictures

    sampler = Sampler(temperature, top_k, top_p, seed)
    session, tokenizer, stop_ids = open_bundle(bundle, format, threads)
    conversation = Conversation(session, tokenizer, sampler, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    pictures = read_pictures(image or [], session.vision, pan_and_scan)
    for line in lines("> "):
        if line == "/reset":
            conversation.reset()
            pictures = []
            continue
        try:
            if line.startswith("/image "):
                path = Path(line.removeprefix("/image ").strip())
                pictures += read_pictures([path], session.vision, pan_and_scan)
                continue
            shown, pictures = pictures, []
            for piece in conversation.say(line, shown):
                print(piece, end="", flush=True)
            print()
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
        except DoesNotFit as error:
            print(f"error: {error}; type /reset to start over", file=sys.stderr)
        if conversation.reason == "context":
            print(f"the context of {session.context} tokens is full; type /reset to start over", file=sys.stderr)


@app.command()
def bench(
    bundle: Bundle,
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="Tokens to prefill.")] = 128,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens to decode after them.")] = 32,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions")] = 5,
    format: Annotated[OneFormat | None, typer.Option("--format", help="All of the bundle's if left out.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed, load time and peak memory, each graph in a process of its own."""
    from export.manifest import read_manifest
    from runtime_py.bench import bench as measure
    from runtime_py.bench import bench_table

    formats = list(read_manifest(bundle).artifacts) if format is None else [format]
    measurements = measure(
        bundle, formats, prompt=prompt, new_tokens=new_tokens, repetitions=repetitions, threads=threads
    )
    if as_json:
        print(json.dumps({"measurements": [one.to_dict() for one in measurements]}))
    else:
        print(bench_table(measurements))


@app.command()
def accuracy(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundle, or a checkpoint, quantized or not.")],
    reference: Annotated[
        str, typer.Option("--reference", metavar="CHECKPOINT", help="The original, full-precision model.")
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="Plain text, or conversations, with images or not (.jsonl).")
    ],
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", metavar="MODEL", help="Another one, beside; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="What the bundle was exported from: measures the export by itself too."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help="Also count right answers to these (.jsonl).")
    ] = None,
    format: Annotated[OneFormat | None, typer.Option("--format", help="All of a bundle's if left out.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Positions a stretch of text may have [the most all models hold].")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Predict this many at most.")] = None,
    pan_and_scan: PanAndScan = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What quantization cost, on the file that ships: its predictions beside the original's on the same tokens."""
    from functools import partial

    from gemma3.checkpoint import open_checkpoint, resolve_checkpoint
    from gemma3.tokenizer import Tokenizer
    from quant.progress import Progress
    from runtime_py.accuracy_report import measure, read_text
    from runtime_py.eager_session import open_eager
    from runtime_py.questions import exact_match, read_questions

    source = open_checkpoint(resolve_checkpoint(reference))
    tokenizer = Tokenizer(source.path)
    asked = read_questions(questions) if questions else []
    context = common_context([reference, model, *(baseline or [])], context)
    text = read_text(data, tokenizer, context, tokens, source.config.vision, pan_and_scan=pan_and_scan)
    candidates = candidates_of(model, context, tokenizer, format, threads, checkpoint)
    baselines: dict[str, Candidate] = {}
    for one in baseline or []:
        baselines |= candidates_of(one, context, tokenizer, format, threads)
    stop_ids = (*source.config.eos_token_ids, tokenizer.end_of_turn_id)
    bars: dict[str, Progress] = {}
    ask = partial(exact_match, tokenizer=tokenizer, questions=asked, stop_ids=stop_ids, pan_and_scan=pan_and_scan)

    def show(name: str, done: int) -> None:
        bar = bars.get(name) or bars.setdefault(name, Progress(text.tokens))
        bar.show(done, f"tokens, {name}")
        if done == text.tokens:
            bar.close()

    report = measure(
        candidates,
        baselines,
        open_eager(source.path, context, min(EAGER_CHUNK, context)),
        text,
        ask if asked else None,
        show,
    )
    if as_json:
        print(json.dumps({"reference": reference, "data": str(data), **report.to_dict()}))
    else:
        print(report.show())


@app.command()
def inspect(
    mask: Annotated[
        str, typer.Option("--mask", metavar="TEXT", help="Draw who attends to whom in it; <image> is a picture.")
    ],
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face checkpoint directory.")
    ] = "demo-vision",
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture's file (PNG), written over.")] = Path(
        "attention_mask.png"
    ),
    window: Annotated[int | None, typer.Option("--window", min=1, help="Of the local layers [the model's].")] = None,
    tokens_per_image: Annotated[
        int | None, typer.Option("--tokens-per-image", min=1, help="As how many to draw one [the model's].")
    ] = None,
) -> None:
    """Draw the attention masks of a local and a global layer, here and as a PNG."""
    from gemma3.checkpoint import resolve_checkpoint
    from gemma3.config import read_config
    from gemma3.tokenizer import Tokenizer
    from runtime_py.mask_picture import masks_of, save, show

    path = resolve_checkpoint(model)
    masks = masks_of(
        mask, Tokenizer(path), read_config(path / "config.json"), window=window, tokens_per_image=tokens_per_image
    )
    terminal = sys.stdout.isatty()
    print(show(masks, colour=terminal, columns=shutil.get_terminal_size().columns if terminal else None))
    save(masks, out)
    log.info("%s: %d tokens", out, len(masks.labels))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the bundles there.")] = None,
) -> None:
    """The whole path on the demo checkpoints, one of text and one that sees: export in int4, prove, measure, ask."""
    from export.bundle import require_passed
    from export.manifest import FORMATS
    from gemma3.checkpoint import resolve_checkpoint
    from quant.recipe import preset
    from runtime_py.demo import about_images, about_text
    from runtime_py.validate import check_bundle

    with tempfile.TemporaryDirectory() as scratch:
        for model, about in (("demo", about_text), ("demo-vision", about_images)):
            bundle = (out or Path(scratch)) / model
            bundle.parent.mkdir(parents=True, exist_ok=True)
            export_proven(model, preset("int4-block32"), bundle, FORMATS)
            log.info("replaying the golden vectors, as `gemma-edge validate` does anywhere")
            require_passed(check_bundle(bundle))
            for line in about(bundle, resolve_checkpoint(model)):
                print(line)
    if out is not None:
        log.info("the bundles are in %s", out)


# What the commands share.


def formats_of(choice: str) -> "list[Format]":
    from export.manifest import FORMATS

    return [format for format in FORMATS if choice in (format, "both")]


def recipe_of(scheme: str | None, embedding: str | None, file: Path | None) -> "Recipe | None":
    """What the options ask for; None if they ask for nothing. Raises RecipeError, BadInput for a file and more."""
    from export.source import DEFAULT_SCHEME
    from gemma3.errors import BadInput
    from quant.recipe import preset, read_recipe

    if file is not None:
        if scheme or embedding:
            raise BadInput(f"{file}: a recipe says it all; leave out --scheme and --embedding")
        return read_recipe(file)
    return preset(scheme or DEFAULT_SCHEME, embedding) if scheme or embedding else None


def export_proven(
    model: str,
    recipe: "Recipe | None",
    out: Path,
    formats: "Sequence[Format]",
    context: int | None = None,
    chunk: int | None = None,
    exact_sfp8: bool = False,
) -> "Manifest":
    from export.bundle import export_bundle
    from gemma3.checkpoint import resolve_checkpoint

    return export_bundle(
        resolve_checkpoint(model),
        recipe,
        out,
        formats=formats,
        context=context,
        chunk=chunk,
        exact_sfp8=exact_sfp8,
        prove=prove,
    )


def prove(draft: "Draft") -> "list[Check]":
    """Everything that must hold before a bundle may appear. Writes its golden vectors."""
    from export.bundle import check_integers
    from export.manifest import GOLDEN
    from runtime_py.eager_session import fresh_references
    from runtime_py.golden import save_golden
    from runtime_py.own_cache import check_own_cache
    from runtime_py.plan import make_plan
    from runtime_py.validate import check_exact_encoder, check_exact_twin, check_logits

    plan = make_plan(draft.manifest)
    references = fresh_references(draft.manifest, plan, draft.weights)
    golden = {key: reference.at(plan.golden_positions) for key, reference in references.items()}
    save_golden(draft.directory / GOLDEN, golden)
    integers = check_integers(draft.directory, draft.manifest, draft.weights)
    return [
        *integers,
        *check_logits(draft.directory, draft.manifest, references),
        *check_own_cache(draft.directory, draft.manifest, draft.weights, references),
        *check_exact_encoder(draft.directory, draft.manifest, references),
        *check_exact_twin(draft.directory, draft.manifest, references),
    ]


def check_against(bundle: Path, model: str) -> "list[Check]":
    """``validate --checkpoint``: compare everything with the weights that the bundle was made of."""
    from export.bundle import check_integers, weights_behind
    from export.manifest import read_manifest
    from gemma3.checkpoint import resolve_checkpoint
    from runtime_py.eager_session import fresh_references
    from runtime_py.own_cache import check_own_cache
    from runtime_py.plan import make_plan
    from runtime_py.validate import check_bundle

    manifest = read_manifest(bundle)
    weights = weights_behind(manifest, resolve_checkpoint(model))
    references = fresh_references(manifest, make_plan(manifest), weights)
    checks = [*check_integers(bundle, manifest, weights), *check_bundle(bundle, references)]
    if all(check.passed for check in checks):  # a damaged file is not looked into further
        checks += check_own_cache(bundle, manifest, weights, references)
    return checks


def common_context(models: Sequence[str], wanted: int | None) -> int:
    """The most positions that all of ``models`` hold, or ``wanted``. Raises DoesNotFit when that is more."""
    from export.manifest import MANIFEST, read_manifest
    from gemma3.checkpoint import resolve_checkpoint
    from gemma3.config import read_config

    held = {}
    for model in models:
        path = resolve_checkpoint(model)
        if (path / MANIFEST).exists():
            held[model] = read_manifest(path).context
        else:
            held[model] = read_config(path / "config.json").max_position_embeddings
    least = min(held, key=lambda model: held[model])
    if wanted is not None and wanted > held[least]:
        raise DoesNotFit(
            f"context {wanted} is over the {held[least]} positions of {least}; use --context {held[least]}"
        )
    return min(held[least], LARGEST_STRETCH) if wanted is None else wanted


def candidates_of(
    model: str,
    context: int,
    tokenizer: "Tokenizer",
    format: "Format | None",
    threads: int | None,
    checkpoint: str | None = None,
) -> "dict[str, Candidate]":
    """What ``accuracy`` measures of a bundle (each of its graphs) or a checkpoint, by the name it shows.

    ``checkpoint``: what a bundle was exported from. Raises BadInput for another vocabulary than ``tokenizer``'s,
    VerificationFailed when the bundle does not hold that checkpoint's integers.
    """
    from functools import partial

    from export.bundle import check_integers, require_passed, weights_behind
    from export.manifest import MANIFEST, read_manifest
    from gemma3.checkpoint import resolve_checkpoint
    from gemma3.errors import BadInput
    from gemma3.tokenizer import Tokenizer
    from runtime_py.accuracy_report import Candidate
    from runtime_py.eager_session import open_eager, open_own
    from runtime_py.session import open_session

    path = resolve_checkpoint(model)
    name = path.resolve().name
    bundle = (path / MANIFEST).exists()
    if Tokenizer(path).sha256 != tokenizer.sha256:
        raise BadInput(f"{path}: its tokenizer is not that of {tokenizer.path}; give the checkpoint it was made of")
    if not bundle:
        if checkpoint is not None:
            raise BadInput(
                f"{path}: is no bundle; leave out --checkpoint, which is for what a bundle was exported from"
            )
        return {name: Candidate(partial(open_eager, path, context, min(EAGER_CHUNK, context)))}
    manifest = read_manifest(path)
    formats = list(manifest.artifacts) if format is None else [format]
    sessions = {one: partial(open_session, path, one, threads) for one in formats}
    if checkpoint is None:
        return {f"{name} .{one}": Candidate(session) for one, session in sessions.items()}
    weights = weights_behind(manifest, resolve_checkpoint(checkpoint))
    checks = check_integers(path, manifest, weights)
    require_passed(checks)
    integers = {check.artifact: check for check in checks}
    return {
        f"{name} .{one}": Candidate(session, partial(open_own, manifest, one, weights[one]), integers.get(one))
        for one, session in sessions.items()
    }


def open_bundle(
    bundle: Path, format: "Format | None", threads: int | None
) -> "tuple[Session, Tokenizer, tuple[int, ...]]":
    """The session, the tokenizer and the ids that end a generation."""
    from export.manifest import TOKENIZER, read_manifest
    from gemma3.tokenizer import Tokenizer
    from runtime_py.session import open_session

    manifest = read_manifest(bundle)
    first, *_ = manifest.artifacts
    session = open_session(bundle, format or first, threads)
    return session, Tokenizer(bundle / TOKENIZER), manifest.tokenizer.eos_ids


def lines(prompt: str) -> Iterator[str]:
    """The lines of stdin that hold something, prompted for on a terminal."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def bundle_line(out: Path, manifest: "Manifest") -> str:
    from runtime_py.report import megabytes

    parts = [
        f".{format} {megabytes(artifact.bytes)} ({artifact.bytes / artifact.ideal_bytes:.3f} × ideal)"
        for format, artifact in manifest.artifacts.items()
    ]
    return f"{out}: {', '.join(parts)}, every check passed"


if __name__ == "__main__":
    main()
