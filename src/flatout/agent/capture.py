"""Whether a CUDA graph is being captured."""

from __future__ import annotations


def is_capturing() -> bool:
    """Whether what is queued now is recorded into a CUDA graph instead of computed.

    Nothing of ours belongs into the program's graphs, and nothing that is recorded can be read
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """
    import torch

    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
