"""One process or many: joins the processes that torchrun started, and shards the networks over them with FSDP2."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize


@contextmanager
def processes() -> Iterator[tuple[torch.device, bool]]:
    """Join the processes that torchrun started, if any. Yields this process's device, and whether it is the first."""
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


def shard(distillation: nn.Module, device: torch.device) -> None:
    """Shard ``distillation`` with FSDP2 over all processes: each layer by itself, everything else together."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in list(distillation.modules()):
        if isinstance(module, nn.ModuleList) and not isinstance(module, parametrize.ParametrizationList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(distillation, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or if it is sharded, the whole tensor, gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
