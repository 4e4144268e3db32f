"""The ranks together: their meetings, and what they gather and average."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flatout.parallel.balance import Balance, Exchange, Graphs, Phase
from flatout.parallel.channel import Channel, Group, for_sum, on_device
from flatout.parallel.ending import Ending
from flatout.parallel.header import Header, Meeting, attached_bytes, first_difference
from flatout.parallel.placement import UnshareableError
from flatout.parallel.sameness import structure_digest

BUCKET_BYTES = 32 << 20
"""Most bytes that are averaged at once, if there are several tensors."""

_SUMMED_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Those that channels add up."""

PARTED = "it computes batch norms or sums over samples on some ranks only"
"""Why a rank leaves a shard if another has raised or ended its shard earlier."""

_FIELDS = ("sequence", "meeting", "subject", "structure", "content", "generators", "parameters")


class Team:
    """The ranks, as one of them sees them.

    Args:
        channel: the connection to the others, for messages and for tensors in main memory.
        ending: stops this process.
        connect: see ``joining.Connection``; without it, all tensors go through main memory.

    Attributes:
        rank, size: of this process.
        channel, ending: as given.
        balance: what the ranks cost and save.
        graphs: those of what the ranks have computed together.
        thread: the one that has made the last root call. The ranks meet in no other.
        step: number of optimizer steps so far.
    """

    def __init__(
        self,
        channel: Channel,
        ending: Ending,
        connect: Callable[[torch.device], list[Group]] = lambda _: [],
    ) -> None:
        self.rank = channel.rank
        self.size = channel.size
        self.channel = channel
        self.ending = ending
        self.balance = Balance(channel.size)
        self.graphs = Graphs(self.balance)
        self.step = 0
        self.thread = threading.get_ident()
        self._meetings = 0
        self._attached_bytes = attached_bytes(channel.size, channel.is_fast)
        self._connect = connect
        self._groups = {"cpu": connect(torch.device("cpu"))}

    def close(self, *, is_together: bool) -> None:
        """Leave the other ranks.

        Args:
            is_together: whether all ranks do so. Else groups of accelerators stay as they are: NCCL
                closes them together only.
        """
        for channel in self._channels():
            if is_together or channel.device.type == "cpu":
                channel.close()
            else:
                channel.forget()

    def forget(self) -> None:
        """Leave all connections as they are, in the child of a fork."""
        for channel in self._channels():
            channel.forget()

    # Meetings

    def meet(self, header: Header, what: str, alike: Sequence[str] = _FIELDS) -> list[Header]:
        """Exchange headers, and stop if the ranks have parted.

        Args:
            header: of this rank; its sequence number is filled in.
            what: what this rank does, for the sentence.
            alike: the fields that must be the same on all ranks.

        Returns:
            The headers of all ranks.

        Raises:
            PartedError: see ``Ending.part``.
        """
        return self._meet(header, what, alike, b"")[0]

    def _meet(
        self, header: Header, what: str, alike: Sequence[str], attached: bytes
    ) -> tuple[list[Header], list[memoryview]]:
        """Exchange headers with what is attached to them, at most ``_attached_bytes`` long; the
        rest is as for ``meet``."""
        own = header.pack(self._meetings)
        self._meetings += 1
        self.balance.count(Exchange.MEETING)
        message = (own + attached).ljust(len(own) + self._attached_bytes, b"\0")
        with self.balance.spend(Phase.WAITING):
            messages = self.channel.meet(message)
        packed = [bytes(data[: len(own)]) for data in messages]
        of_others = [data[len(own) :] for data in messages]
        headers = [Header.unpack(own)] * self.size
        if any(data != own for data in packed):
            headers = list(map(Header.unpack, packed))
        found = first_difference(headers, alike)
        if found is not None:
            name, rank = found
            words = [text.decode() for text in self.channel.exchange(what.encode())]
            self.ending.part(
                _parting(name, rank, self.step, words),
                headers[0].meeting in (Meeting.CALL, Meeting.BATCH),
                self.channel.exchange,
            )
        return headers, of_others

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
        joined = [
            _empty_whole(tensor, dim, sum(rows)) for tensor, dim in zip(tensors, dims, strict=True)
        ]
        parts: list[list[torch.Tensor]] = []
        for rank, count in enumerate(rows):
            before = sum(rows[:rank])
            parts.append([t.narrow(d, before, count) for t, d in zip(joined, dims, strict=True)])
        self.balance.count(Exchange.GATHER)
        self.balance.count(Exchange.GATHERED_BYTES, _count_bytes(joined))
        with self.balance.spend(Phase.COMMUNICATION):
            for channel, indices in self._by_channel(tensors):
                wholes = [[of_rank[i] for i in indices] for of_rank in parts]
                self._gather(channel, [tensors[i] for i in indices], wholes)
        return joined

    def _gather(
        self,
        channel: Channel,
        tensors: Sequence[torch.Tensor],
        wholes: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Copy the tensors of all ranks into those that are given for each rank."""
        own = [on_device(tensor, channel.device) for tensor in tensors]
        targets = [[_or_empty(whole, channel.device) for whole in of_rank] for of_rank in wholes]
        channel.gather(own, targets)
        for of_rank, found in zip(wholes, targets, strict=True):
            _copy_others(of_rank, found)

    def average(
        self, tensors: Sequence[torch.Tensor], *, in_place: bool = False
    ) -> list[torch.Tensor]:
        """Return the mean of each tensor over the ranks, as a tensor of the same strides.

        Args:
            tensors: may be sparse.
            in_place: whether dense tensors are to hold their means; by default, means are new
                tensors. The versions that autograd counts stay as they are.
        """
        self._refuse_batched(tensors)
        means: dict[int, torch.Tensor] = {}
        for i, tensor in enumerate(tensors):
            if tensor.is_sparse:
                means[i] = self._average_sparse(tensor)
            else:
                means[i] = tensor.data if in_place else torch.empty_like(tensor.detach())
        for indices in _buckets(tensors):
            channel = self._channel_for(tensors[indices[0]])
            parts = [on_device(_real(tensors[i].detach()), channel.device) for i in indices]
            wholes = [means[i] for i in indices]
            targets = [_or_empty(whole, channel.device) for whole in wholes]
            with self.summing(parts):
                channel.average(parts, [_real(target) for target in targets])
                _copy_others(wholes, targets)
        return [means[i] for i in range(len(tensors))]

    def add_up(self, tensors: list[torch.Tensor], is_in_forward: bool) -> list[torch.Tensor]:
        """Return the sums over the ranks of what a shard adds up in its forward pass, or in the
        backward pass.

        Args:
            tensors: they are replaced by the sums.
            is_in_forward: whether the call may still be computed whole, should ranks have parted.

        Raises:
            UnshareableError: another rank is not at this sum.
        """
        header = Header(0, Meeting.STATISTICS, structure=structure_digest(tensors))
        alike = ("sequence",) if is_in_forward else ("sequence", "meeting", "structure")
        attached = self._attach(tensors)
        headers, of_others = self._meet(header, "adds up over all samples", alike, attached)
        if any(other.meeting is not Meeting.STATISTICS for other in headers):
            raise UnshareableError(PARTED)
        if any(other.structure != header.structure for other in headers):
            raise UnshareableError("its batch norms or sums over samples differ in sizes")
        if attached:
            return [_add_up_attached(tensors[0], of_others)]
        with self.summing(tensors):
            for channel, indices in self._by_channel(tensors):
                by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
                for i in indices:
                    by_dtype.setdefault(tensors[i].dtype, []).append(tensors[i])
                for alike_tensors in by_dtype.values():
                    self._sum(channel, alike_tensors)
        return tensors

    def _attach(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """Return the content of a small tensor to be added up, which need not be sent by itself;
        nothing if there are several tensors, or a large one."""
        (own, *others) = tensors
        if others or not own.is_cpu or own.dtype is not torch.float64:
            return b""
        if own.nbytes > self._attached_bytes:
            return b""
        dense = own.contiguous()
        return ctypes.string_at(dense.data_ptr(), dense.nbytes)

    def _sum(self, channel: Channel, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the ranks."""
        if tensors[0].dtype in _SUMMED_DTYPES:
            own = [on_device(tensor, channel.device) for tensor in tensors]
            channel.sum([_real(tensor) for tensor in own])
            _copy_others(tensors, own)
            return
        # Whole numbers, and numbers of half precision, whose sums are rounded once.
        of_ranks = [[torch.empty_like(tensor) for tensor in tensors] for _ in range(self.size)]
        self._gather(channel, tensors, of_ranks)
        for tensor, *parts in zip(tensors, *of_ranks, strict=True):
            tensor.copy_(sum(map(for_sum, parts)))

    @property
    def can_average_beside(self) -> bool:
        """Whether exchanges take long, over a network or between accelerators, and there are
        channels for some that go on beside a backward call."""
        return any(self._groups.values())

    def find_channel_beside(self, tensor: torch.Tensor) -> Group | None:
        """Return the channel for tensors on a device that ranks may use while a backward call is
        made, in an order of its own; ``None`` if there is none. All ranks ask at the same time."""
        groups = self._groups_of(tensor.device)
        return groups[1] if groups else None

    def _channel_for(self, tensor: torch.Tensor) -> Channel:
        """Return the channel by which tensors on a device are exchanged."""
        if tensor.is_cpu:
            return self.channel
        groups = self._groups_of(tensor.device)
        return groups[0] if groups else self.channel

    def _groups_of(self, device: torch.device) -> list[Group]:
        if device.type not in self._groups:
            self.balance.is_measured = False
            self._groups[device.type] = self._connect(device)
        return self._groups[device.type]

    def _by_channel(self, tensors: Sequence[torch.Tensor]) -> list[tuple[Channel, list[int]]]:
        """Return the indices of the tensors that are exchanged together."""
        found: dict[Channel, list[int]] = {}
        for i, tensor in enumerate(tensors):
            found.setdefault(self._channel_for(tensor), []).append(i)
        return list(found.items())

    def _channels(self) -> list[Channel]:
        """Return all channels, each once."""
        groups = itertools.chain.from_iterable(self._groups.values())
        return list(dict.fromkeys((self.channel, *groups)))

    @contextlib.contextmanager
    def summing(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """A context in which tensors are added up over the ranks."""
        self.balance.count(Exchange.SUM)
        self.balance.count(Exchange.SUMMED_BYTES, _count_bytes(tensors))
        with self.balance.spend(Phase.COMMUNICATION):
            yield

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


def _add_up_attached(own: torch.Tensor, of_others: Sequence[memoryview]) -> torch.Tensor:
    """Return the sum, in the order of the ranks, of what was attached to headers."""
    elements = own.numel()
    parts = [torch.frombuffer(data, dtype=own.dtype, count=elements) for data in of_others]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.view(own.shape)


def _or_empty(whole: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor if a channel can write into it, else an empty one of its shape.

    Args:
        whole: the tensor.
        device: of the channel.
    """
    is_plain = whole.is_contiguous() and not (whole.is_conj() or whole.is_neg())
    if is_plain and whole.device.type == device.type:
        return whole
    return torch.empty(whole.shape, dtype=whole.dtype, device=device)


def _copy_others(wholes: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy what was written into others than the tensors themselves."""
    for whole, target in zip(wholes, targets, strict=True):
        if target is not whole:
            whole.copy_(target)


def _count_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    "parameters": "parameters or optimizer states differ; a likely cause is that they are "
    "initialized or updated from what is not the same on all ranks, or not deterministically",
}
