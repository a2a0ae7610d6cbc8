"""Peers, each in a process of its own, that take turns: who is asked what, and when."""

import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.peers.prepare import ROOT, SkippedError, last_line
from scripts.peers.results import BASE, Depth, Row

# A token of a long prompt is assumed to take twice as long when the cache holds so many. Only estimates use it.
TWICE_AS_LONG_AT = 8192


@dataclass(frozen=True)
class Plan:
    """What every peer is asked: ``rounds`` of prefill of the first ``prompt`` ids, and at each depth of ``steps`` ids.

    ``patience`` is the longest that the cache is filled for one depth, in seconds.
    """

    ids: Sequence[int]
    prompt: int
    depths: Sequence[int]  # ascending
    steps: int
    rounds: int
    patience: float

    @property
    def decoded(self) -> int:
        """How many positions the rounds at one depth take. Some runtimes feed a token or two of their own in each."""
        return self.rounds * (self.steps + 2)

    def start(self, depth: int, context: int) -> int:
        """The number of tokens in the cache before the steps at ``depth``: fewer where these would not fit."""
        return min(depth, context - self.decoded)


@dataclass(frozen=True)
class Peer:
    """What a worker is told to open. ``files`` are those that the runtime reads weights from."""

    name: str
    kind: str  # a key of scripts.peers.worker.RUNTIMES
    python: str
    path: Path
    context: int
    files: tuple[Path, ...]

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


class Worker:
    """The process of a peer, with what was measured in it so far. Whatever it is asked may raise SkippedError."""

    def __init__(self, peer: Peer, threads: int, plan: Plan, folder: Path) -> None:
        self.peer = peer
        self.running = True
        self._plan = plan
        self._position = 0
        self._peak_bytes = 0
        self._filled = (0, 0.0)  # tokens and seconds
        self._steps: list[float] = []
        self._prefill: list[float] = []
        self._depths: list[Depth] = []
        self._second_per_token = self._second_per_step = 0.0
        self.logits: NDArray[np.float32] | None = None
        self.divergence: float | None = None
        self._folder = folder
        if peer.context < plan.prompt + plan.rounds * plan.steps:
            raise SkippedError(f"caches of {peer.context} have no room for the decode steps; see --rounds and --steps")
        self._errors = folder / f"{peer.name.replace('/', '_')}.txt"
        request = {"kind": peer.kind, "path": str(peer.path), "context": peer.context}
        request |= {"threads": threads, "steps": plan.steps}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [peer.python, "-m", "scripts.peers.worker", json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        self._opened = self._answer()

    def warm_up(self) -> None:
        """Prefill and decode once, keep the logits after the prompt, and learn how long that takes."""
        path = self._folder / "logits.npy"
        path.unlink(missing_ok=True)
        prompt = self._plan.ids[: self._plan.prompt]
        self._second_per_token = self._feed(prompt, reset=True, logits=str(path)) / len(prompt)
        if path.exists():
            self.logits = np.load(path)
        self.decode()
        self._second_per_step = self._steps.pop()

    def prefill(self) -> None:
        """A round of prefill, from an empty cache."""
        self._prefill.append(self._feed(self._plan.ids[: self._plan.prompt], reset=True))

    def fill(self, depth: int) -> None:
        """Fill the cache on to ``depth``, unless that would take longer than the plan's patience."""
        start = self._plan.start(depth, self.peer.context)
        estimate = self._fill_seconds(self._position, start)
        if estimate > self._plan.patience:
            raise SkippedError(f"filling {depth} positions would take about {estimate:.0f} s; see --patience")
        ids = self._plan.ids[self._position : start]
        self._filled = (len(ids), self._feed(ids) if ids else 0.0)

    def decode(self) -> None:
        """A round of decode steps."""
        ids = self._plan.ids[self._position : self._position + self._plan.steps]
        self._steps.append(self._feed(ids, decode=True) / len(ids))

    def keep(self, depth: int) -> None:
        """Count the rounds since the last time as those at ``depth``."""
        self._depths.append(Depth(depth, *self._filled, tuple(self._steps), self._peak_bytes))
        self._steps.clear()

    def estimate(self) -> float:
        """About how many seconds the plan takes, from what the warm-up took."""
        plan, position = self._plan, self._plan.prompt
        seconds = plan.rounds * plan.prompt * self._second_per_token
        for depth in plan.depths:
            start = plan.start(depth, self.peer.context)
            filling = self._fill_seconds(position, start)
            if depth > self.peer.context or filling > plan.patience:
                break
            seconds += filling + plan.rounds * plan.steps * self._second_per_step
            position = start
        return seconds

    def _fill_seconds(self, position: int, start: int) -> float:
        between = (position + start) / 2
        return max(0, start - position) * self._second_per_token * (1 + between / TWICE_AS_LONG_AT)

    def close(self) -> None:
        """End the process, unless that was done before."""
        if self.running:
            self.running = False
            self._process.communicate()

    @property
    def row(self) -> Row | None:
        """What was measured; None if that is nothing."""
        if not self._depths:
            return None
        return Row(
            name=self.peer.name,
            version=self._opened["version"],
            context=self.peer.context,
            file_bytes=self.peer.file_bytes,
            load_seconds=self._opened["load_seconds"],
            libraries_bytes=self._opened["libraries_bytes"],
            prefill_seconds=tuple(self._prefill),
            depths=tuple(self._depths),
            divergence=self.divergence,
        )

    def _feed(self, ids: Sequence[int], *, decode: bool = False, reset: bool = False, logits: str = "") -> float:
        """Feed ``ids`` after what the cache holds, or to an empty one. Returns the seconds that took."""
        request = {"decode" if decode else "prefill": list(ids), "reset": reset, "logits": logits}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._position = len(ids) + (0 if reset else self._position)
        self._peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = last_line(self._errors.read_text(encoding="utf-8", errors="replace"))
            if self._process.returncode < 0:
                reason += f"; ended by {signal.Signals(-self._process.returncode).name}"
            raise SkippedError(reason)
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(
    peers: Sequence[Peer], threads: int, plan: Plan, report: Callable[[float], None]
) -> tuple[list[Row], dict[str, str]]:
    """Measure ``peers``. Returns their rows, and why others, or the larger depths of others, are missing.

    ``report`` gets an estimate of the seconds that are left, once everybody has warmed up. A peer that fails is left
    out from then on; what was measured before counts.
    """
    started: list[Worker] = []
    skipped: dict[str, str] = {}

    def everybody(act: Callable[[Worker], None]) -> None:
        for worker in [one for one in started if one.running]:
            try:
                act(worker)
            except SkippedError as error:
                skipped[worker.peer.name] = str(error)
                worker.close()

    with tempfile.TemporaryDirectory() as folder:
        try:
            for peer in peers:
                for file in peer.files:  # so that opening it reads no disk
                    read_through(file)
                try:
                    started.append(Worker(peer, threads, plan, Path(folder)))
                except SkippedError as error:
                    skipped[peer.name] = str(error)
            everybody(Worker.warm_up)
            compare_logits(started)
            report(sum(worker.estimate() for worker in started if worker.running))
            for _ in range(plan.rounds):
                everybody(Worker.prefill)
            for depth in plan.depths:
                for worker in started:
                    if worker.peer.context < depth:
                        worker.close()
                everybody(partial(Worker.fill, depth=depth))
                for _ in range(plan.rounds):
                    everybody(Worker.decode)
                everybody(partial(Worker.keep, depth=depth))
        finally:
            for worker in started:
                worker.close()
    return [row for worker in started if (row := worker.row) is not None], skipped


def compare_logits(workers: Sequence[Worker]) -> None:
    """Set each worker's divergence from llama.cpp."""
    base = next((worker.logits for worker in workers if worker.peer.name == BASE), None)
    for worker in workers:
        if base is not None and worker.logits is not None:
            worker.divergence = divergence(base, worker.logits)


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """KL(reference ‖ logits) in nats."""

    def log_softmax(x: NDArray[Any]) -> NDArray[np.float64]:
        x = x.astype(np.float64) - x.max()
        return np.asarray(x - np.log(np.exp(x).sum()))

    expected, seen = log_softmax(reference), log_softmax(logits)
    return float((np.exp(expected) * (expected - seen)).sum())


def read_through(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass
