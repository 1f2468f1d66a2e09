"""One run on several processes, started by `accelerate launch` or `torchrun`; or on this one alone.

Every process knows the whole batch of a step (it is a function of seed and step) and trains on its own part of it; what
is learned does not depend on how many processes there are, up to rounding. What they exchange:
- the gradient of learngene and dense weights, as DDP or FSDP2 does it, whichever the launcher asks for. FSDP2 shards
  each block;
- the gradient of the tailors of the batch's classes, a matrix [K, P] that does not grow with the number of classes.
Every process keeps all tailors: a sharded row would be sent to those who need it and back in each step, the same bytes
that the sum of its gradient costs, and the forward pass would have to wait for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kind_edge.errors import UsageError
from kind_edge.model.dit import DiT
from kind_edge.training.config import TrainConfig


class Processes(Protocol):
    rank: int
    count: int
    device: torch.device

    def wrap(self, model: DiT, apart: Mapping[str, nn.Parameter]) -> nn.Module:
        """The model as it is called. The gradient of the parameters in `apart` is left to the caller to exchange."""

    def last(self, network: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Where a backward pass runs; gradients are exchanged in a step's last one."""

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in place."""

    def wait(self) -> None:
        """Until all processes are here."""


class Alone:
    rank, count = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: DiT, apart: Mapping[str, nn.Parameter]) -> nn.Module:
        return model

    def last(self, network: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mean_(self, tensor: Tensor) -> Tensor:
        return tensor

    def wait(self) -> None:
        pass


class Together:
    """The processes that accelerate knows of; how they share the work is the launcher's choice (DDP or FSDP2)."""

    def __init__(self, device: torch.device) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError("training on several processes needs accelerate: pip install 'kind-edge[train]'")
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("sharded training needs FSDP2: accelerate launch --use_fsdp --fsdp_version 2")

    def wrap(self, model: DiT, apart: Mapping[str, nn.Parameter]) -> nn.Module:
        if not self.sharded:
            model._ddp_params_and_buffers_to_ignore = list(apart)
            return self.accelerator.prepare_model(model)
        # Not through accelerate, which shards on GPUs alone.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh, ignored = init_device_mesh(self.device.type, (self.count,)), set(apart.values())
        for module in [*model.blocks, model]:
            fully_shard(module, mesh=mesh, ignored_params=ignored)
        return model

    def last(self, network: nn.Module, last: bool) -> AbstractContextManager[Any]:
        if self.sharded:
            network.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(network)

    def mean_(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor.div_(self.count)

    def wait(self) -> None:
        torch.distributed.barrier()


def launched_processes() -> int:
    """How many processes the launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def check_division(config: TrainConfig) -> None:
    """Refuse a batch that processes and accumulation do not divide."""
    parts = launched_processes() * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size {config.batch_size} cannot be divided by {launched_processes()} processes"
            f" x accumulation {config.accumulation}; choose a multiple of {parts}"
        )


def check_sharding(config: TrainConfig) -> None:
    """Refuse a penalty on whole matrices where every process holds a part of them."""
    sharded = launched_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if config.spectral_penalty and sharded:
        raise UsageError("spectral_penalty: not with FSDP, whose processes hold parts of matrices; launch with DDP")


def join(device: torch.device) -> Processes:
    return Together(device) if launched_processes() > 1 else Alone(device)


def check_shared(processes: Processes, begun: bool, output: Path) -> None:
    """Refuse a run that some processes would go on with and others begin: what they learn would not be one model."""
    share = processes.mean_(torch.tensor([float(begun)], device=processes.device)).item()
    if 0 < share < 1:
        raise UsageError(
            f"--resume: not every process finds the run in {output}; give an -o that all machines share, or copy "
            "the folder to each"
        )


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP2 holds; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; every process has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor laid out over processes and devices as another one is."""
    if not hasattr(like, "device_mesh"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
