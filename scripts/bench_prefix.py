"""Time to the first token of a chat that begins from a snapshot, beside prefilling its prefix.

    python -m scripts.bench_prefix BUNDLE [--tokens 2000] [--repetitions 5] [--threads N]

The prefix is a made-up system text. Each repetition takes the cases in turn, in one process and session; the table has
medians. "cold" drops the file from the page cache before (posix_fadvise), which needs a file system on a disk.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from export.manifest import read_manifest
from runtime_py.backends import formats_of
from runtime_py.prefix import Prefix, open_prefix, save_prefix
from runtime_py.report import table
from runtime_py.text import OpenBundle, open_bundle

SENTENCE = "Answer briefly, name your sources, and never say more than three things about any animal. "
QUESTION = "Which animals live in the sea, and which of them breathe air?"


def prefix_of(opened: OpenBundle, tokens: int) -> Prefix:
    """A system text of about so many tokens."""
    one = len(opened.tokenizer.encode(SENTENCE, bos=False))
    return Prefix(SENTENCE * max(1, tokens // one))


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(bundle: Path, format: str, tokens: int, repetitions: int, threads: int | None, file: Path) -> list[str]:
    """One row of the table."""
    opened = open_bundle(bundle, format, threads)
    session, chat, tokenizer, config = opened.session, opened.chat, opened.tokenizer, read_manifest(bundle).model
    prefix = prefix_of(opened, tokens)
    fed = save_prefix(file, prefix, session, opened.origin, tokenizer, chat)
    ids = chat.encode(tokenizer, prefix.first_turn(QUESTION, (), session.vision))

    def from_file() -> None:
        restored = open_prefix(file, opened.origin, config, tokenizer, chat)
        restored.restore(session)
        session.prefill(ids[restored.held(ids) :])

    def restore() -> None:
        open_prefix(file, opened.origin, config, tokenizer, chat).restore(session)

    def prefill() -> None:
        session.reset()
        session.prefill(fed)

    times: dict[str, list[float]] = {}
    for _ in range(repetitions):
        times.setdefault("prefill", []).append(timed(prefill))
        times.setdefault("rest", []).append(timed(lambda: session.prefill(ids[len(fed) :])))
        times.setdefault("restore", []).append(timed(restore))
        times.setdefault("warm", []).append(timed(from_file))
        drop_from_page_cache(file)
        times.setdefault("cold", []).append(timed(from_file))
    found = {name: median(values) for name, values in times.items()}
    milliseconds = [f"{1000 * found[name]:.0f}" for name in ("prefill", "rest", "restore", "warm", "cold")]
    ratios = [f"{found[name] / found['prefill']:.1%}" for name in ("warm", "cold")]
    return [f".{format}", str(len(fed)), f"{file.stat().st_size / 1e6:.1f}", *milliseconds, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format", help="[all of the bundle's]")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows = []
    for format in formats_of(options.bundle, read_manifest(options.bundle), options.format):
        with tempfile.TemporaryDirectory(dir=options.bundle.parent) as folder:
            file = Path(folder) / "prefix.cache"
            rows.append(measure(options.bundle, format, options.tokens, options.repetitions, options.threads, file))
    times = ("prefill, ms", "question, ms", "restore, ms", "warm, ms", "cold, ms")
    head = ("", "tokens", "file, MB", *times, "warm / prefill", "cold / prefill")
    print(table(head, rows))


if __name__ == "__main__":
    main()
