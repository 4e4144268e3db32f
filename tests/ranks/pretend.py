"""A device that is main memory by another name (``pretend.cpp``), for programs that are to compute
on an accelerator where there is none."""

from __future__ import annotations

import os
import types

import torch


def register(library: str) -> None:
    """Make the device known to torch.

    Args:
        library: path of the compiled ``pretend.cpp``.
    """
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("torch.pretend")
    states = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_rng_state": lambda device="pretend": torch.get_rng_state(),
        "set_rng_state": lambda state, device="pretend": torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "get_device_properties": lambda device: types.SimpleNamespace(uuid=os.getpid()),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, function in states.items():
        setattr(module, name, function)
    torch._register_device_module("pretend", module)
