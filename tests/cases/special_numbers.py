"""Functions of single elements, at their limits: zeros, what overflows, what is not finite."""
# flatout run --set elementwise=fast

import math

import torch
from torch.nn import functional as F

COUNT = 40_000
VALUES = (
    *(0.0, -0.0, 1e-45, -1e-39, 1e12, -1e12, 1e14, -1e14, 1e19, -1e19, 1e20, -1e20),
    *(3e38, -3e38, math.inf, -math.inf, math.nan),
)

for dtype in (torch.float32, torch.bfloat16):
    for value in VALUES:
        x = torch.full((COUNT,), value, dtype=dtype, requires_grad=True)
        gelu, tanh = F.gelu(x, approximate="tanh"), torch.tanh(x)
        (slope,) = torch.autograd.grad(gelu.sum(), x)
        print(dtype, value, *(f"{made[-1].item():.3g}" for made in (gelu, slope, tanh)))

for real in VALUES:
    for imaginary in (0.0, 1.0, math.inf, math.nan):
        z = torch.complex(torch.full((COUNT,), real), torch.full((COUNT,), imaginary))
        print(real, imaginary, f"{z.abs()[-1].item():.3g}")
