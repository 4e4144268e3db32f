"""Collecting facts about the program: its modules, optimizers, loaders and switches of torch.

Facts are collected once, after the timed steps, so the cost of a pass over all parameters does not
matter.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from flatout.intercept import objects
from flatout.intercept.gradients import stored_gradient
from flatout.knobs import loader as loader_knob
from flatout.wire.facts import (
    LoaderFacts,
    ModuleFacts,
    OptimizerFacts,
    ParameterFacts,
    ProgramFacts,
    SwitchFacts,
)

if TYPE_CHECKING:
    from flatout.intercept.host import Host

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def collect(host: Host) -> ProgramFacts:
    """Return all facts about the program."""
    return ProgramFacts(
        optimizers=tuple(
            _describe_optimizer(o) for o in host.optimizers if objects.param_groups(o)
        ),
        modules=_describe_modules(host.roots),
        parameters=_describe_parameters(host.roots, host.optimizers),
        loaders=tuple(_describe_loader(loader) for loader in host.loaders),
        opens_images="PIL.JpegImagePlugin" in sys.modules,
        switches=SwitchFacts(
            deterministic=torch.are_deterministic_algorithms_enabled(),
            anomaly_detection=torch.is_anomaly_enabled(),
            cudnn_benchmark=bool(torch.backends.cudnn.benchmark),
            float32_matmul_precision=_float32_matmul_precision(),
        ),
        threads=torch.get_num_threads(),
        is_distributed=torch.distributed.is_available() and torch.distributed.is_initialized(),
        knobs=tuple(sorted(host.applied.names)),
    )


def _float32_matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set different precisions for single backends
        return None


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    groups = objects.param_groups(optimizer)
    tensors = [p for group in groups for p in group["params"]]
    return OptimizerFacts(
        class_=_class_name(optimizer),
        tensors=len(tensors),
        elements=sum(p.numel() for p in tensors),
        fused=any(bool(group.get("fused")) for group in groups),
        can_fuse=_can_fuse(optimizer),
    )


def _describe_modules(roots: list[torch.nn.Module]) -> ModuleFacts:
    kinds: Counter[str] = Counter()
    channels_last = grouped = 0
    for root in roots:
        for module in objects.modules(root):
            kinds[_class_name(module)] += 1
            if issubclass(type(module), torch.nn.Conv2d):
                weight = module.weight
                is_ambiguous = weight.shape[1] == 1 or weight.shape[2:] == (1, 1)
                last = weight.is_contiguous(memory_format=torch.channels_last)
                channels_last += last and not is_ambiguous
                grouped += module.groups > 1
    return ModuleFacts(
        roots=tuple(_class_name(root) for root in roots),
        kinds=dict(kinds),
        convolutions_channels_last=int(channels_last),
        convolutions_grouped=int(grouped),
    )


def _describe_parameters(
    roots: list[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> ParameterFacts:
    elements: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    groups = (group for o in optimizers for group in objects.param_groups(o))
    optimized = {id(p) for group in groups for p in group["params"]}
    denormal = total = unoptimized = 0
    for parameter in _find_initialized_parameters(roots):
        elements[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        devices[parameter.device.type] += parameter.numel()
        if id(parameter) not in optimized and stored_gradient.__get__(parameter) is not None:
            unoptimized += parameter.numel()
        if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
            magnitude = parameter.detach().abs()
            denormal += int(((magnitude > 0) & (magnitude < _SMALLEST_NORMAL)).sum())
            total += parameter.numel()
    return ParameterFacts(
        elements_by_dtype=dict(elements),
        elements_by_device=dict(devices),
        denormal_share=denormal / total if total else None,
        unoptimized_elements=unoptimized,
    )


def _find_initialized_parameters(roots: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Return the parameters of all roots, each once, except uninitialized (lazy) parameters."""
    found = {id(p): p for root in roots for p in objects.parameters(root)}
    return [p for p in found.values() if not torch.nn.parameter.is_lazy(p)]


def _can_fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the constructor of the optimizer has the parameter ``fused``."""
    constructor = inspect.unwrap(objects.inherited(type(optimizer), "__init__"))
    code = getattr(constructor, "__code__", None)
    if code is None:
        return False
    return "fused" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _class_name(value: object) -> str:
    """Return the name of the class, without the names of enclosing classes and functions."""
    return objects.class_name(value).rpartition(".")[2]


def source(dataset: Any) -> Any:
    """Return the dataset from which a (nested) ``Subset`` selects, or any other dataset itself."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _describe_loader(loader: Any) -> LoaderFacts:
    held = objects.attributes(loader)
    return LoaderFacts(
        workers=_to_int(held.get("num_workers")),
        batch_size=_to_int(held.get("batch_size")),
        dataset=_class_name(source(held.get("dataset"))),
        pin_memory=bool(held.get("pin_memory")),
        persistent_workers=bool(held.get("persistent_workers")),
        settings=loader_knob.possible(held),
    )


def _to_int(value: Any) -> int | None:
    """Return an integer, which may be an integer of NumPy, as an int; ``None`` for any other
    value."""
    try:
        return operator.index(value)
    except TypeError:
        return None
