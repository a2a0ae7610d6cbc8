"""What recipes and methods cost and gain, on exported files, with llama.cpp's own quantization beside them.

    python -m scripts.frontier quality CHECKPOINT WORK --recipes scripts/recipes/*.toml --calibration FILE --text FILE
    python -m scripts.frontier speed CHECKPOINT WORK --recipes scripts/recipes/*.toml
    python -m scripts.frontier show WORK

``quality`` quantizes a trained checkpoint by each recipe and method, exports it, and measures the files as
``gemma-edge accuracy`` does. A quantized checkpoint with the recipe's name in one of the folders ``--made`` is measured
too, by the method that it was made by, such as qat.
``speed`` exports a checkpoint, whose weights may be random, by each recipe, and measures all files in turns. ``show``
prints the tables. What is in the folder WORK already is not measured again, so a long series can be run in pieces.

These bundles are drafts without a proof: never ship one.

``--peers DIR`` adds llama.cpp: its Q4_0 and Q4_K_M, rounded from the same checkpoint, and its float32 file, whose
figures say how far its arithmetic alone is from ours. DIR/llama is a virtual environment (see scripts/bench_peers.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from export.bundle import draft_bundle, seal
from export.manifest import MANIFEST, read_manifest
from gemma3 import typed_json
from gemma3.checkpoint import Checkpoint, resolve_checkpoint
from gemma3.config import VisionConfig
from gemma3.errors import BadInput, UserError
from gemma3.host.files import parse_json, read_text
from gemma3.images import Pixels
from quant.quantize import in_recipe, quantize
from quant.recipe import read_recipe
from quant.source import QuantizedCheckpoint, full_precision, open_source
from runtime_py.backends import BACKENDS, backend_of
from runtime_py.measure.accuracy import Candidate, Text, measure_accuracy
from runtime_py.measure.accuracy import read_text as read_stretches
from runtime_py.measure.candidates import accuracy
from runtime_py.measure.comparison import Comparison
from runtime_py.report import table
from runtime_py.sessions.eager import open_eager
from runtime_py.sessions.protocol import Call, Image, Logits, SoftTokens
from scripts.bench_peers import bandwidth, cache_bytes, machine
from scripts.peers.prepare import ROOT, Environments, SkippedError
from scripts.peers.results import Results, Row, Run
from scripts.peers.same_integers import export_floats
from scripts.peers.turns import Peer, Plan, take_turns

ROOM = 128  # positions after the prompt, for the decode steps of every round
METHODS, QAT = ("rtn", "mse", "gptq"), "qat"
LLAMA, FLOATS, TYPES = "llama.cpp", "F32", ("Q4_0", "Q4_K_M")
NOTHING = "–"
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """What one recipe costs by one method: figures by format. llama.cpp's format is "gguf".

    ``note`` says how llama.cpp stored the weights, by type in percent.
    """

    recipe: str
    method: str
    megabytes: dict[str, float]
    quality: dict[str, Comparison]
    note: str = ""


def draft(
    make: Callable[[], QuantizedCheckpoint], out: Path, formats: Sequence[str], context: int | None = None
) -> Path:
    """A bundle without a proof, of what ``make`` returns. What is there already stays."""
    if not (out / MANIFEST).exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        targets = [backend_of(format).target for format in formats]
        with draft_bundle(make(), out, targets=targets, context=context) as made:
            seal(made, [])
    return out


def quality(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.work / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    path = resolve_checkpoint(arguments.checkpoint)
    checkpoint = full_precision(open_source(path))
    for name, method, make in candidates(checkpoint, arguments):
        file = folder / f"{name}.{method}.json"
        if not file.exists():
            print(f"{name} by {method}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=arguments.work) as place:
                bundle = draft(make, Path(place, name), arguments.formats)
                point = measured(bundle, path, arguments.text, arguments.tokens)
            file.write_text(typed_json.encode(point), encoding="utf-8")
    if arguments.peers is None:
        return
    python = Environments(arguments.peers).python("llama")
    for kind in (FLOATS, *TYPES):
        file = folder / f"{kind}.{LLAMA}.json"
        if not file.exists():
            print(f"{LLAMA} {kind}", file=sys.stderr, flush=True)
            point = llama_point(kind, checkpoint, arguments.work, python, arguments.text, arguments.tokens)
            file.write_text(typed_json.encode(point), encoding="utf-8")


def candidates(
    checkpoint: Checkpoint, arguments: argparse.Namespace
) -> Iterator[tuple[str, str, Callable[[], QuantizedCheckpoint]]]:
    """Recipe, method, and a function that makes the integers, of every point that the arguments ask for."""
    for path in arguments.recipes:
        recipe = read_recipe(path)
        for folder in arguments.made:
            if (folder / recipe.name).is_dir():
                made = open_source(folder / recipe.name)
                assert isinstance(made, QuantizedCheckpoint), f"{made.path} is not quantized"
                yield recipe.name, made.method, partial(in_recipe, made, recipe)
        for method in arguments.methods:
            data = arguments.calibration if method == "gptq" else ()
            yield recipe.name, method, partial(quantize, checkpoint, recipe, method, data=data)


def measured(bundle: Path, reference: Path, text: Path, tokens: int | None) -> Point:
    """Compare the files of ``bundle``, which has a recipe's name, with the original on ``text``."""
    manifest = read_manifest(bundle)
    report = accuracy(bundle, reference=reference, data=text, tokens=tokens)
    return Point(
        recipe=bundle.name,
        method=manifest.method,
        megabytes={format: artifact.bytes / 1e6 for format, artifact in manifest.artifacts.items()},
        quality={format: report.quality[f"{bundle.name} .{format}"] for format in manifest.artifacts},
    )


class Recorded:
    """A session over logits that llama.cpp has computed: the files of ``folder`` in order, one after each reset."""

    vision: VisionConfig | None = None

    def __init__(self, folder: Path, context: int, vocab_size: int) -> None:
        self.context = self.chunk = context
        self.vocab_size = vocab_size
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)
        self._files = iter(sorted(folder.glob("*.npy"), key=lambda file: int(file.stem)))

    def reset(self) -> None:
        self.position = 0
        self._rows: Logits = np.load(next(self._files), mmap_mode="r")

    def call(self, call: Call, wanted: Collection[int] | None = None) -> list[tuple[int, Logits]]:
        start, self.position = self.position, self.position + len(call.ids)
        self.logits = self._rows[self.position - 1]
        places = (place for place in range(start, self.position) if wanted is None or place in wanted)
        return [(place, self._rows[place]) for place in places]

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        self.call(Call(ids))
        return self.logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def encode_image(self, image: Pixels) -> SoftTokens:
        raise NotImplementedError


def llama_point(kind: str, checkpoint: Checkpoint, work: Path, python: str, text: Path, tokens: int | None) -> Point:
    """llama.cpp's own ``kind`` of ``checkpoint``, on the same stretches of ``text`` as our files."""
    gguf, counts = gguf_of(kind, checkpoint, work, python)
    config = checkpoint.config
    context = config.max_position_embeddings
    read: Text = read_stretches(text, checkpoint.tokenizer, context, tokens)
    with tempfile.TemporaryDirectory(dir=work) as name:
        stretches = Path(name, "stretches.json")
        stretches.write_text(json.dumps([list(stretch.ids) for stretch in read.stretches]))
        subprocess.run(
            [python, "-m", "scripts.peers.gguf_logits", str(gguf), str(stretches), name], check=True, cwd=ROOT
        )
        session = Recorded(Path(name), context, config.vocab_size)
        report = measure_accuracy({kind: Candidate(lambda: session)}, {}, open_eager(checkpoint, context, 128), read)
    shares = ", ".join(f"{name} {count / sum(counts.values()):.0%}" for name, count in sorted(counts.items()))
    return Point(kind, LLAMA, {"gguf": gguf.stat().st_size / 1e6}, {"gguf": report.quality[kind]}, shares)


def gguf_of(kind: str, checkpoint: Checkpoint, work: Path, python: str) -> tuple[Path, dict[str, int]]:
    """The file of ``kind``, made from the float32 one unless it is there, and the number of weights of each type."""
    floats, counts = work / f"{FLOATS}.gguf", work / f"{kind}.gguf.json"
    if not floats.exists():
        with tempfile.TemporaryDirectory(dir=work) as name:
            export_floats(checkpoint, Path(name))
            module = "scripts.peers.write_gguf"
            subprocess.run([python, "-m", module, name, str(floats)], check=True, cwd=ROOT)
    if kind == FLOATS:
        return floats, {kind: sum(checkpoint.tensor(name).numel() for name in checkpoint.names)}
    path = work / f"{kind}.gguf"
    if not counts.exists():
        command = [python, "-m", "scripts.peers.quantize_gguf", str(floats), str(path), kind]
        counts.write_bytes(subprocess.check_output(command, cwd=ROOT))
    found: dict[str, int] = json.loads(counts.read_text())
    return path, found


def speed(arguments: argparse.Namespace) -> None:
    file: Path = arguments.work / f"speed-{arguments.threads}.json"
    checkpoint = full_precision(open_source(resolve_checkpoint(arguments.checkpoint)))
    depth, config = arguments.prompt, checkpoint.config
    context = depth + ROOM
    ids = np.random.default_rng(0).integers(0, config.vocab_size, context).tolist()
    plan = Plan(ids, depth, [depth], arguments.steps, arguments.rounds, patience=300)
    if plan.decoded > ROOM:
        raise BadInput(f"--rounds and --steps take {plan.decoded} positions, caches have room for {ROOM}; give fewer")
    peers = []
    for path in arguments.recipes:
        recipe = read_recipe(path)
        out = arguments.work / "bundles" / recipe.name
        bundle = draft(partial(quantize, checkpoint, recipe), out, arguments.formats, context)
        for format, artifact in read_manifest(bundle).artifacts.items():
            files = tuple(bundle / name for name in artifact.files)
            peers.append(
                Peer(f"{recipe.name} .{format}", f".{format}", sys.executable, bundle.absolute(), context, files)
            )
    if arguments.peers is not None:
        python = Environments(arguments.peers).python("llama")
        for kind in TYPES:
            gguf, _ = gguf_of(kind, checkpoint, arguments.work, python)
            peers.append(Peer(f"{LLAMA} {kind}", LLAMA, python, gguf.absolute(), context, (gguf,)))
    if arguments.prepare:
        return
    rows, failed = take_turns(
        peers, arguments.threads, plan, lambda seconds: print(f"{seconds:.0f} s", file=sys.stderr)
    )
    run = Run(
        model=f"{config.num_layers} layers of {config.hidden_size}",
        machine=machine(),
        threads=arguments.threads,
        prompt=depth,
        steps=arguments.steps,
        bandwidth=bandwidth(arguments.threads),
        weight_bytes=min(peer.file_bytes for peer in peers),
        cache_bytes={str(depth): cache_bytes(config, depth)},
        rows=tuple(rows),
        skipped=failed,
    )
    file.write_text(typed_json.encode(Results((run,))), encoding="utf-8")


def show(arguments: argparse.Namespace) -> None:
    points = [read(Point, file) for file in sorted(arguments.work.glob("quality/*.json"))]
    if points:
        print(quality_tables(points))
    for file in sorted(arguments.work.glob("speed-*.json")):
        for run in read(Results, file).runs:
            print(f"\n{run.model}, {run.machine}, threads: {run.threads}\n\n{speed_table(run.rows, run.prompt)}")


def read(kind: type[T], file: Path) -> T:
    return typed_json.decode(kind, parse_json(read_text(file, "measure it again")), str(file))


def quality_tables(points: Sequence[Point]) -> str:
    """For each format a row for each recipe, with columns for each method. The best KL divergence comes first."""
    tables = []
    for format in (*BACKENDS, "gguf"):
        found = {(one.recipe, one.method): one for one in points if format in one.quality}
        found = dict(sorted(found.items(), key=lambda item: item[1].quality[format].kl.value))
        methods = [method for method in (*METHODS, QAT, LLAMA) if any(method == made for _, made in found)]
        rows = []
        for recipe in dict.fromkeys(recipe for recipe, _ in found):
            made = [found.get((recipe, method)) for method in methods]
            one = next(point for point in made if point is not None)
            rows.append(
                (
                    recipe + (f" ({one.note})" if one.note else ""),
                    f"{one.megabytes[format]:.2f}",
                    *(NOTHING if point is None else point.quality[format].kl.show(".5f") for point in made),
                    *(NOTHING if point is None else point.quality[format].delta_nll.show("+.4f") for point in made),
                )
            )
        figures = [f"{figure}, {method}" for figure in ("KL", "ΔNLL") for method in methods]
        if rows:
            tables.append(table((f".{format}", "MB", *figures), rows))
    return "\n\n".join(tables)


def speed_table(rows: Iterable[Row], prompt: int) -> str:
    """A row for each file: its bytes, and the medians of tokens per second."""
    cells = []
    for row in rows:
        decode = statistics.median(row.depths[0].step_seconds)
        prefill = prompt / statistics.median(row.prefill_seconds)
        cells.append((row.name, f"{row.file_bytes / 1e6:.0f}", f"{prefill:.0f}", f"{1 / decode:.1f}"))
    return table(("file", "MB", f"prefill {prompt}, tok/s", f"decode at {prompt}, tok/s"), cells)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("checkpoint", help="a full-precision checkpoint, or 'demo'")
    common.add_argument("work", type=Path, help="the folder for what is measured")
    common.add_argument("--recipes", type=Path, nargs="+", default=[], metavar="FILE", help="recipes (.toml)")
    common.add_argument("--formats", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    common.add_argument("--peers", type=Path, metavar="DIR", help="the folder with the environment llama")

    one = commands.add_parser("quality", help="measure KL divergence and ΔNLL to the original", parents=[common])
    one.set_defaults(act=quality)
    one.add_argument("--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="text for gptq")
    one.add_argument("--text", type=Path, required=True, metavar="FILE", help="held-out text")
    one.add_argument("--tokens", type=int, help="predict so many of it [all]")
    one.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    one.add_argument("--made", type=Path, nargs="+", default=[], metavar="DIR", help="quantized checkpoints, by recipe")

    one = commands.add_parser("speed", help="measure prefill and decode", parents=[common])
    one.set_defaults(act=speed)
    one.add_argument("--prepare", action="store_true", help="make the files only")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--prompt", type=int, default=512)
    one.add_argument("--steps", type=int, default=16, help="decode steps of a round")
    one.add_argument("--rounds", type=int, default=5)

    one = commands.add_parser("show", help="print the tables")
    one.set_defaults(act=show)
    one.add_argument("work", type=Path)

    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch and executorch warn about their own internals
    try:
        arguments.act(arguments)
    except (UserError, SkippedError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
