"""The processes of a run: one, or as many as torchrun starts, on one machine or on several that share a file system.

    torchrun --nproc-per-node 8 -m lopd_cli.train opd --artifact … --student … --output …

Every process reads the same rollouts in the same order and takes its share of the micro-batches of each step. Weights,
gradients and optimiser state are sharded between them (FSDP2), each transformer block by itself and then the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lopd_store.models import pick_device

Value = TypeVar("Value")
TORCHRUN = re.compile(r"(\w+_)?(RANK|WORLD_SIZE)|(MASTER|TORCHELASTIC)_\w+")  # the variables that it sets
_PATIENCE = timedelta(hours=12)  # processes wait for the first one while it runs `--eval-command`


@dataclass(frozen=True, kw_only=True)
class World:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them make."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """What each process has, by rank; waits until all are here."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


ALONE = World()


def from_environment() -> World:
    """What torchrun says."""
    return World(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))


def own_device(device: str) -> str:
    """The device of this process, where one kind of them is named for all."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" and from_environment().size > 1 else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world, connected for as long as a run takes."""
    world = from_environment()
    if world.size == 1:
        yield world
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(pick_device(own_device(device)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def shard(model: Any, world: World, dtype: torch.dtype, device: str) -> Callable[..., Any]:
    """Shard a model between the processes; returns what calls a function while the weights are gathered for it.

    The function may use any part of the model, as often as it likes. Gradients come out averaged over the processes,
    added up in float32.
    """
    if world.size == 1:
        return lambda function, *arguments: function(*arguments)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    arithmetic = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=arithmetic, reduce_dtype=torch.float32)
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.call_gathered = MethodType(lambda _, function, *arguments: function(*arguments), model)
    register_fsdp_forward_method(model, "call_gathered")
    return model.call_gathered  # type: ignore[no-any-return]


def blocks(model: Any) -> list[Any]:
    """The transformer blocks of a model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
