"""Average gradients of DistributedDataParallel in other buckets, uncopied, or compressed."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "ddp"

LARGE_MIB = 100
"""The size of a bucket under ``large``; torch's default is 25 MiB."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "view": {"gradient_as_bucket_view": True},
    "large": {"gradient_as_bucket_view": True, "bucket_cap_mb": LARGE_MIB},
    "static": {"gradient_as_bucket_view": True, "static_graph": True},
    "bf16": {"gradient_as_bucket_view": True},
    "fp16": {"gradient_as_bucket_view": True},
}
"""The arguments of DistributedDataParallel that a setting gives, where the program gives none."""

_HALVES: tuple[str, ...] = ("bf16", "fp16")
"""The settings that compress gradients."""

_BFLOAT16_BACKENDS = ("nccl", "xccl")
"""Those for which DistributedDataParallel accepts its hook (``_check_comm_hook``)."""

_SUM_OPERATORS = ("allreduce", "all_reduce", "AllReduce")


def match(facts: Facts) -> Match:
    """Offer the settings for programs that average gradients over several processes."""
    if not facts.is_distributed:
        return Match((), "the program has one process")
    if facts.lack(*_SUM_OPERATORS):
        return Match((), "the program averages no gradients over its processes")
    halves = ("fp16",) if facts.device == "cpu" else _HALVES
    if facts.main_dtype not in (None, "float32"):
        halves = ()
    # Operators only begin a sum; the time in which a step waits for it is not known. ``static`` may
    # be wrong in steps that no proof has seen, so it is for those who know their program.
    return Match((*halves, "large", "view"))


def apply(host: Host, setting: str) -> Undo:
    """Wrap the constructor of DistributedDataParallel, and for compression its forward pass.

    Raises:
        RefusedError: this torch has no torch.distributed.
    """
    from torch import distributed

    if not distributed.is_available():
        raise RefusedError("this torch has no torch.distributed")
    from torch.nn.parallel import DistributedDataParallel

    from flatout.intercept.patch import wrap_function

    on_failure = host.applied.on_failure_of(NAME)
    construct = functools.partial(_construct, host, setting)
    with ExitStack() as undo:
        undo.callback(wrap_function(DistributedDataParallel, "__init__", on_failure, construct))
        if setting in _HALVES:
            compress = functools.partial(_compress, host, setting, weakref.WeakSet())
            undo.callback(wrap_function(DistributedDataParallel, "forward", on_failure, compress))
        return undo.pop_all().close


def _construct(
    host: Host, setting: str, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Construct a DistributedDataParallel with the arguments of a setting."""
    from torch.nn.parallel import DistributedDataParallel

    from flatout.intercept import handled_calls

    signature = inspect.signature(DistributedDataParallel.__init__)
    given = signature.bind_partial(*args, **kwargs).arguments
    added = {name: value for name, value in ARGUMENTS[setting].items() if name not in given}
    if not added and setting not in _HALVES:
        host.events.add("skipped", NAME, "the program gives these arguments itself")
    handled_calls.counts[NAME] += bool(added)
    return original(*args, **kwargs, **added)


def _compress(
    host: Host,
    setting: str,
    seen: weakref.WeakSet[Any],
    original: Callable[..., Any],
    module: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Have gradients compressed from the first pass of a module on, unless the program has a hook
    of its own for them."""
    if module not in seen:
        seen.add(module)
        _register_hook(host, setting, module)
    return original(module, *args, **kwargs)


def _register_hook(host: Host, setting: str, module: Any) -> None:
    from torch import distributed
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    from flatout.intercept import handled_calls

    if module._comm_hooks:
        host.events.add("skipped", NAME, "the program averages gradients by a hook of its own")
        return
    backend = distributed.get_backend(module.process_group)
    if setting == "bf16" and backend not in _BFLOAT16_BACKENDS:
        host.events.add("skipped", NAME, f"{backend} averages no gradients in bfloat16")
        return
    half = (
        default_hooks.bf16_compress_hook if setting == "bf16" else default_hooks.fp16_compress_hook
    )
    module.register_comm_hook(module.process_group, half)
    handled_calls.counts[NAME] += 1


KNOB = Knob(
    name=NAME,
    summary="average gradients of DistributedDataParallel without copies, or compressed",
    settings=("view", "large", "static", "bf16", "fp16"),
    exactness={
        "view": "bitwise",
        "large": "reordered",
        "static": "reordered",
        "bf16": "reduced",
        "fp16": "reduced",
    },
    hot=False,
    platforms=("cpu", "cuda", "xpu"),
    card=Card(
        what="The knob changes how `DistributedDataParallel` averages gradients over the "
        "processes of a job that torchrun or another launcher has started. Arguments that the "
        "program gives itself stay as they are.\n\n"
        "`view`: gradients are views of the buckets in which they are averaged "
        "(`gradient_as_bucket_view=True`), so they are not copied into the buckets and back. All "
        "other settings include this.\n\n"
        f"`large`: buckets have {LARGE_MIB} MiB instead of 25, so gradients are averaged in fewer, "
        "larger pieces.\n\n"
        "`static`: torch assumes that every step uses the same parameters in the same order "
        "(`static_graph=True`). It then need not search for unused parameters, and may average "
        "in the order in which gradients become ready. `flatout tune` does not try it, because "
        "a later step may be another.\n\n"
        "`bf16`, `fp16`: gradients are rounded to 16 bits before they are sent, and averaged in "
        "16 bits (`register_comm_hook`). Half as many bytes are sent. A program that registers a "
        "hook of its own after its first step fails under these settings.",
        helps="The knob helps steps that wait for gradients to be averaged: large models, slow "
        "networks, many processes. `flatout doctor` shows this share.",
        hurts="`static` computes wrong gradients if a later step uses other parameters than the "
        "first one. `bf16` has 8 bits of precision. `fp16` turns gradients above 65,504 into "
        "infinity. Code that calls `detach_()` on gradients fails with all settings.",
        by_hand="`DistributedDataParallel(model, gradient_as_bucket_view=True, "
        "static_graph=True)`; `model.register_comm_hook(None, "
        "default_hooks.bf16_compress_hook)`. If gradients are accumulated over several backward "
        "passes, put all but the last into `model.no_sync()`: only the program knows which one "
        "is the last before an optimizer step, so the knob does not do it.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html",
            "https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html",
            "https://arxiv.org/abs/2006.15704",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("how DistributedDataParallel averages gradients",),
)
