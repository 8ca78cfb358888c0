"""Who computes the gradients of an optimiser step: one process, threads side by side, or several processes.

All give the gradient of the same sum over all micro-batches, so one loop serves them.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from localdepth.memory import available_bytes
from localdepth_train.reference import Block

__all__ = ["WHOLE", "Alone", "Loss", "Team", "Together", "free_bytes", "is_first", "open_team"]

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # however many processes share the model

T = TypeVar("T")
Loss = Callable[[nn.Module, T], tuple[Tensor, list[bool]]]  # of one job, with what it found right
_Part = tuple[float, list[bool], tuple[Tensor | None, ...]]  # the same, with its gradients


class Team(Protocol):
    """The processes of a run.

    Attributes:
        rank, size: which of how many this is.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def gather(self, item: T) -> list[T]:
        """What every process has, by rank."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as this team trains it: the same parameters, gradients of all processes added up."""

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        """Parts of a prepared model can be called meanwhile, by all processes."""

    def gradients(self, model: nn.Module, loss: Loss[T], jobs: Sequence[T]) -> list[tuple[float, list[bool]]]:
        """Add to ``grad`` of every parameter that of the losses summed over all jobs of all processes.

        Returns this process's losses and outcomes, by job.
        """


class Alone:
    """One process; with several threads it computes as many jobs side by side, a torch thread each.

    Gradients are added up from the last job to the first, as they come, so threads change nothing but the time. One
    thread keeps one job's beside the sum, several also those that wait for their turn.
    """

    rank, size = 0, 1

    def __init__(self, threads: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._threads = threads
        if threads > 1:
            torch.set_num_threads(1)  # nothing spins when the machine is shared

    def gather(self, item: T) -> list[T]:
        return [item]

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def gradients(self, model: nn.Module, loss: Loss[T], jobs: Sequence[T]) -> list[tuple[float, list[bool]]]:
        parameters = list(model.parameters())

        def part(job: T) -> _Part:
            value, right = loss(model, job)
            return value.item(), right, torch.autograd.grad(value, parameters, allow_unused=True)

        def add(part: _Part) -> tuple[float, list[bool]]:
            value, right, gradients = part
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return value, right

        last_first = jobs[::-1]  # the longest are last, and one thread would end up alone with them
        with ThreadPoolExecutor(self._threads) if self._threads > 1 else nullcontext() as pool:
            parts = pool.map(part, last_first) if pool else map(part, last_first)
            return list(map(add, parts))[::-1]


class Together:
    """Several processes, by ``accelerate``: each computes its jobs in turn, gradients are added up between them.

    Every process has the whole model (DDP), or a part of each layer (``shard``: FSDP2), which torch does itself because
    accelerate shards on GPUs alone.
    """

    def __init__(self, accelerator: Any, shard: bool) -> None:
        self._accelerator, self._shard = accelerator, shard
        atexit.register(_leave)  # threads that wait for the others would abort a process that ends
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device

    def gather(self, item: T) -> list[T]:
        gathered: list[T] = [item] * self.size
        torch.distributed.all_gather_object(gathered, item)
        return gathered

    def prepare(self, model: nn.Module) -> nn.Module:
        if not self._shard:
            prepared: nn.Module = self._accelerator.prepare(model)
            return prepared
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in list(model.modules()):
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        if not isinstance(model, FSDPModule):
            yield
            return
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def gradients(self, model: nn.Module, loss: Loss[T], jobs: Sequence[T]) -> list[tuple[float, list[bool]]]:
        parts = []
        for i, job in enumerate(jobs):
            with self._adding(model, last=i == len(jobs) - 1):
                value, right = loss(model, job)
                (value * self.size).backward()  # what processes have is averaged, not added
                parts.append((value.item(), right))
        return parts

    def _adding(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients are sent once, with the last job."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self._accelerator.no_sync(model)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the first, or the only one, of those that were started together."""
    return _n_processes() == 1 or int(os.environ["RANK"]) == 0


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken where ``device`` computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def open_team(threads: int, shard: bool) -> Team:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one."""
    if _n_processes() == 1:
        return Alone(threads)
    from accelerate import Accelerator  # takes seconds to import

    # autocast is ours: what `accelerate config` wrote once must not decide what a recipe computes
    return Together(Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no"), shard)


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
