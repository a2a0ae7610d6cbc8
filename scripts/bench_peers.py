"""Compare the speed and memory of bundles with other runtimes: llama.cpp, LiteRT-LM, onnxruntime-genai, transformers.

    python -m scripts.bench_peers prepare CHECKPOINT WORK --bundle BUNDLE --peers DIR
    python -m scripts.bench_peers measure WORK --bundle exact=BUNDLE --bundle fast=OTHER --peers DIR --json FILE
    python -m scripts.bench_peers show FILE... --plot docs/images/peers.svg

``prepare`` makes the peers' own files in the folder WORK (scripts/peers/prepare.py says which). llama.cpp gets the
integers of the first bundle that Q4_0 and Q8_0 can hold, so export one with ``--scheme int4-block32``, and with
``--embedding int4`` to have all of it in Q4_0. ``measure`` runs all the runners, and ``show`` prints the tables again.

DIR is a folder with two virtual environments (llama-cpp-python compiles for several minutes, and litert takes 6.7 GB):

    python3.11 -m venv DIR/llama && DIR/llama/bin/pip install -c constraints.txt llama-cpp-python gguf
    python3.11 -m venv DIR/litert && DIR/litert/bin/pip install litert-torch==0.10.0 litert-lm==0.18.1

The rest comes with ``pip install -e '.[test]'``. A runner that is not installed is skipped, by name and with the
reason.

Each runner has a process of its own, because thread pools disturb one another, and the runners take turns. Everyone
gets the same random ids (LiteRT-LM takes text alone, and gets as many digits). For each number of threads: rounds of
prefill from an empty cache; then, for each depth, the cache is filled on to there, once, and rounds of decode steps
follow. So whatever is measured at a depth follows a real prompt of that length. A filling that would take longer than
``--patience`` is left out, with the reason.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.manifest import read_manifest
from gemma3 import typed_json
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, UserError, counted
from gemma3.host.files import parse_json, read_text
from scripts.peers.plot import picture
from scripts.peers.prepare import (
    CHECKPOINT,
    GENAI,
    GGUF,
    LITERT_CONTEXTS,
    LITERT_FILE,
    LITERT_RECIPES,
    Environments,
    SkippedError,
    litert_folder,
    make,
    steps,
)
from scripts.peers.results import BASE, Results, Run, tables
from scripts.peers.turns import Peer, Plan, take_turns

DEPTHS = (512, 2048, 8192, 32768)

READ_1_GIB = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
data = torch.ones(1 << 28)
seconds = []
for _ in range(8):
    start = time.perf_counter()
    data.sum()
    seconds.append(time.perf_counter() - start)
print(data.nbytes / min(seconds))
"""


def find_peers(
    work: Path, bundles: dict[str, Path], environments: Environments, context: int
) -> tuple[list[Peer], dict[str, str]]:
    """The peers whose files are there, and why others are missing. Caches are as long as ``context`` if they can be."""
    peers, skipped = [], {}

    def add(name: str, kind: str, environment: str | None, path: Path, pattern: str, context: int = context) -> None:
        files = tuple(sorted(path.glob(pattern))) if path.is_dir() else (path,) * path.exists()
        if not files:
            skipped[name] = f"{path} is not there; run prepare"
            return
        try:
            python = sys.executable if environment is None else environments.python(environment)
        except SkippedError as error:
            skipped[name] = str(error)
            return
        peers.append(Peer(name, kind, python, path.absolute(), context, files))

    add(BASE, "llama.cpp", "llama", work / GGUF, "")
    for name, bundle in bundles.items():
        manifest = read_manifest(bundle)
        for format, artifact in manifest.artifacts.items():
            files = tuple(bundle / file for file in artifact.files)
            peers.append(
                Peer(f"{name} .{format}", f".{format}", sys.executable, bundle.absolute(), manifest.context, files)
            )
    for recipe in LITERT_RECIPES:
        for length in LITERT_CONTEXTS:
            folder = work / litert_folder(recipe, length)
            if folder.exists() or length == LITERT_CONTEXTS[0]:
                add(f"LiteRT-LM {recipe}, {length}", "LiteRT-LM", "litert", folder / LITERT_FILE, "", length)
    add("onnxruntime-genai", "onnxruntime-genai", None, work / GENAI, "model.onnx*")
    for dtype in ("bf16", "float32"):
        add(f"transformers {dtype}", f"transformers {dtype}", None, work / CHECKPOINT, "*.safetensors")
    return peers, skipped


def bandwidth(threads: int) -> float:
    """How many bytes per second the machine reads: the best of eight passes over a gigabyte."""
    return float(subprocess.check_output([sys.executable, "-c", READ_1_GIB, str(threads)]))


def machine() -> str:
    """The processor, as Linux names it, and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {counted(os.cpu_count() or 1, 'core')}"


def cache_bytes(config: ModelConfig, depth: int) -> int:
    """Bytes of the float32 keys and values that one step reads when the cache holds ``depth`` tokens."""
    return sum(
        2 * 4 * spec.num_key_value_heads * spec.head_dim * min(depth, spec.window or depth) for spec in config.layers
    )


def prepare(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    bundles = list(named(arguments.bundle).values())
    for step in steps(
        arguments.checkpoint, arguments.work, bundles, Environments(arguments.peers), arguments.litert_contexts
    ):
        print(step.name, file=sys.stderr)
        try:
            make(step, arguments.work)
        except SkippedError as error:
            print(f"    skipped: {error}", file=sys.stderr)


def measure(arguments: argparse.Namespace) -> None:
    bundles = named(arguments.bundle)
    manifests = [read_manifest(bundle) for bundle in bundles.values()]
    if not manifests:
        raise BadInput("no bundle to measure; give one with --bundle NAME=DIR")
    if arguments.json is not None and arguments.json.exists():
        raise BadInput(f"{arguments.json} exists; move it away, or give another --json")
    config, context = manifests[0].model, max(manifest.context for manifest in manifests)
    depths = sorted(depth for depth in arguments.depths if arguments.prompt <= depth <= context)
    if not depths:
        raise BadInput(f"no depth is between the prompt of {arguments.prompt} and the context {context}; see --depths")
    peers, skipped = find_peers(arguments.work, bundles, Environments(arguments.peers), context)
    peers = [peer for peer in peers if wanted(peer.name, arguments.only, arguments.without)]
    skipped = {name: why for name, why in skipped.items() if wanted(name, arguments.only, arguments.without)}
    random = np.random.default_rng(0)
    plan = Plan(
        ids=random.integers(0, config.vocab_size, context).tolist(),
        prompt=arguments.prompt,
        depths=depths,
        steps=arguments.steps,
        rounds=arguments.rounds,
        patience=arguments.patience,
    )
    runs: list[Run] = []
    for threads in arguments.threads:
        speed = bandwidth(threads)

        def report(seconds: float, threads: int = threads) -> None:
            print(f"{counted(threads, 'thread')}: about {seconds / 60:.0f} more minutes", file=sys.stderr)

        rows, failed = take_turns(peers, threads, plan, report)
        run = Run(
            model=f"{config.num_layers} layers of {config.hidden_size}",
            machine=machine(),
            threads=threads,
            prompt=arguments.prompt,
            steps=arguments.steps,
            bandwidth=speed,
            weight_bytes=min(artifact.ideal_bytes for artifact in manifests[0].artifacts.values()),
            cache_bytes={str(depth): cache_bytes(config, depth) for depth in depths},
            rows=tuple(rows),
            skipped=skipped | failed,
        )
        runs.append(run)
        print(tables(run), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(typed_json.encode(Results(tuple(runs))), encoding="utf-8")


def wanted(name: str, only: Sequence[str], without: Sequence[str]) -> bool:
    """Whether a name has one of the parts ``only``, if there are any, and none of ``without``."""
    return (not only or any(part in name for part in only)) and not any(part in name for part in without)


def show(arguments: argparse.Namespace) -> None:
    runs = [run for file in arguments.files for run in read_results(file).runs]
    for run in runs:
        print(tables(run))
    if arguments.plot is not None:
        arguments.plot.write_text(picture(runs), encoding="utf-8")


def read_results(file: Path) -> Results:
    """Raises BadInput for a file that ``measure`` did not write."""
    return typed_json.decode(Results, parse_json(read_text(file, "give a file that measure wrote")), str(file))


def named(bundles: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR, or DIR, which is named after the directory. Raises BadInput for a name that comes twice."""
    found: dict[str, Path] = {}
    for bundle in bundles:
        name, _, path = bundle.rpartition("=")
        name = name or Path(path).name
        if name in found:
            raise BadInput(f"two bundles are named {name}; give them names with --bundle NAME=DIR")
        found[name] = Path(path)
    return found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bundle", action="append", default=[], metavar="[NAME=]DIR", help="one of ours; any number")
    common.add_argument("--peers", type=Path, metavar="DIR", help="the folder with the environments llama and litert")

    one = commands.add_parser("prepare", help="make the peers' files, unless they are there", parents=[common])
    one.set_defaults(act=prepare)
    one.add_argument("checkpoint", type=Path)
    one.add_argument("work", type=Path, help="the folder for the files")
    one.add_argument(
        "--litert-contexts", type=int, nargs="*", default=LITERT_CONTEXTS, help="lengths of LiteRT-LM's caches"
    )

    one = commands.add_parser("measure", help="run all the runners, and print the tables", parents=[common])
    one.set_defaults(act=measure)
    one.add_argument("work", type=Path, help="the folder that prepare filled")
    one.add_argument("--only", action="append", default=[], metavar="PART", help="runners with this in their name")
    one.add_argument("--without", action="append", default=[], metavar="PART", help="not those with this in their name")
    one.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="one table for each number")
    one.add_argument("--prompt", type=int, default=512, help="tokens of the prompt whose prefill is measured")
    one.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="tokens in the cache when decoding")
    one.add_argument("--steps", type=int, default=16, help="decode steps of a round")
    one.add_argument("--rounds", type=int, default=5, help="measured rounds; one more is the warm-up")
    one.add_argument("--patience", type=float, default=300, help="seconds that filling the cache on may take")
    one.add_argument("--quick", action="store_true", help="the same as --threads 2 --depths 512 2048 --rounds 3")
    one.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, for show")

    one = commands.add_parser("show", help="print the tables of files that measure wrote")
    one.set_defaults(act=show)
    one.add_argument("files", type=Path, nargs="+")
    one.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw time and memory against the context")

    arguments = parser.parse_args()
    if getattr(arguments, "quick", False):
        arguments.threads, arguments.depths, arguments.rounds = [2], (512, 2048), 3
    try:
        arguments.act(arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
