"""The command line, gemma-edge. Each command parses its options and calls a function of the other packages.

Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 internal error, 2 usage, 3 bad input, 4 does not fit, 5 verification failed; 128 and a signal's
number when it was stopped, 141 when the reader of its output went away.
The functions are imported inside the commands, because --help and running an .onnx must not wait for torch.
"""

import signal
import threading

# Until everything is imported, Ctrl-C ends the program at once. Python would show where in the imports it was.
QUIET = threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if QUIET:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import errno
import json
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma3.errors import BadInput, DoesNotFit
from gemma3.host.signals import ended_by, ending_signals
from gemma3.host.streams import disconnect, prepare_streams

if QUIET:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from quant.recipe import Recipe
    from runtime_py.generate import Sampler
    from runtime_py.sessions.protocol import Session
    from runtime_py.text import OpenBundle

app = typer.Typer(
    help="Gemma 3 on phones: quantize, export to ExecuTorch and ONNX, prove the files against the eager model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = logging.getLogger("cli")
DEBUG = "GEMMA_EDGE_DEBUG"
BOTH = "both"


def _known_format(value: str | None) -> str | None:
    from runtime_py.backends import BACKENDS

    if value is not None and value not in (*BACKENDS, BOTH):
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(BACKENDS)}")
    return value


def _one_known_format(value: str | None) -> str | None:
    if value == BOTH:
        raise typer.BadParameter("choose one format")
    return _known_format(value)


def _known_device(value: str | None) -> str | None:
    if value is not None and (value == "adb:" or value.split(":")[0] != "adb"):
        raise typer.BadParameter(f"{value!r} is not adb or adb:SERIAL")
    return value


Model = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face checkpoint directory, 'demo' or 'demo-vision'.")
]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `gemma-edge export` wrote.")]
PresetOption = Annotated[
    Literal["fast", "balanced", "exact"] | None,
    typer.Option(
        "--preset",
        help="How weights are stored. MLPs are int4 per row (fast), int4 per 32 columns (balanced) or int8 (exact), "
        "all else is int8 [balanced; a quantized checkpoint's own recipe].",
    ),
]
SchemeOption = Annotated[
    Literal["fp32", "int4-channel", "int4-block32", "sfp8"] | None,
    typer.Option(
        "--scheme", help="How all linear layers are stored, instead of --preset [int4-block32 beside --embedding]."
    ),
]
EmbeddingOption = Annotated[
    Literal["int8", "int4", "sfp8"] | None,
    typer.Option("--embedding", help="How the embedding table is stored [int8; fp32 with that scheme]."),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe (.toml) instead of --preset, --scheme and --embedding."),
]
FORMATS = "pte or onnx"
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        callback=_one_known_format,
        help=f"The bundle's graph to run: {FORMATS} [its first].",
    ),
]
AllFormats = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMAT", callback=_one_known_format, help=f"The bundle's graph: {FORMATS} [all of them]."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Number of threads [the runtime's choice].")]
MaxNew = Annotated[int | None, typer.Option("-n", "--max-new-tokens", help="Stop after this many new tokens.")]
SamplingOption = Annotated[
    Literal["greedy", "checkpoint"],
    typer.Option("--sampling", help="checkpoint: sample as its generation_config.json proposes."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy [that of --sampling, as for the next two].")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from the k most likely tokens; 0 is off.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Sample from the most likely tokens that reach this probability together; 1 is off."),
]
Lookup = Annotated[
    bool,
    typer.Option("--lookup", help="Guess ahead by what repeats in the text, and check several tokens in one call."),
]
Draft = Annotated[
    Path | None,
    typer.Option("--draft", metavar="BUNDLE", help="Guess ahead with this smaller model, of the same tokenizer."),
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="PATH", help="An image, for the next <image> in the text, or else before it."),
]
PanAndScan = Annotated[
    bool, typer.Option("--pan-and-scan", help="Also feed up to 4 crops of each image that is far from square.")
]
SystemFile = Annotated[
    Path | None, typer.Option("--system", metavar="FILE", help="A system text, with which the chat begins.")
]
PrefixFile = Annotated[
    Path | None,
    typer.Option("--prefix", metavar="FILE", help="Begin the chat where `gemma-edge prefill` ended, which wrote FILE."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """The console script. An error that a user can cause ends with one line on stderr and its exit code.

    A signal ends it with 128 and its number, and a reader that closes the pipe (``| head``) as SIGPIPE does: 141.
    """
    with ending_signals():
        code = run_app()
        number = ended_by()
    if QUIET:  # while Python ends, too
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(128 + number if code and number else code)


def prepare() -> None:
    """Set up output, logging and warnings."""
    prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("cli", "gemma3", "export", "quant", "runtime_py"):
        logging.getLogger(package).setLevel(logging.INFO)
    if not os.environ.get(DEBUG):
        # torch, torchao and executorch warn about their own internals. The code of this project raises or logs instead.
        warnings.simplefilter("ignore")
        for noisy in ("torchao", "torch.utils._pytree"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def run_app() -> int:
    """Run the command of ``sys.argv``. Returns the exit code."""
    try:
        prepare()
        try:
            app()
        except SystemExit as end:  # typer always ends so
            if isinstance(end.__context__, BrokenPipeError):
                raise end.__context__ from None
            sys.stdout.flush()
            return int(end.code or 0)
    except BrokenPipeError:
        disconnect(sys.stdout)
        disconnect(sys.stderr)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            disconnect(sys.stdout)  # in case it is what is full
        return report_error(error)
    raise AssertionError("typer returned")


def report_error(error: Exception) -> int:
    """Write ``error`` as one line to stderr. Returns the exit code.

    After a signal it writes nothing: an exception that is not KeyboardInterrupt is what a library made of it.
    """
    if ended_by() is not None:
        return 1
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if out_of_room(error):
        error = DoesNotFit(f"out of memory or disk space ({error or 'memory'}); free some and try again")
    code: int | None = getattr(error, "exit_code", None)
    line = f"error: {error}"
    if code is None:
        line = f"internal error: {type(error).__name__}: {error}; set {DEBUG}=1 to see where"
    try:
        print(" ".join(line.split()), file=sys.stderr)
    except OSError:
        disconnect(sys.stderr)
    return 1 if code is None else code


def out_of_room(error: Exception) -> bool:
    """Whether the machine had no memory or no disk space left. torch and ONNX Runtime say so in words alone."""
    words = (
        "DefaultCPUAllocator: can't allocate memory",
        "Cannot allocate memory (12)",  # torch, of a file that it cannot map
        "Failed to allocate memory",
        "std::bad_alloc",
    )
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM))
        or any(part in str(error) for part in words)
    )


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from runtime_py.backends import BACKENDS

        packages = dict.fromkeys(package for backend in BACKENDS.values() for package in backend.target.packages)
        print(f"gemma-edge {version('gemma-edge')}")
        print("\n".join(f"{package} {version(package)}" for package in packages))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the versions, runtimes included."),
    ] = False,
) -> None:
    """Gemma 3 on phones: quantize, export to ExecuTorch and ONNX, prove the files against the eager model."""


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's directory; must not exist.")],
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", callback=_known_format, help=f"{FORMATS}, or both of them.")
    ] = BOTH,
    preset: PresetOption = None,
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    activations: Annotated[
        Literal["int8", "float"] | None,
        typer.Option("--activations", help="float: do not round the inputs of linear layers (.onnx) [int8]."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Positions that the caches hold [the model's, at most 4096].")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", help="The most tokens in one prefill call [128, at most the context].")
    ] = None,
    kv: Annotated[
        Literal["float32", "int8"],
        typer.Option("--kv", help="The dtype of the KV caches; int8 (.onnx) takes a quarter of the memory."),
    ] = "float32",
    kv_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--kv-data",
            metavar="FILE",
            help="Text, or conversations in JSON, for the scales of an int8 KV cache in an .onnx [a sample of ours].",
        ),
    ] = None,
    exact_sfp8: Annotated[
        bool, typer.Option("--exact-sfp8", help="Keep SFP8's codes in the .onnx: exact but slow, for validation.")
    ] = False,
) -> None:
    """Export a checkpoint, quantized or not. The bundle appears only when its files are proven."""
    from runtime_py.api import export_bundle
    from runtime_py.proof.table import validation_table
    from runtime_py.report import bundle_line

    with whole(out):
        manifest = export_bundle(
            model,
            out,
            recipe=recipe_of(preset, scheme, embedding, recipe),
            activations=activations,
            formats=None if format == BOTH else [format],
            context=context,
            chunk=chunk,
            exact_sfp8=exact_sfp8,
            kv=kv,
            kv_data=kv_data or [],
        )
    print(validation_table(manifest.validation))
    print(bundle_line(out, manifest), file=sys.stderr)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The quantized checkpoint's directory; must not exist.")],
    method: Annotated[
        Literal["mse", "rtn", "gptq"],
        typer.Option(
            "--method",
            help="mse: round to nearest, scales of least squared error. rtn: the same with absmax scales. gptq: GPTQ, "
            "with --data.",
        ),
    ] = "mse",
    preset: PresetOption = None,
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE", help="Text, or conversations in JSON, for gptq.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of --data that gptq reads.")] = 65_536,
) -> None:
    """Quantize a checkpoint without training. `gemma-edge export` takes the result as it is."""
    from gemma3.host.atomic import refuse_target
    from quant.recipe import DEFAULT
    from runtime_py.api import open_checkpoint, save_checkpoint
    from runtime_py.api import quantize as run

    with whole(out):
        refuse_target(out)
        wanted = recipe_of(preset, scheme, embedding, recipe) or DEFAULT
        quantized = run(open_checkpoint(model), wanted, method, data=data or [], tokens=tokens)
        save_checkpoint(quantized, out)
    for name, verdict in quantized.weights.verdicts.items():
        print(f"{name}: {verdict}")
    size = quantized.weights.ideal_bytes / 1e6
    log.info("%s: %s by %s, the bare weights take %.1f MB", out, quantized.recipe.name, method, size)


@app.command()
def qat(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The quantized checkpoint's directory; must not exist.")],
    preset: PresetOption = None,
    scheme: SchemeOption = None,
    embedding: EmbeddingOption = None,
    recipe: RecipeOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Text, or conversations in JSON [a demo checkpoint's own sample]."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Training steps.")] = 500,
    batch: Annotated[int, typer.Option("--batch", help="Rows per step.")] = 4,
    length: Annotated[int, typer.Option("--length", help="Tokens per row.")] = 256,
    pan_and_scan: PanAndScan = False,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", min=1, help="Rows in memory at once; a step accumulates their gradients."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", help="Peak learning rate, relative to each weight's root mean square [0.001; SFP8: 0.0005]."
        ),
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps until the peak of the learning rate.")] = 10,
    loss: Annotated[
        Literal["full", "sampled"],
        typer.Option("--loss", help="Learn the teacher's whole distribution, or 256 tokens sampled from it."),
    ] = "full",
    activations: Annotated[
        Literal["float", "int8"],
        typer.Option("--activations", help="int8: round the inputs of linear layers as the .pte does."),
    ] = "float",
    init: Annotated[
        Path | None,
        typer.Option("--init", metavar="DIR", help="Start from what `quantize` wrote [from --method mse]."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="CHECKPOINT", help="The model to learn from [the checkpoint].")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Multiply in bfloat16.")] = False,
    seed: Seed = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between saved states.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the state saved beside --out.")] = False,
) -> None:
    """Train a checkpoint with the quantized weights it will ship. `gemma-edge export` takes the result as it is.

    On several GPUs or machines: torchrun … -m cli qat … with the same options.
    """
    from gemma3.host.atomic import refuse_target
    from quant.qat.distill import distill, open_sources
    from quant.qat.loop import Settings, default_lr
    from quant.recipe import DEFAULT

    refuse_target(out)
    wanted = recipe_of(preset, scheme, embedding, recipe) or DEFAULT
    lr = default_lr(wanted) if lr is None else lr
    distill(
        open_sources(model, init, teacher),
        wanted,
        out,
        Settings(steps, batch, lr, warmup, loss=loss, activations=activations, bf16=bf16, seed=seed),
        data=data or [],
        length=length,
        pan_and_scan=pan_and_scan,
        micro_batch=micro_batch,
        save_every=save_every,
        resume=resume,
    )


@app.command()
def validate(
    bundle: Bundle,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="What it was exported from: compute references anew [replay the proof]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle's graphs with their own quantized eager model; exit code 5 if a difference is over its limit."""
    from export.checks import require_passed
    from runtime_py.api import validate as run
    from runtime_py.proof.table import validation_table

    checks = run(bundle, checkpoint)
    if as_json:
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}))
    else:
        print(validation_table(checks))
    require_passed(checks)


@app.command()
def prefill(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write; must not exist.")],
    system: SystemFile = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="PATH", help="An image that opens the user's first turn.")
    ] = None,
    pan_and_scan: PanAndScan = False,
    format: Format = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Read the beginning of a chat once, and write the state after it to a file, for chat and generate --prefix.

    The beginning is a system text (instructions, tools, a document) and images that open the user's first turn.
    """
    from gemma3.host.atomic import refuse_target
    from runtime_py import text

    refuse_target(out)
    words = read_system(system)
    if words is None and not image:
        raise BadInput("there is nothing to prefill; give --system or --image")
    with whole(out):
        started = time.perf_counter()
        opened = text.open_bundle(bundle, format, threads)
        tokens = text.prefill(opened, out, system=words, images=image or [], pan_and_scan=pan_and_scan)
    seconds, size = time.perf_counter() - started, out.stat().st_size
    if as_json:
        fields = {"file": str(out), "format": opened.origin.format, "tokens": tokens, "bytes": size}
        print(json.dumps({**fields, "seconds": seconds}))
    log.info("%s: %d tokens of .%s, %.1f MB, %.1f s", out, tokens, opened.origin.format, size / 1e6, seconds)


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    format: Format = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt as a user's turn.")] = False,
    system: SystemFile = None,
    prefix: PrefixFile = None,
    image: Images = None,
    pan_and_scan: PanAndScan = False,
    max_new_tokens: MaxNew = None,
    sampling: SamplingOption = "greedy",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    lookup: Lookup = False,
    draft: Draft = None,
    threads: Threads = None,
) -> None:
    """Continue a text and print it as it is generated.

    Images replace the markers <image> in the text, or come first if it has none.
    """
    from runtime_py import text

    if not prompt:
        raise BadInput("the prompt is empty; give at least one character")
    sampler = sampler_of(bundle, sampling, temperature, top_k, top_p, seed)
    if (system or prefix) and not chat:
        raise BadInput(f"{system or prefix}: the beginning of a chat; pass --chat as well")
    opened = open_chat(bundle, format, threads, system, prefix, lookup=lookup, draft=draft)
    stream = text.generate(
        opened,
        prompt,
        chat=chat,
        images=image or [],
        pan_and_scan=pan_and_scan,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
    )
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    if stream.reason == "context":
        print(f"stopped: the context of {opened.session.context} tokens is full", file=sys.stderr)
    report_guesses(opened.session)


@app.command()
def chat(
    bundle: Bundle,
    format: Format = None,
    system: SystemFile = None,
    prefix: PrefixFile = None,
    image: Images = None,
    pan_and_scan: PanAndScan = False,
    max_new_tokens: MaxNew = None,
    sampling: SamplingOption = "greedy",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    lookup: Lookup = False,
    draft: Draft = None,
    threads: Threads = None,
) -> None:
    """Chat with a bundle. Each line is a turn.

    /image PATH adds an image to the next turn, as --image does to the first. /reset starts over, after --system or
    --prefix. Ctrl-D ends the chat.
    """
    from runtime_py.conversation import Conversation
    from runtime_py.pictures import read_pictures

    sampler = sampler_of(bundle, sampling, temperature, top_k, top_p, seed)
    opened = open_chat(bundle, format, threads, system, prefix, lookup=lookup, draft=draft)
    session = opened.session
    conversation = Conversation(
        session,
        opened.tokenizer,
        sampler,
        chat=opened.chat,
        prefix=opened.prefix,
        stop_ids=opened.eos_ids,
        max_new_tokens=max_new_tokens,
    )
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
    report_guesses(session)


@app.command()
def bench(
    bundle: Bundle,
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="Tokens to prefill.")] = 128,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens to decode after them.")] = 32,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Runs to measure.")] = 5,
    format: AllFormats = None,
    threads: Threads = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="adb[:SERIAL]",
            callback=_known_device,
            help="Measure in the app on a phone, to which `gemma-edge push` has copied the bundle [this machine].",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode speed, load time and peak memory, each graph in a process of its own."""
    from runtime_py.measure.bench import bench as run
    from runtime_py.measure.bench import bench_table

    if device is not None:
        from runtime_py.phone.bench import bench_on_phone

        _, _, serial = device.partition(":")
        with interruptible(lambda: "the app finishes a measurement that it has begun"):
            report = bench_on_phone(
                bundle,
                serial or None,
                format,
                prompt=prompt,
                new_tokens=new_tokens,
                repetitions=repetitions,
                threads=threads,
            )
        print(json.dumps(report.to_dict()) if as_json else report.show())
        return
    measurements = run(bundle, format, prompt=prompt, new_tokens=new_tokens, repetitions=repetitions, threads=threads)
    if as_json:
        print(json.dumps({"measurements": [one.to_dict() for one in measurements]}))
    else:
        print(bench_table(measurements))


@app.command()
def push(
    bundle: Bundle,
    serial: Annotated[
        str | None,
        typer.Option("--serial", metavar="SERIAL", help="The phone's, of `adb devices` [$ANDROID_SERIAL's, the only]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a bundle to the app on a phone through adb, checked file by file. An interrupted copy can be continued."""
    from runtime_py.phone.push import push as run

    with interruptible(lambda: "what has arrived stays on the phone; run the same command to go on"):
        pushed = run(bundle, serial)
    if as_json:
        print(json.dumps(pushed.to_dict()))
    log.info(
        "%s on %s: %d of %d files copied (%.1f of %.1f MB), every sha256 is right",
        pushed.name,
        pushed.serial,
        pushed.copied_files,
        pushed.files,
        pushed.copied_bytes / 1e6,
        pushed.bytes / 1e6,
    )


@app.command()
def accuracy(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundle, or a checkpoint, quantized or not.")],
    reference: Annotated[
        str, typer.Option("--reference", metavar="CHECKPOINT", help="The original, full-precision model.")
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="Plain text, or conversations in JSON, with images or not.")
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="MODEL", help="Another model to compare with; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="What the bundle was exported from: also measure what the export changed."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", metavar="FILE", help="Also count the right answers to these (rows of JSON)."),
    ] = None,
    format: AllFormats = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Positions in a stretch of text [what all models hold, at most 4096]."),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Predict at most this many tokens.")] = None,
    pan_and_scan: PanAndScan = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure what quantization cost: compare the predictions of the file that ships with the original's."""
    from gemma3.checkpoint import resolve_checkpoint
    from runtime_py.measure.candidates import accuracy as run

    report = run(
        resolve_checkpoint(model),
        reference=resolve_checkpoint(reference),
        data=data,
        baselines=[resolve_checkpoint(one) for one in baseline or []],
        checkpoint=None if checkpoint is None else resolve_checkpoint(checkpoint),
        questions=questions,
        format=format,
        context=context,
        tokens=tokens,
        pan_and_scan=pan_and_scan,
        threads=threads,
    )
    if as_json:
        print(json.dumps({"reference": reference, "data": str(data), **report.to_dict()}))
    else:
        print(report.show())


@app.command()
def inspect(
    mask: Annotated[
        str, typer.Option("--mask", metavar="TEXT", help="Draw the attention masks of this text; <image> is an image.")
    ],
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face checkpoint directory.")
    ] = "demo-vision",
    out: Annotated[Path, typer.Option("-o", "--out", help="The drawing (PNG); replaced if it exists.")] = Path(
        "attention_mask.png"
    ),
    window: Annotated[int | None, typer.Option("--window", min=1, help="Local layers' window [the model's].")] = None,
    tokens_per_image: Annotated[
        int | None, typer.Option("--tokens-per-image", min=1, help="Tokens to draw for an image [the model's].")
    ] = None,
) -> None:
    """Draw the attention masks of the local and the global layers, in the terminal and as a PNG."""
    from gemma3.checkpoint import CONFIG, resolve_checkpoint
    from gemma3.config import read_config
    from gemma3.tokenizer import Tokenizer
    from runtime_py.mask_picture import masks_of, save, show

    path = resolve_checkpoint(model)  # not opened: its weights are not needed
    masks = masks_of(
        mask, Tokenizer(path), read_config(path / CONFIG), window=window, tokens_per_image=tokens_per_image
    )
    terminal = sys.stdout.isatty()
    print(show(masks, colour=terminal, columns=shutil.get_terminal_size().columns if terminal else None))
    save(masks, out)
    log.info("%s: %d tokens", out, len(masks.labels))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the bundles in this directory.")] = None,
) -> None:
    """Export both demo checkpoints, text and vision, in int4, prove and measure the files, and ask them questions."""
    from runtime_py.demo import run_demo

    for line in run_demo(out):
        print(line)
    if out is not None:
        log.info("the bundles are in %s", out)


# Functions that several commands use.


def recipe_of(preset: str | None, scheme: str | None, embedding: str | None, file: Path | None) -> "Recipe | None":
    """The recipe that the options ask for; None if they ask for none. Raises BadInput."""
    from quant.recipe import PRESETS, read_recipe, scheme_recipe

    asked = {"--preset": preset, "--recipe": file, "--scheme and --embedding": scheme or embedding}
    given = [option for option, value in asked.items() if value]
    if len(given) > 1:
        raise BadInput(f"{given[0]} says everything about the weights; leave out {' or '.join(given[1:])}")
    if preset is not None:
        return PRESETS[preset]
    if file is not None:
        return read_recipe(file)
    return scheme_recipe(scheme or "int4-block32", embedding) if scheme or embedding else None


def open_chat(
    bundle: Path,
    format: str | None,
    threads: int | None,
    system: Path | None,
    prefix: Path | None,
    *,
    lookup: bool,
    draft: Path | None,
) -> "OpenBundle":
    """The bundle, for chats that begin as the options say, and that guess ahead.

    Raises BadInput, and DoesNotFit for a system text that leaves no room for a turn.
    """
    from runtime_py.prefix import Prefix
    from runtime_py.sessions.protocol import check_ids
    from runtime_py.text import open_bundle

    if system is not None and prefix is not None:
        raise BadInput(f"{prefix}: has a system text of its own; leave out --system")
    words = read_system(system)
    opened = open_bundle(bundle, format, threads, prefix=prefix, lookup=lookup, draft=draft)
    if words is None:
        return opened
    beginning, session = Prefix(words), opened.session
    shortest = opened.chat.encode(opened.tokenizer, beginning.first_turn("?", (), session.vision))
    check_ids(shortest, vocab_size=session.vocab_size, position=0, context=session.context)
    return replace(opened, prefix=beginning)


def read_system(path: Path | None) -> str | None:
    """The text of ``--system``, without whitespace around it. Raises BadInput."""
    from gemma3.host.files import read_text

    text = None if path is None else read_text(path, "give a text file").strip()
    if text == "":
        raise BadInput(f"{path}: is empty; write a system text into it, or leave --system out")
    return text


def sampler_of(
    bundle: Path, sampling: str, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> "Sampler":
    """The sampler that the options ask for. An option of its own wins over ``sampling``. Raises BadInput."""
    from export.manifest import read_manifest
    from gemma3.generation_config import Sampling
    from runtime_py.generate import Sampler

    proposed = read_manifest(bundle).sampling if sampling == "checkpoint" else Sampling()
    return Sampler(
        proposed.temperature if temperature is None else temperature,
        proposed.top_k if top_k is None else top_k,
        proposed.top_p if top_p is None else top_p,
        seed,
    )


def report_guesses(session: "Session") -> None:
    """On stderr, how many guesses were right, if the session guesses ahead."""
    from runtime_py.sessions.speculative import SpeculativeSession

    if isinstance(session, SpeculativeSession):
        print(f"guessed ahead: {session.counts}", file=sys.stderr)


@contextmanager
def whole(out: Path) -> Iterator[None]:
    """For commands that write ``out`` whole or not at all. On a signal it says whether ``out`` was written."""
    existed = os.path.lexists(out)

    def outcome() -> str:
        return f"{out} {'was written before' if os.path.lexists(out) and not existed else 'was not written'}"

    with interruptible(outcome):
        yield


@contextmanager
def interruptible(outcome: Callable[[], str]) -> Iterator[None]:
    """On a signal, say what ``outcome`` then returns."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or ended_by() is not None:
            with suppress(OSError):
                print(f"interrupted: {outcome()}", file=sys.stderr)
        raise


def lines(prompt: str) -> Iterator[str]:
    """The lines of stdin that are not blank, without surrounding whitespace. On a terminal it shows ``prompt``."""
    while sys.stdin is not None:  # None: the caller has closed it
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"standard input is not {error.encoding} text (byte {error.object[error.start]:#04x})"
            ) from None
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    main()
