"""Quantization-aware training by distillation: the student computes with integers, the teacher is the original.

The student learns the teacher's probabilities over the whole vocabulary, at every position. Logits exist for a few
tokens at a time (``HeadLoss``), so that 262 144 of them fit. One process trains on a CPU or GPU; under torchrun the
same call shards both networks with FSDP2. The state is saved through torch.distributed.checkpoint as safetensors, by
one process or many, and can be resumed by any number of them.

A run is a function of its settings, data and weights: which rows a step sees and which logits it samples follow
from the seed and the step alone. So a resumed run repeats an uninterrupted one to the bit on the same processes
(on CPU; GPU kernels may add in another order).
"""

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from quant.activations import Activations
from quant.atomic import sync
from quant.fake import convert, head_input, prepare
from quant.integers import IntegerWeight
from quant.progress import Progress
from quant.recipe import SCHEMES, QuantizedWeights, Recipe, Sfp8
from quant.sfp8 import Sfp8Weight

log = logging.getLogger(__name__)

Loss = Literal["full", "sampled"]
SAMPLES = 256
# Logits that exist at once: 64 MiB of float32, a few times over.
LOGITS_AT_ONCE = 1 << 24

STATE_FILE = "state.json"
PART = ".part"


class TrainingError(ValueError):
    """A run that cannot start, go on or be resumed. One line; exit code 3 on the command line."""

    exit_code = 3


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on, beside data and weights.

    ``batch`` rows make a step, however many processes share them. ``lr`` is the peak learning rate in units of each
    tensor's root mean square, so that it means the same for weights of any size and for their scales.
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


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of student to teacher over the vocabulary, and KL divergence, summed over tokens.

    apply(hidden [T, E], table [V, E], teacher_hidden [T, E'], teacher_table [V, E'], generator) → float32 [2].
    Only the first, the cross-entropy, has a gradient; it is computed in the forward pass, where the logits are, for
    ``LOGITS_AT_ONCE`` of them at a time: [T, V] never exists.

    Without a generator the target is the teacher's distribution p. With one, it is estimated by SAMPLES draws from
    p with replacement, each worth 1/SAMPLES: an unbiased target, so the gradient is right on average. The variant
    that fails is to keep the teacher's 256 largest probabilities, put 0 for the rest and renormalise: that teaches
    a sharper distribution than the teacher's and ends up worse than no training (tests/quant/test_qat.py shows it).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        teacher_hidden: Tensor,
        teacher_table: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, table = hidden.to(dtype), table.to(dtype)
            teacher_hidden, teacher_table = teacher_hidden.to(dtype), teacher_table.to(dtype)
        sums = torch.zeros(2, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        table_grad = torch.zeros_like(table, dtype=torch.float32)
        at_once = max(1, LOGITS_AT_ONCE // len(table))
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            teacher = F.linear(teacher_hidden[part], teacher_table).float().log_softmax(-1)
            student = F.linear(hidden[part], table).float().log_softmax(-1)
            p = teacher.exp()
            sums[1] += torch.sum(p * teacher.sub_(student))
            target = p if generator is None else sample(p, generator)
            sums[0] -= torch.sum(target * student)
            logits_grad = student.exp_().sub_(target).to(hidden.dtype)
            torch.mm(logits_grad, table, out=hidden_grad[part])
            if table_grad.dtype == hidden.dtype:
                table_grad.addmm_(logits_grad.t(), hidden[part])
            else:
                table_grad += logits_grad.t() @ hidden[part]
        ctx.save_for_backward(hidden_grad, table_grad)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, table_grad = ctx.saved_tensors
        factor = grads[0][0]
        return hidden_grad * factor, table_grad * factor, None, None, None


head_loss: Callable[..., Tensor] = HeadLoss.apply


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """p [T, V] estimated by SAMPLES draws a row: counts / SAMPLES."""
    drawn = torch.multinomial(p, SAMPLES, replacement=True, generator=generator)
    return torch.zeros_like(p).scatter_add_(1, drawn, torch.full_like(p[:, :1], 1 / SAMPLES).expand(-1, SAMPLES))


class Distillation(nn.Module):
    """tokens [B, S] → HeadLoss of the student at the positions ``learned`` (bool [B, S]; all if None).

    Both networks have ``hidden(tokens)`` [B, S, E] and ``lm_head``, and for data with images ``encode_images(pixels)``,
    whose result ``hidden`` takes as ``soft_tokens``; ``pixels`` float32 [N, 3, size, size], N may be 0.
    """

    student: Any
    teacher: Any

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        learned: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        with torch.no_grad():
            teacher_hidden = _hidden(self.teacher, tokens, learned, pixels)
        with parametrize.cached():
            hidden = head_input(self.student.lm_head, _hidden(self.student, tokens, learned, pixels))
            table = self.student.lm_head.weight
        teacher_table = self.teacher.lm_head.weight
        return head_loss(hidden, table, teacher_hidden, teacher_table, generator)


def _hidden(network: Any, tokens: Tensor, learned: Tensor | None, pixels: Tensor | None) -> Tensor:
    """What the head reads at the positions ``learned``, [T, E]."""
    if pixels is None:
        x = network.hidden(tokens)
    else:
        # Encoding nothing, one process would leave the others, which wait for its share of the encoder, waiting.
        given = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
        x = network.hidden(tokens, soft_tokens=network.encode_images(given)[: len(pixels)])
    return x.flatten(0, 1) if learned is None else x[learned]


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
    """Train ``student`` in place from the weights of ``start`` to agree with ``teacher``; the trained codes.

    ``tokens``: int [rows, length]; ``images``: uint8 [n, 3, size, size] for each row, or None, and then an image
    encoder does not train. Nothing is learned at the positions of ``ignored`` tokens (images', padding).

    The directory ``run`` keeps the state of every ``save_every``-th step and of an interruption (Ctrl-C, SIGTERM: the
    step is finished and KeyboardInterrupt raised). With ``resume`` the run continues from there; ``identity`` names
    what else must be the same then (the recipe, say), for the message. ``micro_batch`` rows go through the networks
    at once.

    Raises TrainingError when the settings do not fit, ``run`` holds another run or none to resume, or the loss stops
    being a number; what was saved before stays.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(teacher.parameters()).device
    _check(student, teacher, tokens, settings, world)
    wanted = dict(identity or {}) | {key: str(value) for key, value in asdict(settings).items()}
    learned = ~torch.isin(tokens, torch.tensor(ignored, dtype=tokens.dtype))
    wanted |= {"data": digest([tokens, *(images or ())]), "teacher": digest(teacher.state_dict().values())}
    wanted["initial weights"] = digest(_parts(start))
    saved = _latest(run, wanted, resume)

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
        _shard(distillation, device)
        sharded = dict(student.named_parameters())
        for group, name in zip(groups, order, strict=True):
            group["params"] = [sharded[name]]
    if not groups:
        raise TrainingError("the recipe quantizes nothing, so there is nothing to train; choose another")
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    done = 0
    if saved is not None:
        done = _load(saved, student, optimizer)
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
                # FSDP2 averages the processes' gradients; their share of the mean over the batch is wanted.
                (sums[0] * (world / count)).backward()
                report[:2] += sums.detach()
            report[2] = float(interrupted())
            if world > 1:
                dist.all_reduce(report)
            loss, kl = (report[:2] / count).tolist()
            norm = float(_local(nn.utils.clip_grad_norm_(student.parameters(), settings.clip)))
            if not math.isfinite(loss + norm):
                raise TrainingError(_diverged(step, loss, norm, settings, run))
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
                _save(run, step + 1, student, optimizer, wanted)
            if stop and step + 1 < settings.steps:
                if progress:
                    progress.close()
                    log.warning("stopped after step %d; --resume continues from there", step + 1)
                raise KeyboardInterrupt
    if progress:
        progress.close()
    return convert(student, start)


def schedule(step: int, settings: Settings) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then half a cosine to zero."""
    warm = (step + 1) / (settings.warmup + 1)
    return min(1.0, warm) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))


def default_lr(recipe: Recipe) -> float:
    """What trained the demo checkpoint best: less where SFP8 already is near."""
    return 5e-4 if any(isinstance(SCHEMES[rule.scheme], Sfp8) for rule in recipe.rules) else 1e-3


def _rows(step: int, count: int, settings: Settings) -> Tensor:
    """The rows of a step: the data in an order drawn anew for every pass over it."""
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
        raise TrainingError(f"the teacher has a vocabulary of {theirs}, the student of {ours}; use one that shares it")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= ours:
        raise TrainingError(
            f"the data has token {low if low < 0 else high}, the vocabulary {ours}: another tokenizer's?"
        )
    for name in ("steps", "batch"):
        if getattr(settings, name) < 1:
            raise TrainingError(f"{name} is {getattr(settings, name)}; give at least 1")
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise TrainingError(f"lr is {settings.lr}; give a positive number")
    if settings.batch % world:
        raise TrainingError(f"a batch of {settings.batch} rows does not divide among {world} processes; change either")


def _diverged(step: int, loss: float, norm: float, settings: Settings, run: Path) -> str:
    saved = _steps(run)
    kept = f"step {saved[-1][0]} is kept in {run}" if saved else "nothing had been saved yet"
    return f"step {step + 1}: loss {loss}, gradient norm {norm}; {kept}; start again with lr below {settings.lr}"


# Several processes.


@contextmanager
def processes() -> Iterator[tuple[torch.device, bool]]:
    """Join what torchrun started, if it did: (this process's device, is it the first one?)."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield device, True
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _shard(distillation: Distillation, device: torch.device) -> None:
    """FSDP2 over all processes: each repeated block on its own, everything else together."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in list(distillation.modules()):
        if isinstance(module, nn.ModuleList) and not isinstance(module, parametrize.ParametrizationList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(distillation, mesh=mesh)


def _local(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Saving and resuming.


def _state(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training changes, by name, to be saved from or loaded into."""
    state: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            state |= {f"value.{name}": parameter.detach()}
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    return state


def _save(run: Path, step: int, student: nn.Module, optimizer: torch.optim.Optimizer, wanted: dict[str, str]) -> None:
    """``run``/step-N appears whole; the ones before it go."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    final = run / f"step-{step:08}"
    part = final.with_name(final.name + PART)
    if first:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    _wait()
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    save_state(_state(student, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    _wait()
    if first:
        (part / STATE_FILE).write_text(json.dumps({"step": step, "run": wanted}, indent=1) + "\n", encoding="utf-8")
        for path in (*part.iterdir(), part):
            sync(path)
        before = _steps(run)
        part.rename(final)
        sync(run)
        for _, path in before:
            shutil.rmtree(path)
    _wait()


def _load(saved: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    step: int = json.loads((saved / STATE_FILE).read_text(encoding="utf-8"))["step"]
    for parameter in student.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    reader = HuggingFaceStorageReader(str(saved))
    load_state(_state(student, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())
    return step


def _steps(run: Path) -> list[tuple[int, Path]]:
    """The states in ``run``, oldest first. Unfinished ones are not among them."""
    found = [path for path in run.glob("step-*") if path.suffix != PART]
    return sorted((int(path.name.removeprefix("step-")), path) for path in found)


def _latest(run: Path, wanted: dict[str, str], resume: bool) -> Path | None:
    """The state to continue from, if the run that left it is the one that is ``wanted``."""
    saved = _steps(run)
    if not resume:
        if saved:
            raise TrainingError(f"{run}: holds a run at step {saved[-1][0]}; give --resume, or remove it")
        return None
    if not saved:
        raise TrainingError(f"{run}: holds no saved step; leave --resume out to begin")
    path = saved[-1][1]
    try:
        found = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path / STATE_FILE}: unreadable ({error!r}); remove {run} and begin again") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TrainingError(
                f"{run}: was begun with {key} {found.get(key)}, this is {value}; resume with the same, or remove it"
            )
    return path


def digest(tensors: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def _parts(weights: QuantizedWeights) -> Iterator[Tensor]:
    for weight in weights.tensors.values():
        if isinstance(weight, IntegerWeight):
            yield from (weight.codes, weight.scales)
        elif isinstance(weight, Sfp8Weight):
            yield from (weight.codes, weight.scale)
        else:
            yield weight


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM, once, make the function given true instead of ending the process; twice, they end it."""
    arrived = False
    former: dict[int, Any] = {}

    def remember(number: int, _: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        signal.signal(number, former[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        former[number] = signal.signal(number, remember)
    try:
        yield lambda: arrived
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
