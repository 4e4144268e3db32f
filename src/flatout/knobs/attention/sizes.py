"""Sizes of the heads that the kernel computes as a whole; the controller needs them without
torch."""

from __future__ import annotations

MOST_WIDTH, MOST_TRAINED, MOST_COLUMNS = 128, 512, 2048
"""The largest heads that the kernel computes as a whole: elements of a row, rows and columns in
training, columns in inference. Up to these sizes it was faster than torch's attention and than
computing block by block, with about 1 MiB of cache per core (``benchmarks/kernels.py
attention``)."""
