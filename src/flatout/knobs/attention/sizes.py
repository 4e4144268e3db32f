"""Which attention a kernel takes: known to the controller, so without torch."""

from __future__ import annotations

MOST_WIDTH, MOST_TRAINED, MOST_COLUMNS = 128, 512, 2048
"""Of a head that the kernel takes as a whole: width of a row, rows and columns in training, columns
in inference. Up to these it was faster than torch's attention and than our own blocks, with about
a megabyte of cache a core (``benchmarks/kernels.py attention``)."""
