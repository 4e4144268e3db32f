"""The ranks together: their meetings, and what they gather and average."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flatout.parallel.balance import Balance, Exchange, Graphs, Phase
from flatout.parallel.channel import Gloo, aligned, to_bytes
from flatout.parallel.ending import Ending
from flatout.parallel.header import Header, Meeting, first_difference
from flatout.parallel.placement import UnshareableError
from flatout.parallel.sameness import structure_digest

BUCKET_BYTES = 32 << 20
"""Most bytes that are averaged at once, if there are several tensors."""

PARTED = "it computes batch norms on some ranks only"
"""Why a rank leaves a shard if another has raised or ended its shard earlier."""

_FIELDS = ("sequence", "meeting", "subject", "structure", "content", "generators", "parameters")


class Team:
    """The ranks, as one of them sees them.

    Args:
        channel: the connection to the others.
        ending: stops this process.

    Attributes:
        rank, size: of this process.
        channel, ending: as given.
        balance: what the ranks cost and save.
        graphs: those of what the ranks have computed together.
        thread: the one in which this was made. The ranks meet in no other.
        step: number of optimizer steps so far.
    """

    def __init__(self, channel: Gloo, ending: Ending) -> None:
        self.rank = channel.rank
        self.size = channel.size
        self.channel = channel
        self.ending = ending
        self.balance = Balance(channel.size)
        self.graphs = Graphs()
        self.step = 0
        self.thread = threading.get_ident()
        self._meetings = 0

    # Meetings

    def meet(self, header: Header, what: str, alike: Sequence[str] = _FIELDS) -> list[Header]:
        """Exchange headers, and stop if the ranks have parted.

        Args:
            header: of this rank; its sequence number is filled in.
            what: what this rank does, for the sentence.
            alike: the fields that must be the same on all ranks.

        Returns:
            The headers of all ranks.
        """
        header = dataclasses.replace(header, sequence=self._meetings)
        self._meetings += 1
        self.balance.count(Exchange.MEETING)
        with self.balance.spend(Phase.WAITING):
            headers = [Header.unpack(data) for data in self.channel.meet(header.pack())]
        found = first_difference(headers, alike)
        if found is not None:
            name, rank = found
            words = [text.decode() for text in self.channel.exchange(what.encode())]
            self.ending.stop(_parting(name, rank, self.step, words))
        return headers

    # Tensors

    def gather(
        self, tensors: Sequence[torch.Tensor], dims: Sequence[int], rows: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the tensors of the whole batch, with the strides that those of the shards have.

        Args:
            tensors: of this rank's shard.
            dims: the dimension of each tensor that counts samples.
            rows: the number of rows of each rank's shard.
        """
        self._refuse_batched(tensors)
        shapes = [_shapes(t, dim, rows) for t, dim in zip(tensors, dims, strict=True)]
        sizes = [
            [
                shape[rank].numel() * t.element_size()
                for t, shape in zip(tensors, shapes, strict=True)
            ]
            for rank in range(self.size)
        ]
        offsets = [aligned(of_rank) for of_rank in sizes]
        own = torch.zeros(max(of_rank[-1] for of_rank in offsets), dtype=torch.uint8, device="cpu")
        for tensor, start, size in zip(tensors, offsets[self.rank], sizes[self.rank], strict=False):
            own[start : start + size] = to_bytes(tensor)
        self.balance.count(Exchange.GATHER)
        self.balance.count(Exchange.GATHERED_BYTES, self.size * own.numel())
        with self.balance.spend(Phase.COMMUNICATION):
            received = self.channel.gather(own)
        joined = [_empty_whole(t, dim, sum(s[dim] for s in shape))
                  for t, dim, shape in zip(tensors, dims, shapes, strict=True)]  # fmt: skip
        for rank in range(self.size):
            for i, whole in enumerate(joined):
                start, size = offsets[rank][i], sizes[rank][i]
                part = received[rank, start : start + size].view(whole.dtype).view(shapes[i][rank])
                before = sum(shape[dims[i]] for shape in shapes[i][:rank])
                whole.narrow(dims[i], before, part.shape[dims[i]]).copy_(part)
        return joined

    def average(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the mean of each tensor over the ranks, as a new tensor of the same strides."""
        self._refuse_batched(tensors)
        means: list[torch.Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            if tensor.is_sparse:
                means[i] = self._average_sparse(tensor)
        for indices in _buckets(tensors):
            parts = [_real(tensors[i].detach()).reshape(-1).cpu() for i in indices]
            flat = torch.cat([_for_sum(part) for part in parts])
            self._sum(flat)
            flat.mul_(1 / self.size)
            numbers = [part.numel() for part in parts]
            for i, mean in zip(indices, flat.split(numbers), strict=True):
                means[i] = new = torch.empty_like(tensors[i], requires_grad=False)
                real = _real(new)
                real.copy_(mean.view(real.shape))
        return [mean for mean in means if mean is not None]

    def add_up(self, tensors: list[torch.Tensor], is_in_forward: bool) -> list[torch.Tensor]:
        """Return the sums over the ranks of what a shard adds up in its forward pass, or in the
        backward pass.

        Args:
            tensors: in main memory; they are replaced by the sums.
            is_in_forward: whether the call may still be computed whole, should ranks have parted.

        Raises:
            UnshareableError: another rank is not at this sum.
        """
        header = Header(0, Meeting.STATISTICS, structure=structure_digest(tensors))
        alike = ("sequence",) if is_in_forward else ("sequence", "meeting", "structure")
        headers = self.meet(header, "computes statistics of a batch norm", alike)
        if any(other.meeting is not Meeting.STATISTICS for other in headers):
            raise UnshareableError(PARTED)
        if any(other.structure != header.structure for other in headers):
            raise UnshareableError("its batch norms differ in sizes")
        for tensor in tensors:
            self._sum(tensor)
        return tensors

    def _sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor in main memory by its sum over the ranks."""
        self.balance.count(Exchange.SUM)
        self.balance.count(Exchange.SUMMED_BYTES, tensor.numel() * tensor.element_size())
        with self.balance.spend(Phase.COMMUNICATION):
            self.channel.sum(tensor)

    def _refuse_batched(self, tensors: Sequence[torch.Tensor]) -> None:
        functorch: Any = torch._C._functorch
        tests = functorch.is_batchedtensor, functorch.is_legacy_batchedtensor
        if any(is_batched(tensor) for tensor in tensors for is_batched in tests):
            self.ending.stop(
                "--ranks does not support backward calls inside of vmap, such as those of "
                "torch.autograd.grad with is_grads_batched and of jacobian with vectorize"
            )

    def _average_sparse(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean of a sparse tensor, whose indices may differ between the ranks."""
        own = tensor.detach().coalesce()
        counts = [int(count) for count in self.channel.exchange(str(own._nnz()).encode())]
        indices, values = self.gather([own.indices(), own.values()], [1, 0], counts)
        values = values / self.size
        whole = torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=False)
        return whole.coalesce()


def _shapes(tensor: torch.Tensor, dim: int, rows: Sequence[int]) -> list[torch.Size]:
    """Return the shape of a tensor on each rank."""
    shape = list(tensor.shape)
    return [torch.Size([*shape[:dim], of_rank, *shape[dim + 1 :]]) for of_rank in rows]


def _empty_whole(shard: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return an empty tensor for the whole batch, with its dimensions in the order in which the
    memory of the shard has them."""
    shape = [*shard.shape[:dim], size, *shard.shape[dim + 1 :]]
    strides = shard.stride()
    order = sorted(range(shard.dim()), key=lambda i: (-strides[i], i))
    return torch.empty_permuted(shape, order, dtype=shard.dtype, device=shard.device)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yield the indices of dense tensors that are averaged together: of one dtype, not too many."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    for i, tensor in enumerate(tensors):
        if tensor.is_sparse:
            continue
        key = tensor.dtype, tensor.device
        size = tensor.numel() * tensor.element_size()
        if key in open_buckets and room[key] < size:
            yield open_buckets.pop(key)
        room[key] = (room[key] if key in open_buckets else BUCKET_BYTES) - size
        open_buckets.setdefault(key, []).append(i)
    yield from open_buckets.values()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _for_sum(part: torch.Tensor) -> torch.Tensor:
    """Return numbers of half precision as float32: a sum over ranks must not round more."""
    return part.float() if part.dtype in (torch.float16, torch.bfloat16) else part


def _parting(name: str, rank: int, step: int, words: Sequence[str]) -> str:
    """Return how two ranks have parted, and the likely cause.

    Args:
        name: the first field of the header in which they differ.
        rank: the first that differs from rank 0.
        step: number of optimizer steps so far.
        words: what each rank does.
    """
    here = f"rank 0 and rank {rank} have parted in step {step + 1}"
    if name in ("sequence", "meeting", "subject"):
        return (
            f"{here}: rank 0 {words[0]}, rank {rank} {words[rank]}; the program decides by "
            "something that is not the same on all ranks, such as the clock or a generator "
            "without a seed"
        )
    return f"{here}, where rank 0 {words[0]}: {_DIFFERENCES[name]}"


_DIFFERENCES = {
    "structure": "sizes or types of its inputs differ; a likely cause is a random generator that "
    "the operating system seeds, or data in another order",
    "content": "its inputs differ; a likely cause is a random generator that the operating system "
    "seeds (numpy.random.default_rng(), random.Random(), os.urandom), or data in another order",
    "generators": "the random generators are in different states; a likely cause is that the "
    "program draws at times that the clock decides",
    "parameters": "parameters or optimizer states differ; a likely cause is an update that is not "
    "deterministic, or made from what is not the same on all ranks",
}
