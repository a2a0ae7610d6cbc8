"""Time and memory of .onnx bundles at the far end of their contexts, each in a process of its own without torch.

    python -m scripts.bench_kv BUNDLE BUNDLE … [--threads 1] [--rounds 3]

The caches are filled with random bytes, so that all their pages are in memory, and the position is set, as if the
context had been fed. Prints for each bundle milliseconds for a token near the beginning and at the end (medians over
the rounds, in which the bundles take turns), and the resident memory of a whole process: its peak, nearly always while
it loads, and after the last step. Runs on Linux.
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
from runtime_py.report import table

NEAR, STEPS = 600, 24


def measure(bundle: Path, threads: int) -> dict[str, float]:
    """Milliseconds a token at NEAR and at the end of the context; resident bytes at the peak, and now."""
    from runtime_py.sessions.onnx import OnnxSession

    manifest = read_manifest(bundle)
    artifact = manifest.artifacts["onnx"]
    session: Any = OnnxSession(bundle / artifact.file, artifact.cache, manifest.model, threads)
    random = np.random.default_rng(0)
    for buffer in session.live(manifest.context).values():
        buffer[...] = random.integers(-127, 128, buffer.shape, np.int8)
        if artifact.cache.dtype != "int8":
            buffer /= 32
    ids = random.integers(0, manifest.model.vocab_size, STEPS).tolist()
    found = {}
    for name, start in (("near", NEAR), ("far", manifest.context - STEPS)):
        session.position = start
        times = []
        for token in ids:
            began = time.perf_counter()
            session.step(token)
            times.append(1000 * (time.perf_counter() - began))
        found[name] = statistics.median(times)
    session.position = NEAR
    began = time.perf_counter()
    session.prefill(random.integers(0, manifest.model.vocab_size, session.chunk).tolist())
    found["prefill"] = 1000 * (time.perf_counter() - began) / session.chunk
    assert "torch" not in sys.modules
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return found | {"peak": peak_rss(), "resident": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.bundles[0], arguments.threads)))
        return
    found: dict[Path, list[dict[str, float]]] = {bundle: [] for bundle in arguments.bundles}
    for _ in range(arguments.rounds):
        for bundle in arguments.bundles:
            command = ["-m", "scripts.bench_kv", str(bundle), "--one", "--threads", str(arguments.threads)]
            out = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
            found[bundle].append(json.loads(out))
    rows = []
    for bundle, rounds in found.items():
        cache = read_manifest(bundle).artifacts["onnx"].cache
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        rows.append(
            (
                bundle.name,
                f"{cache.total_bytes / 1e6:.0f} MB",
                f"{medians['prefill']:.2f}",
                f"{medians['near']:.1f}",
                f"{medians['far']:.1f}",
                f"{medians['resident'] / 1e6:.0f} MB",
                f"{medians['peak'] / 1e6:.0f} MB",
            )
        )
    header = (
        "bundle",
        "caches",
        "prefill, ms a token",
        f"decode at {NEAR}, ms",
        "decode at the end, ms",
        "resident",
        "peak",
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
