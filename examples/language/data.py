"""The text: the Python standard library's own sources, read as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

VOCABULARY = 128  # ASCII
VALIDATION_SHARE = 0.1


def load_corpus(max_bytes: int = 4_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation text, one-dimensional int64 tensors of byte values.

    Whole files go to either side: every tenth file is for validation.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        text = path.read_bytes()
        if not text.isascii():
            continue
        sides[number % 10 == 9].append(text)
        total += len(text)
        if total > max_bytes:
            break
    train, validation = (
        torch.frombuffer(bytearray(b"\n".join(side)), dtype=torch.uint8).long() for side in sides
    )
    return train, validation


def get_batch(
    text: torch.Tensor, batch_size: int, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of ``text``, and the same one byte later: both (batch_size, context)."""
    starts = torch.randint(len(text) - context - 1, (batch_size,), generator=generator).tolist()
    inputs = torch.stack([text[start : start + context] for start in starts])
    targets = torch.stack([text[start + 1 : start + context + 1] for start in starts])
    return inputs, targets
