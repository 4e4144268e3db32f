"""Several processes that call one function together, over gloo.

The functions cut a batch, compute a module on their shards and join the outputs as
``flatout.parallel`` does, and compare with the module on the whole batch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from flatout.parallel import cutting, interior, placement, shards


class Ranks:
    """Processes that wait for calls.

    Args:
        size: their number.
        folder: of the file by which they meet.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [own for own, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, str(folder / "store"), pipe))
            for rank, (_, pipe) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def find_failures(self, function: Callable[..., None], *args: Any) -> str:
        """Call ``function(rank, *args)`` on all ranks; return the tracebacks of what it raises."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self._pipes]
        return "\n".join(filter(None, answers))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(60)
            if process.is_alive():
                process.kill()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    # No default group: torch.nn.SyncBatchNorm would use it.
    group = torch.distributed.ProcessGroupGloo(
        torch.distributed.FileStore(store, size), rank, size, timedelta(minutes=5)
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        failure = None
        try:
            function(Rank(rank, size, group), *args)
        except BaseException:  # noqa: BLE001 - reported to the test
            failure = f"rank {rank}: {traceback.format_exc()}"
        pipe.send(failure)
    group.shutdown()


class Rank:
    """One of the processes, as the functions that it runs see it.

    Args:
        rank, size: of the process.
        group: connects the processes.

    Attributes:
        sums: how often tensors were added up over the ranks in shards.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self.sums = 0

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all ranks."""
        for tensor in tensors:
            self._group.allreduce([tensor]).wait()
        return tensors

    def sum_in_shard(self, tensors: list[Tensor]) -> list[Tensor]:
        """Count the call and return the sums."""
        self.sums += 1
        return self.sum(tensors)

    def rows(self, batch: int) -> tuple[int, int]:
        """Return the first sample of the own shard and the one after its last."""
        return cutting.bounds(batch, self.size)[self.rank]

    def call(
        self,
        module: Callable[[Tensor], Tensor],
        tensor: Tensor,
        placements: Sequence[placement.Placement] = (),
        dim: int = 0,
    ) -> Tensor:
        """Return a module's output for the whole batch, computed in shards."""
        batch = tensor.shape[dim]
        part = _Scatter.apply(self, dim, batch, tensor)
        with shards.shard(*self.rows(batch), batch, self.sum_in_shard, placements):
            output = module(part)
        return _Gather.apply(self, dim, batch, output)

    def average(self, module: torch.nn.Module) -> None:
        """Average the gradients of a module's parameters."""
        for parameter in module.parameters():
            if parameter.grad is not None:
                self.sum([parameter.grad])
                parameter.grad /= self.size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rank: Rank, dim: int, batch: int, part: Tensor) -> Tensor:
        ctx.where = rank, dim, batch
        shape = list(part.shape)
        shape[dim] = batch
        whole = part.new_zeros(shape)
        start, stop = rank.rows(batch)
        whole.narrow(dim, start, stop - start).copy_(part)
        return rank.sum([whole])[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, None, _Scatter.apply(*ctx.where, gradient) * ctx.where[0].size


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rank: Rank, dim: int, batch: int, whole: Tensor) -> Tensor:
        ctx.where = rank, dim, batch
        return cutting.cut_tensor(whole, dim, *rank.rows(batch)).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, None, _Gather.apply(*ctx.where, gradient) / ctx.where[0].size


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """A context in which operators know of shards."""
    undo = interior.install()
    try:
        yield
    finally:
        undo()
