"""Quantization-aware training by distillation: the student computes with integers, the teacher is the original.

One process trains on a CPU or GPU; under torchrun the same call shards both networks with FSDP2. A run is a function
of its settings, data and weights: the seed and the step alone determine which rows a step reads and what the loss
samples. So a resumed run gives the same bits as an uninterrupted one with the same processes (on CPU; GPU kernels may
add in another order).
"""

import hashlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemma3.errors import BadInput
from gemma3.host.progress import Progress
from gemma3.host.signals import ENDING, is_heeded, note
from quant.qat.fake import convert, prepare
from quant.qat.loss import Distillation, Loss
from quant.qat.processes import local, shard
from quant.qat.state import digest, latest, load, save, saved_steps, tensors_of
from quant.recipe import SCHEMES, Activations, Recipe, Sfp8
from quant.weights import QuantizedWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The settings that determine a run's result, together with data and weights.

    A step takes ``batch`` rows, however many processes share them. ``lr`` is the peak learning rate in units of each
    tensor's root mean square, so that it means the same for weights of any magnitude. ``warmup`` counts steps, and
    ``clip`` is the largest norm of the gradient.
    """

    steps: int
    batch: int = 8
    lr: float = 3e-3
    warmup: int = 10
    clip: float = 1.0
    loss: Loss = "full"
    activations: Activations = "float"
    bf16: bool = False
    seed: int = 0


def train(
    student: nn.Module,
    teacher: nn.Module,
    start: QuantizedWeights,
    tokens: Tensor,
    settings: Settings,
    run: Path,
    *,
    images: Sequence[Tensor] | None = None,
    ignored: Sequence[int] = (),
    resume: bool = False,
    save_every: int = 100,
    micro_batch: int | None = None,
    identity: Mapping[str, str] | None = None,
) -> QuantizedWeights:
    """Train ``student`` in place, from the weights of ``start``, to agree with ``teacher``. Returns its weights.

    ``tokens`` are int [rows, length]. ``images`` are uint8 [n, 3, size, size] for each row; if None, a vision model is
    not trained. The loss leaves out the positions of ``ignored`` tokens (image tokens, padding). ``micro_batch`` rows
    go through the networks at once (None: all rows that a process has in a step).

    The directory ``run`` keeps the latest state: of every ``save_every``-th step, and of an interruption. On Ctrl-C or
    SIGTERM the step is finished and saved, then KeyboardInterrupt is raised. With ``resume`` the run continues from the
    saved state; ``identity`` names what else must then be the same, such as the recipe.

    Raises BadInput when settings, tokens and networks do not fit together, when no weight is quantized, when ``run``
    holds a state but ``resume`` is off, when there is no state to resume or one of another run, and when the loss or
    the gradient is no longer finite. A saved state is kept.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(teacher.parameters()).device
    _check(student, teacher, tokens, settings, world)
    wanted = dict(identity or {}) | {key: str(value) for key, value in asdict(settings).items()}
    learned = ~torch.isin(tokens, torch.tensor(ignored, dtype=tokens.dtype))
    wanted |= {"data": digest([tokens, *(images or ())]), "teacher": digest(teacher.state_dict().values())}
    wanted["initial weights"] = digest(tensors_of(start))
    saved = latest(run, wanted, resume)

    prepare(student, start, settings.activations)
    if images is None and hasattr(student, "vision_tower"):
        student.vision_tower.requires_grad_(False)
    distillation = Distillation(student, teacher).to(device)
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "rms": float(parameter.detach().square().mean().sqrt())}
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    if world > 1:
        names = {parameter: name for name, parameter in student.named_parameters()}
        order = [names[group["params"][0]] for group in groups]
        shard(distillation, device)
        sharded = dict(student.named_parameters())
        for group, name in zip(groups, order, strict=True):
            group["params"] = [sharded[name]]
    if not groups:
        raise BadInput("the recipe quantizes nothing, so there is nothing to train; choose another")
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    done = 0
    if saved is not None:
        done = load(saved, student, optimizer)
        log.info("resumed at step %d of %d", done, settings.steps)

    share = settings.batch // world
    progress = Progress(settings.steps, done) if rank == 0 else None
    seen, began = 0, time.monotonic()
    with _interruptions() as interrupted:
        for step in range(done, settings.steps):
            all_rows = _rows(step, len(tokens), settings)
            count = int(learned[all_rows].sum())
            rows = all_rows[rank * share : (rank + 1) * share]
            report = torch.zeros(3, device=device)
            for part in rows.split(micro_batch or share):  # type: ignore[no-untyped-call]
                last = part[-1] == rows[-1]
                if world > 1:
                    distillation.set_requires_gradient_sync(bool(last))  # type: ignore[operator]
                generator = None
                if settings.loss == "sampled":
                    generator = torch.Generator(device).manual_seed(_seed(settings.seed, step, int(part[0])))
                batch, places = tokens[part].to(device, torch.int64), learned[part].to(device)
                pixels = None if images is None else torch.cat([images[row] for row in part]).to(device) / 255
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                    sums = distillation(batch, generator, places, pixels)
                # FSDP2 averages the processes' gradients, but the step needs the mean over all tokens of the batch.
                (sums[0] * (world / count)).backward()
                report[:2] += sums.detach()
            report[2] = float(interrupted())
            if world > 1:
                dist.all_reduce(report)
            loss, kl = (report[:2] / count).tolist()
            norm = float(local(nn.utils.clip_grad_norm_(student.parameters(), settings.clip)))
            if not math.isfinite(loss + norm):
                raise BadInput(_diverged(step, loss, norm, settings, run))
            factor = schedule(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor * group["rms"]
            optimizer.step()
            optimizer.zero_grad()
            seen += count
            if progress:
                rate = seen / (time.monotonic() - began)
                progress.show(step + 1, f"loss {loss:.4f}, KL {kl:.5f}, {rate:.0f} tokens/s")
            stop = bool(report[2])
            if stop or ((step + 1) % save_every == 0 and step + 1 < settings.steps):
                save(run, step + 1, student, optimizer, wanted)
            if stop and step + 1 < settings.steps:
                if progress:
                    progress.close()
                    log.warning("stopped after step %d; --resume continues from there", step + 1)
                raise KeyboardInterrupt
    if progress:
        progress.close()
    return convert(student, start)


def schedule(step: int, settings: Settings) -> float:
    """The learning rate of a step as a fraction of its peak: half a cosine to zero, times a linear warm-up."""
    warm = (step + 1) / (settings.warmup + 1)
    return min(1.0, warm) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))


def default_lr(recipe: Recipe) -> float:
    """The peak learning rate that trained the demo checkpoint best. SFP8 needs less: it is closer to the original."""
    return 5e-4 if any(isinstance(SCHEMES[rule.scheme], Sfp8) for rule in recipe.rules) else 1e-3


def _rows(step: int, count: int, settings: Settings) -> Tensor:
    """The numbers of the rows of a step. Every pass over the data has a new random order."""
    places = range(step * settings.batch, (step + 1) * settings.batch)
    orders = {
        turn: torch.randperm(count, generator=torch.Generator().manual_seed(_seed(settings.seed, turn)))
        for turn in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little", signed=True)


def _check(student: Any, teacher: Any, tokens: Tensor, settings: Settings, world: int) -> None:
    ours, theirs = (len(model.lm_head.weight) for model in (student, teacher))
    if ours != theirs:
        raise BadInput(f"the teacher has a vocabulary of {theirs}, the student of {ours}; give a teacher with the same")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= ours:
        raise BadInput(
            f"token {low if low < 0 else high} in the data is outside the vocabulary of {ours}; was it encoded with "
            "another tokenizer?"
        )
    for name in ("steps", "batch"):
        if getattr(settings, name) < 1:
            raise BadInput(f"{name} is {getattr(settings, name)}; give at least 1")
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise BadInput(f"lr is {settings.lr}; give a positive number")
    if settings.batch % world:
        raise BadInput(f"a batch of {settings.batch} rows is not a multiple of {world} processes; change one of them")


def _diverged(step: int, loss: float, norm: float, settings: Settings, run: Path) -> str:
    saved = saved_steps(run)
    kept = f"step {saved[-1][0]} is kept in {run}" if saved else "nothing had been saved yet"
    return f"step {step + 1}: loss {loss}, gradient norm {norm}; {kept}; start again with lr below {settings.lr}"


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """The first signal that would end the process makes the yielded function return True; a second one ends it."""
    arrived = False
    former: dict[int, Any] = {}

    def remember(number: int, _: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        note(number)
        signal.signal(number, former[number])

    for number in filter(is_heeded, map(int, ENDING)):
        former[number] = signal.signal(number, remember)
    try:
        yield lambda: arrived
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
