"""The backends, one record each: a target of an export, and how its files are run and proven.

``register`` adds a backend; after that, every command accepts its format. docs/extending.md shows how. Runtimes are
imported when they are used.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.checks import Check
from export.executorch.target import PTE
from export.manifest import Manifest, read_manifest
from export.onnx.target import ONNX
from export.target import Target
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, DoesNotFit, counted
from runtime_py.proof.subject import ExtraCheck, Subject
from runtime_py.sessions.protocol import Session

# Any machine may have so many threads, and a core so many of them.
FEW_THREADS, THREADS_PER_CORE = 64, 8

# (path, cache layout, model, number of threads) → a session over the graph. Threads None: the runtime's choice.
OpenGraph = Callable[[Path, CacheLayout, ModelConfig, int | None], Session]


@dataclass(frozen=True)
class Backend:
    """Everything that the program knows about one format."""

    target: Target
    import_runtime: Callable[[], OpenGraph]  # imports the runtime; returns the function that opens a graph
    extra_checks: tuple[ExtraCheck, ...] = ()
    # What a call that gives the logits of 1 + d tokens takes beyond a step, as a share of it: (a, b) for a + b · d. It
    # decides how long guesses are (docs/speculation.md).
    extra_cost: tuple[float, float] = (0.0, 0.5)


BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add ``backend`` to those that every command knows. Raises BadInput when its name is taken."""
    if backend.target.name in BACKENDS:
        raise BadInput(f"a backend for .{backend.target.name} is registered already")
    BACKENDS[backend.target.name] = backend


def backend_of(format: str) -> Backend:
    """The backend of ``format``. Raises BadInput when there is none."""
    if format not in BACKENDS:
        raise BadInput(f"there is no backend for .{format}; use one of {', '.join(BACKENDS)}")
    return BACKENDS[format]


def open_session(bundle: Path, format: str | None = None, threads: int | None = None) -> Session:
    """A session over one graph of ``bundle``: that of ``format``, or the bundle's first.

    ``threads`` None leaves their number to the runtime. Raises BadInput when the bundle has no such graph or the
    runtime cannot load it, and what ``read_manifest`` raises.
    """
    manifest = read_manifest(bundle)
    format, *_ = formats_of(bundle, manifest, format)
    return open_graph(bundle, manifest, backend_of(format), threads)


def open_graph(bundle: Path, manifest: Manifest, backend: Backend, threads: int | None) -> Session:
    """A session over the graph of ``backend`` in a bundle that has one.

    Raises DoesNotFit for far more ``threads`` than this machine has cores, which would take all its memory, and
    BadInput as the session does.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > max(FEW_THREADS, THREADS_PER_CORE * cores):
        raise DoesNotFit(
            f"{threads} threads are too many for {counted(cores, 'core')}; use --threads {cores} or leave it out"
        )
    artifact = manifest.artifacts[backend.target.name]
    return backend.import_runtime()(bundle / artifact.file, artifact.cache, manifest.model, threads)


def formats_of(bundle: Path, manifest: Manifest, format: str | None) -> list[str]:
    """``format`` alone, or all formats of ``bundle`` if None. Raises BadInput when the bundle does not hold it."""
    held = list(manifest.artifacts)
    if format is not None and format not in held:
        raise BadInput(f"{bundle}: holds no .{format}, only {', '.join(held)}; pass --format {held[0]}")
    return held if format is None else [format]


def _pte_runtime() -> OpenGraph:
    from runtime_py.sessions.pte import PteSession

    return PteSession


def _single_steps(subject: Subject) -> list[Check]:
    from runtime_py.proof.single_steps import check_single_steps

    return check_single_steps(subject)


def _onnx_runtime() -> OpenGraph:
    from runtime_py.sessions.onnx import OnnxSession

    return OnnxSession


def _exact_vision(subject: Subject) -> list[Check]:
    from runtime_py.proof.exact_onnx import check_exact_vision

    return check_exact_vision(subject)


def _exact_text(subject: Subject) -> list[Check]:
    from runtime_py.proof.exact_onnx import check_exact_text

    return check_exact_text(subject)


def _rows(subject: Subject) -> list[Check]:
    from runtime_py.proof.rows import check_rows

    session = open_graph(subject.directory, subject.manifest, backend_of(subject.format), None)
    return check_rows(session, subject.plan, subject.references, subject.format)


register(
    Backend(
        PTE,
        import_runtime=_pte_runtime,
        extra_checks=(ExtraCheck(_rows), ExtraCheck(_single_steps)),
        extra_cost=(0.35, 0.12),
    )
)
register(
    Backend(
        ONNX,
        import_runtime=_onnx_runtime,
        extra_checks=(
            ExtraCheck(_rows),
            ExtraCheck(_exact_vision, draft_only=True),
            ExtraCheck(_exact_text, draft_only=True),
        ),
        extra_cost=(0.05, 0.22),
    )
)
