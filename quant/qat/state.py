"""The saved state of a training run: written whole, checked against the run that wants to continue it, and loaded.

torch.distributed.checkpoint writes it as safetensors, from one process or many. Any number of processes can resume it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from gemma3.errors import BadInput
from gemma3.host.atomic import sync
from quant.weights import QuantizedWeights

STATE_FILE = "state.json"
PART = ".part"


def _state(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training changes, by name. The tensors are the live ones, so that loading writes into them."""
    state: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            state |= {f"value.{name}": parameter.detach()}
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    return state


def save(run: Path, step: int, student: nn.Module, optimizer: torch.optim.Optimizer, wanted: dict[str, str]) -> None:
    """Write the directory ``run``/step-N, which appears whole, then remove the earlier states. All processes call it.

    ``wanted`` identifies the run; ``latest`` compares it.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    final = run / f"step-{step:08}"
    part = final.with_name(final.name + PART)
    if first:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    wait()
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    save_state(_state(student, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    wait()
    if first:
        (part / STATE_FILE).write_text(json.dumps({"step": step, "run": wanted}, indent=1) + "\n", encoding="utf-8")
        for path in (*part.iterdir(), part):
            sync(path)
        before = saved_steps(run)
        part.rename(final)
        sync(run)
        for _, path in before:
            shutil.rmtree(path)
    wait()


def load(saved: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state ``saved`` into the student and the optimizer. Returns the number of finished steps."""
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


def saved_steps(run: Path) -> list[tuple[int, Path]]:
    """The completely written states in ``run`` as (finished steps, directory), oldest first."""
    found = [path for path in run.glob("step-*") if path.suffix != PART]
    return sorted((int(path.name.removeprefix("step-")), path) for path in found)


def latest(run: Path, wanted: dict[str, str], resume: bool) -> Path | None:
    """The state to continue from; None without ``resume``.

    Raises BadInput when there is a state but ``resume`` is off, when there is none to resume, and when the state is
    unreadable or of another run than ``wanted`` describes.
    """
    saved = saved_steps(run)
    if not resume:
        if saved:
            raise BadInput(f"{run}: holds a run at step {saved[-1][0]}; give --resume, or remove it")
        return None
    if not saved:
        raise BadInput(f"{run}: holds no saved step; leave --resume out to begin")
    path = saved[-1][1]
    try:
        found = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path / STATE_FILE}: unreadable ({error!r}); remove {run} and begin again") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BadInput(
                f"{run}: was started with {key} {found.get(key)}, now it is {value}; resume with the same, or remove it"
            )
    return path


def digest(tensors: Iterable[Tensor]) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:12]


def tensors_of(weights: QuantizedWeights) -> Iterator[Tensor]:
    """Every tensor of ``weights``: the floats, and the codes and scales of quantized weights."""
    for weight in weights.tensors.values():
        yield from (weight,) if isinstance(weight, Tensor) else weight.tensors()


def wait() -> None:
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()
