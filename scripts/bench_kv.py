"""Time and memory of bundles at the far end of their contexts, each in a process of its own.

    python -m scripts.bench_kv BUNDLE BUNDLE … [--format onnx] [--threads 1] [--rounds 3]

The caches are filled with random bytes, so that all their pages are in memory, and the position is set, as if the
context had been fed. Prints for each bundle milliseconds for a token near the beginning and at the end (medians over
the rounds, in which the bundles take turns), and the resident memory of a whole process: its peak, nearly always while
it loads, and after the last step. That of a .onnx has no torch in it. Runs on Linux.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from export.manifest import read_manifest
from gemma3.host.memory import peak_rss
from runtime_py.backends import backend_of, open_graph
from runtime_py.report import table

NEAR, STEPS = 600, 24


def measure(bundle: Path, format: str, threads: int) -> dict[str, float]:
    """Milliseconds a token at NEAR and at the end of the context; resident bytes at the peak, and now."""
    manifest = read_manifest(bundle)
    session: Any = open_graph(bundle, manifest, backend_of(format), threads)
    random = np.random.default_rng(0)
    for buffer in session.live(manifest.context).values():
        buffer[...] = random.integers(-127, 128, buffer.shape, np.int8)
        if buffer.dtype != np.int8:
            buffer /= 32
    ids = random.integers(0, manifest.model.vocab_size, max(STEPS, session.chunk)).tolist()
    found = {}
    for name, start in (("near", NEAR), ("far", manifest.context - len(ids))):
        session.position = start
        times = []
        for token in ids[:STEPS]:
            began = time.perf_counter()
            session.step(token)
            times.append(1000 * (time.perf_counter() - began))
        found[name] = statistics.median(times)
        session.position = start
        began = time.perf_counter()
        session.prefill(ids[: session.chunk])
        found[f"prefill {name}"] = 1000 * (time.perf_counter() - began) / session.chunk
    assert format != "onnx" or "torch" not in sys.modules
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return found | {"peak": peak_rss(), "resident": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--format", choices=("onnx", "pte"), default="onnx")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.bundles[0], arguments.format, arguments.threads)))
        return
    found: dict[Path, list[dict[str, float]]] = {bundle: [] for bundle in arguments.bundles}
    options = ["--format", arguments.format, "--threads", str(arguments.threads)]
    for _ in range(arguments.rounds):
        for bundle in arguments.bundles:
            command = [sys.executable, "-m", "scripts.bench_kv", str(bundle), "--one", *options]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[bundle].append(json.loads(out))
    rows = []
    for bundle, rounds in found.items():
        cache = read_manifest(bundle).artifacts[arguments.format].cache
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        rows.append(
            (
                bundle.name,
                f"{cache.total_bytes / 1e6:.0f} MB",
                *(f"{medians[key]:.2f}" for key in ("prefill near", "prefill far")),
                *(f"{medians[key]:.1f}" for key in ("near", "far")),
                *(f"{medians[key] / 1e6:.0f} MB" for key in ("resident", "peak")),
            )
        )
    places = (f"at {NEAR}", "at the end")
    times = (
        f"{what} {place}, {unit}" for what, unit in (("prefill", "ms a token"), ("decode", "ms")) for place in places
    )
    header = ("bundle", "caches", *times, "resident", "peak")
    print(table(header, rows))


if __name__ == "__main__":
    main()
