"""What the agent can see of the program: its models, optimizers, loaders and torch's switches.

Collected once, after the timed steps: its cost (a pass over the parameters) does not matter.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from flatout.agent.finite import kept_gradient

if TYPE_CHECKING:
    from flatout.agent.session import Session

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def collect(session: Session) -> dict[str, Any]:
    """All facts, as JSON types."""
    return {
        "optimizers": [_optimizer(o) for o in session.optimizers if o.param_groups],
        "modules": _modules(session.roots),
        "parameters": _parameters(session.roots, session.optimizers),
        "loaders": [_loader(loader) for loader in session.loaders],
        "opens_images": "PIL.JpegImagePlugin" in sys.modules,
        "switches": {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "anomaly_detection": torch.is_anomaly_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": _float32_matmul_precision(),
        },
        "threads": torch.get_num_threads(),
        "knobs": sorted(session.turned),
    }


def _float32_matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set it by the newer interface, for single backends
        return None


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "class": type(optimizer).__name__,
        "tensors": len(tensors),
        "elements": sum(p.numel() for p in tensors),
        "fused": any(bool(group.get("fused")) for group in optimizer.param_groups),
        "can_fuse": "fused" in inspect.signature(type(optimizer).__init__).parameters,
    }


def _modules(roots: list[torch.nn.Module]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    channels_last = grouped = 0
    for root in roots:
        for module in root.modules():
            kinds[type(module).__name__] += 1
            if isinstance(module, torch.nn.Conv2d):
                weight = module.weight
                is_ambiguous = weight.shape[1] == 1 or weight.shape[2:] == (1, 1)
                last = weight.is_contiguous(memory_format=torch.channels_last)
                channels_last += last and not is_ambiguous
                grouped += module.groups > 1
    return {
        "roots": [type(root).__name__ for root in roots],
        "kinds": dict(kinds),
        "convolutions_channels_last": channels_last,
        "convolutions_grouped": grouped,
    }


def _parameters(
    roots: list[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Any]:
    elements: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    optimized = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    denormal = total = unoptimized = 0
    for parameter in {p for root in roots for p in root.parameters()}:
        elements[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        devices[parameter.device.type] += parameter.numel()
        if id(parameter) not in optimized and kept_gradient.__get__(parameter) is not None:
            unoptimized += parameter.numel()
        if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
            magnitude = parameter.detach().abs()
            denormal += int(((magnitude > 0) & (magnitude < _SMALLEST_NORMAL)).sum())
            total += parameter.numel()
    return {
        "elements_by_dtype": dict(elements),
        "elements_by_device": dict(devices),
        "denormal_share": denormal / total if total else None,
        "unoptimized_elements": unoptimized,
    }


def source(dataset: Any) -> Any:
    """What subsets, and subsets of them, choose from."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _loader(loader: Any) -> dict[str, Any]:
    return {
        "workers": loader.num_workers,
        "batch_size": loader.batch_size,
        "dataset": type(source(loader.dataset)).__name__,
        "pin_memory": bool(loader.pin_memory),
        "persistent_workers": bool(loader.persistent_workers),
    }
