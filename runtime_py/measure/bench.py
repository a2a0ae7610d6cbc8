"""Measures how fast the graphs of a bundle are and how much memory they take, each in a process of its own."""

import multiprocessing
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.manifest import Manifest, read_manifest
from gemma3.errors import BadInput, DoesNotFit
from gemma3.host.memory import peak_rss
from runtime_py.backends import Backend, backend_of, formats_of, open_graph
from runtime_py.report import megabytes, table

SEED = 0


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repetitions."""

    mean: float
    sd: float
    median: float

    @staticmethod
    def of(rates: Sequence[float]) -> "Rate":
        sd = statistics.stdev(rates) if len(rates) > 1 else 0.0
        return Rate(statistics.mean(rates), sd, statistics.median(rates))

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.sd:.1f} ({self.median:.1f})"


@dataclass(frozen=True)
class Measurement:
    """The speed, load time and memory of one graph of a bundle."""

    format: str
    prompt: int  # tokens fed before decoding
    new_tokens: int
    repetitions: int
    threads: int | None  # None: the runtime's own choice
    prefill: Rate
    decode: Rate  # of the tokens after the prompt
    load_seconds: float  # after the runtime's libraries are imported
    peak_rss_bytes: int  # of the whole process, interpreter and libraries included
    libraries_rss_bytes: int  # the part of it before the file was opened

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    bundle: Path,
    format: str | None = None,
    *,
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    threads: int | None = None,
) -> list[Measurement]:
    """Measure the graph of ``format``, or all graphs of ``bundle``, on random tokens.

    A run prefills ``prompt`` tokens and decodes ``new_tokens``; ``repetitions`` runs follow one that warms up. Raises
    BadInput for a format that the bundle does not hold, and what ``read_manifest``, ``check_counts`` and opening a
    graph raise.
    """
    manifest = read_manifest(bundle)
    check_counts(manifest, prompt, new_tokens, repetitions)
    measurements = []
    for one in formats_of(bundle, manifest, format):
        # A new process, so that the memory of the parent and of other runtimes does not count.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_quietly) as pool:
            task = pool.submit(_measure, bundle, backend_of(one), prompt, new_tokens, repetitions, threads)
            try:
                measurements.append(task.result())
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    return measurements


def check_counts(manifest: Manifest, prompt: int, new_tokens: int, repetitions: int) -> None:
    """Raises BadInput for counts below one, and DoesNotFit when the tokens are over the bundle's context."""
    for name, count in (("-p", prompt), ("-n", new_tokens), ("-r", repetitions)):
        if count < 1:
            raise BadInput(f"{name} is {count}; use 1 or more")
    context = manifest.context
    if prompt + new_tokens > context:
        raise DoesNotFit(f"-p {prompt} and -n {new_tokens} are over the bundle's context of {context}; use fewer")


def _end_quietly() -> None:
    """In the new process, let Ctrl-C end it without a word: it also reaches the parent, which speaks for both."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _measure(
    bundle: Path, backend: Backend, prompt: int, new_tokens: int, repetitions: int, threads: int | None
) -> Measurement:
    """Runs in a process of its own. ``backend`` is an argument, because it may not be registered there."""
    manifest = read_manifest(bundle)
    backend.import_runtime()
    libraries = peak_rss()
    start = time.perf_counter()
    session = open_graph(bundle, manifest, backend, threads)
    load_seconds = time.perf_counter() - start
    ids = np.random.default_rng(SEED).integers(session.vocab_size, size=prompt + new_tokens).tolist()
    if session.vision is not None:  # random text must hold no image token
        ids = [0 if token == session.vision.image_token_id else token for token in ids]
    prefill, decode = [], []
    for repetition in range(repetitions + 1):
        session.reset()
        start = time.perf_counter()
        session.prefill(ids[:prompt])
        middle = time.perf_counter()
        for token in ids[prompt:]:
            session.step(token)
        end = time.perf_counter()
        if repetition > 0:  # the first one warms up
            prefill.append(prompt / (middle - start))
            decode.append(new_tokens / (end - middle))
    return Measurement(
        format=backend.target.name,
        prompt=prompt,
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=threads,
        prefill=Rate.of(prefill),
        decode=Rate.of(decode),
        load_seconds=load_seconds,
        peak_rss_bytes=peak_rss(),
        libraries_rss_bytes=libraries,
    )


def bench_table(measurements: Sequence[Measurement], beside: Mapping[str, Sequence[str]] | None = None) -> str:
    """A table with one row for each measurement. All must have the same numbers of tokens and repetitions.

    ``beside`` has further columns by their headings, each with a cell for every measurement.
    """
    columns = beside or {}
    first = measurements[0]
    header = (
        "format",
        f"prefill {first.prompt}, tok/s",
        f"decode {first.new_tokens}, tok/s",
        "load",
        "peak RSS",
        "of which libraries",
        *columns,
    )
    rows = [
        (
            f".{one.format}",
            str(one.prefill),
            str(one.decode),
            f"{one.load_seconds:.2f} s",
            megabytes(one.peak_rss_bytes),
            megabytes(one.libraries_rss_bytes),
            *(cells[row] for cells in columns.values()),
        )
        for row, one in enumerate(measurements)
    ]
    return table(header, rows) + f"\n\nmean ± sd (median) of {first.repetitions} repetitions"
