"""The accelerators on which ranks compute: the process groups of torch that connect them, and
digests of what is in their memory.

Each rank sees one device only (``machine/accelerators.py``). Sources: the documentation of
``torch.distributed`` and its ``distributed_c10d.py``, which makes process groups in the same way.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flatout.intercept import device
from flatout.intercept.patch import Undo
from flatout.parallel.channel import MEETING_SECONDS, Channel, Group, Lost, as_bytes

_GROUPS = {"cuda": "ProcessGroupNCCL", "xpu": "ProcessGroupXCCL"}
"""Classes of torch for the types of devices. ``cuda`` is ROCm as well, with RCCL."""

_MIXED_BY = 0x1E3779B97F4A7C15
"""An odd number with its bits spread (Knuth 1998, "Sorting and Searching", section 6.4)."""

_DIGEST_ROWS = 1024
"""Parts of a tensor of which a digest is made on the device, and compared in their order."""


def dispatch_keys() -> list[str]:
    """Return the names of the dispatch keys of the devices on which the program may compute, that
    of the CPU first."""
    accelerator = device.accelerator()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [str(torch._C._dispatch_key_for_device(name)) for name in types]


def connect(of: torch.device, channel: Channel, store: Any, lost: Lost) -> list[Group]:
    """Return two channels between the devices of all ranks: one for what they wait for, one for
    what goes on beside a backward call, in an order of its own.

    The list is empty on all ranks if torch has no process group for these devices, or if ranks
    share a device, which NCCL refuses.

    Args:
        of: a device of this rank.
        channel: to the other ranks, through main memory.
        store: of keys and values, the same for all ranks.
        lost: called when a rank cannot be reached any more.
    """
    made = _group_class(of.type)
    own = None if made is None else _identity(of)
    identities = list(map(json.loads, channel.exchange(json.dumps(own).encode())))
    if made is None or None in identities or len(set(map(tuple, identities))) < channel.size:
        return []
    groups = [_make_group(made, name, channel, store) for name in ("together", "beside")]
    found = [Group(group, channel.rank, channel.size, lost, of) for group in groups]
    for group in found:  # NCCL connects at the first exchange, for which all ranks must come
        group.sum([torch.zeros(1, device=of)])
    return found


def _group_class(type_: str) -> Any:
    from torch import distributed

    name = _GROUPS.get(type_)
    if name is None or not distributed.is_available():
        return None
    return getattr(torch._C._distributed_c10d, name, None)


def _make_group(made: Any, name: str, channel: Channel, store: Any) -> Any:
    from torch import distributed

    prefixed: Any = distributed.PrefixStore  # type: ignore[attr-defined]
    options = made.Options()
    options._timeout = datetime.timedelta(seconds=MEETING_SECONDS)
    return made(prefixed(name, store), channel.rank, channel.size, options)


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """A context in which float32 is not computed as TF32, if a CUDA device is in use: its rounding
    depends on the number of samples.

    Torch refuses to read its older switches once a program has used ``fp32_precision``
    (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32").
    """
    accelerator = device.accelerator_in_use()
    with contextlib.ExitStack() as undo:
        if accelerator is not None and accelerator.type == "cuda":
            backends: Any = torch.backends
            undo.callback(_compute_in_float32(backends.cuda.matmul, [backends.cuda.matmul]))
            cudnn = backends.cudnn
            undo.callback(_compute_in_float32(cudnn, [cudnn.conv, cudnn.rnn]))
        yield


def _compute_in_float32(older: Any, newer: Sequence[Any]) -> Undo:
    """Switch TF32 off for some operators; returns the undo.

    Args:
        older: the module with the switch ``allow_tf32``.
        newer: those with ``fp32_precision``.
    """
    try:
        precision = torch.get_float32_matmul_precision()
        if older.allow_tf32:
            older.allow_tf32 = False
            if older is torch.backends.cuda.matmul and precision != "highest":
                return functools.partial(torch.set_float32_matmul_precision, precision)
            return functools.partial(setattr, older, "allow_tf32", True)
        return lambda: None
    except RuntimeError:  # the program has used the newer ones
        before = [module.fp32_precision for module in newer]
        for module in newer:
            module.fp32_precision = "ieee"

        def undo() -> None:
            for module, precision in zip(newer, before, strict=True):
                module.fp32_precision = precision

        return undo


def _identity(of: torch.device) -> list[str]:
    """Return what tells a device from all others of all hosts."""
    properties = torch.get_device_module(of).get_device_properties(of)
    return [socket.gethostname(), str(getattr(properties, "uuid", of))]


def to_digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return numbers in main memory that tell a tensor's content: for a tensor on an accelerator, a
    digest of each of up to ``_DIGEST_ROWS`` parts, so that little is copied. The host waits.

    ``torch.hash_tensor`` adds up bits by XOR, so words are mixed with their places before.
    """
    if tensor.is_cpu or not hasattr(torch, "hash_tensor"):
        return as_bytes(tensor).cpu()
    data = as_bytes(tensor)
    words = data.numel() // _DIGEST_ROWS // 8
    if not words:
        return data.cpu()
    if data.storage_offset() % 8:
        data = data.clone()
    length = 8 * words * _DIGEST_ROWS
    mixed = data[:length].view(torch.int64) * _MIXED_BY  # equal words would cancel each other
    mixed += torch.arange(len(mixed), device=data.device) * _MIXED_BY
    digests = torch.hash_tensor(mixed.view(_DIGEST_ROWS, words), 1)
    return torch.cat([as_bytes(digests), data[length:]]).cpu()
