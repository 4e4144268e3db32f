"""Flatout's kernels against torch's own operators, interleaved.

    python benchmarks/kernels.py                      # all parts
    python benchmarks/kernels.py optimizers --pairs 10

Both take turns in blocks of calls, each block after two calls that are not timed; a ratio is the
geometric mean over pairs of blocks, with its 95 % interval (t, over the logarithms). Exits with 1
when a ratio lies below what is asked of it. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from torch.nn.utils import clip_grad

from flatout import kernels
from flatout.intercept import dispatch
from flatout.intercept.patch import Undo, replace_function
from flatout.knobs import clipping
from flatout.knobs.attention import cpu
from flatout.knobs.convolution import cpu as convolutions
from flatout.knobs.cross_entropy import cpu as losses
from flatout.knobs.elementwise import cpu as elementwise
from flatout.knobs.embedding import cpu as embeddings
from flatout.knobs.memory_format import gradients
from flatout.knobs.random import cpu as random
from flatout.optim import functional

BLOCK_S = 0.05
"""Length of a block of torch's calls, about."""


class Ratio(NamedTuple):
    """How many times faster, with its 95 % interval over pairs of blocks."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def interleaved(
    call: Callable[[], object], switched: Callable[[], AbstractContextManager[None]], pairs: int
) -> tuple[float, float, Ratio]:
    """Microseconds of a call bare and switched (medians), and their ratio."""

    count = max(1, math.ceil(BLOCK_S * 1e6 / block_us(call, 3)))
    bare, fast = [], []
    for pair in range(pairs):
        for on in (False, True) if pair % 2 else (True, False):
            if on:
                with switched():
                    fast.append(block_us(call, count))
            else:
                bare.append(block_us(call, count))
    ratios = [slow / quick for slow, quick in zip(bare, fast, strict=True)]
    return float(np.median(bare)), float(np.median(fast)), ratio_of(ratios)


def block_us(call: Callable[[], object], count: int) -> float:
    """Microseconds of a call, of ``count`` after two that are not timed."""
    call(), call()
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / count / 1e3


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Geometric mean, with its 95 % interval."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(ratios) - 1) * stats.sem(logs)
    value, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    return Ratio(float(value), float(low), float(high), len(ratios))


def switched_on(make: Callable[[], Undo]) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a knob is on."""

    @contextmanager
    def on() -> Iterator[None]:
        undo = make()
        yield
        undo()

    return on


def bernoulli(pairs: int) -> bool:
    """``Tensor.bernoulli_`` against the parallel generator; returns whether all is as asked."""
    library = kernels.load("bernoulli")
    fast = switched_on(lambda: random.install(library, paired=False, on_failure=_raise))
    is_as_asked = True
    for dtype in (torch.float32, torch.bfloat16):
        for power in (4, 5, 6, 7):
            tensor = torch.empty(10**power, dtype=dtype)
            asked = 15 if power >= 6 else 1
            name = f"bernoulli_ of 1e{power} {str(dtype)[6:]}"
            call = functools.partial(tensor.bernoulli_, 0.8)
            is_as_asked &= compared(name, call, fast, pairs, asked)
    return is_as_asked


def dropout(pairs: int) -> bool:
    """Forward and backward, against torch's own."""
    library = kernels.load("bernoulli")
    fast = switched_on(lambda: random.install(library, paired=False, on_failure=_raise))
    is_as_asked = True
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(512, 1024).to(dtype).requires_grad_()
        gradient = torch.randn(512, 1024).to(dtype)

        def both(inputs: torch.Tensor = inputs, gradient: torch.Tensor = gradient) -> None:
            torch.autograd.grad(F.dropout(inputs, 0.1), inputs, gradient)

        is_as_asked &= compared(f"dropout of 512 x 1024 {str(dtype)[6:]}", both, fast, pairs, 3.0)
    return is_as_asked


def cross_entropy(pairs: int) -> bool:
    """Forward and backward over many classes, against torch's own."""
    library = kernels.load("cross_entropy")
    fast = switched_on(lambda: losses.install(library, _raise))
    is_as_asked = True
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(512, 8000).to(dtype).requires_grad_()
        targets = torch.randint(8000, (512,))

        def both(logits: torch.Tensor = logits, targets: torch.Tensor = targets) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=logits.dtype is torch.bfloat16):
                loss = F.cross_entropy(logits, targets)
            torch.autograd.grad(loss, logits)

        name = f"cross entropy of 512 x 8000 {str(dtype)[6:]}"
        is_as_asked &= compared(name, both, fast, pairs, 1.5)
    return is_as_asked


def attention(pairs: int) -> bool:
    """Attention with and without dropout, causal or padded, against torch's own."""
    library = kernels.load("attention")
    fast = switched_on(lambda: cpu.install(library, is_paired=False, on_failure=_raise))
    is_as_asked = True
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (64, 256, 512):
            inputs = [torch.randn(8, 6, rows, 64).to(dtype).requires_grad_() for _ in range(3)]
            gradient = torch.randn(8, 6, rows, 64).to(dtype)
            padding = torch.arange(rows) < torch.randint(rows // 4, rows + 1, (8, 1, 1, 1))

            def infer(options: dict[str, Any], inputs: list[torch.Tensor] = inputs) -> torch.Tensor:
                return F.scaled_dot_product_attention(*inputs, **options)

            def train(
                options: dict[str, Any],
                inputs: list[torch.Tensor] = inputs,
                gradient: torch.Tensor = gradient,
            ) -> None:
                torch.autograd.grad(infer(options, inputs), inputs, gradient)

            kinds: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
                "dropout, causal, forward and backward": (
                    train,
                    {"dropout_p": 0.2, "is_causal": True},
                ),
                "causal, forward and backward": (train, {"is_causal": True}),
                "padded, forward and backward": (train, {"attn_mask": padding}),
                "padded, forward": (torch.no_grad()(infer), {"attn_mask": padding}),
            }
            for kind, (call, options) in kinds.items():
                name = f"attention, {kind}, 8 x 6 x {rows} x 64 {str(dtype)[6:]}"
                call = functools.partial(call, options)
                is_as_asked &= compared(name, call, fast, pairs, 1.1)
    return is_as_asked


def optimizers(pairs: int) -> bool:
    """Steps against torch's own, and against a copy of memory in bytes moved per second."""
    is_as_asked = True
    override = functional.Override(functional.OnePass(kernels.load("optimizers")), _raise)

    @contextmanager
    def one_pass() -> Iterator[None]:
        undo, _ = functional.override_all(override)
        try:
            yield
        finally:
            undo()

    for name, (options, floats) in OPTIMIZERS.items():
        for shapes in ([1000] * 200, [10**6], [10**8]):
            params = [torch.nn.Parameter(torch.ones(size)) for size in shapes]
            for param in params:
                param.grad = torch.full_like(param, 0.01)
            optimizer = getattr(torch.optim, name)(params, **options)
            optimizer.step()
            described = f"{name} of {len(shapes)} x {shapes[0]:.0e}"
            is_as_asked &= compared(described, optimizer.step, one_pass, pairs, 1)
            if len(shapes) == 1:
                source, target = torch.ones(shapes[0]), torch.ones(shapes[0])
                asked = 0.8 if shapes[0] == 10**8 else 0.0
                with one_pass():
                    share = bandwidth_share(
                        functools.partial(target.copy_, source), optimizer.step, floats, pairs
                    )
                print(f"    bandwidth, as a share of a copy's: {share}; asked: {asked}")
                is_as_asked &= share.low >= asked
            del params, optimizer
    return is_as_asked


OPTIMIZERS: dict[str, tuple[dict[str, Any], int]] = {
    "SGD": ({"momentum": 0.9}, 5),
    "Adam": ({}, 7),
    "AdamW": ({"amsgrad": True}, 9),
    "RMSprop": ({"momentum": 0.9, "centered": True}, 9),
    "Adagrad": ({}, 5),
    "Adadelta": ({}, 7),
    "Adamax": ({}, 7),
    "NAdam": ({}, 7),
    "RAdam": ({}, 7),
}
"""Options, and how many numbers are read and written for each parameter."""


def bandwidth_share(
    copy: Callable[[], object], step: Callable[[], object], floats: int, pairs: int
) -> Ratio:
    """Bytes per second of a step over those of a copy, which reads one number and writes one."""
    ratios = []
    for pair in range(pairs):
        first, second = (copy, step) if pair % 2 else (step, copy)
        times = {first: block_us(first, 3), second: block_us(second, 3)}
        ratios.append(floats / 2 * times[copy] / times[step])
    return ratio_of(ratios)


def compared(
    name: str,
    call: Callable[[], object],
    on: Callable[[], AbstractContextManager[None]],
    pairs: int,
    asked: float,
) -> bool:
    """Print how much faster ``call`` is when a knob is on; returns whether that is as asked."""
    bare_us, on_us, ratio = interleaved(call, on, pairs)
    print(f"{name}: {bare_us:.4g} us, {on_us:.4g} us, {ratio}; asked: {asked}x", flush=True)
    return ratio.low >= asked


def _raise(error: Exception) -> None:
    raise error


def fastpath(pairs: int) -> bool:
    """Inference of a padded batch by transformer layers, with their fast path and without."""
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tokens, lengths = torch.randn(16, 200, 256), torch.randint(40, 201, (16, 1))
    padding = torch.arange(200) >= lengths

    @contextmanager
    def off() -> Iterator[None]:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
        torch.backends.mha.set_fastpath_enabled(True)

    def call() -> None:
        with torch.no_grad():
            encoder(tokens, src_key_padding_mask=padding)

    return compared("2 transformer layers, 16 x 200 x 256, padded", call, off, pairs, 1.0)


def clip(pairs: int) -> bool:
    """Clipping by the norm, of which nothing comes and of which something does."""
    library = kernels.load("clipping")
    is_as_asked = True

    @contextmanager
    def on() -> Iterator[None]:
        stand_in = clipping.OnePass(library, clip_grad, _raise)
        give_back = [
            replace_function(clip_grad, "_get_total_norm", stand_in.total_norm),
            replace_function(clip_grad, "_clip_grads_with_norm_", stand_in.clip),
        ]
        yield
        for undo in give_back:
            undo()

    for shapes in ([1000] * 200, [10**5] * 50, [10**7]):
        params = [torch.nn.Parameter(torch.ones(size)) for size in shapes]
        for param in params:
            param.grad = torch.full_like(param, 0.01)
        for limit in (1e9, 1e-3):
            name = f"clipping of {len(shapes)} x {shapes[0]:.0e} to {limit:g}"
            call = functools.partial(clip_grad.clip_grad_norm_, params, limit)
            is_as_asked &= compared(name, call, on, pairs, 1.0)
    return is_as_asked


def layouts(pairs: int) -> bool:
    """Gradients in rows for activations with their channels side by side."""
    fast = switched_on(lambda: gradients.convert_gradients(_raise))
    operators = torch.ops.aten
    is_as_asked = True
    for dtype in (torch.float32, torch.bfloat16):
        gradient, activations = torch.randn(2, 64, 64, 14, 14).to(dtype)
        activations = activations.contiguous(memory_format=torch.channels_last)
        ones, zeros = torch.ones(64), torch.zeros(64)
        statistics = (ones, zeros, ones, zeros, ones, True, 1e-5, [True] * 3)
        calls = {
            "ReLU": lambda g=gradient, a=activations: operators.threshold_backward(g, a, 0),
            "SiLU": lambda g=gradient, a=activations: operators.silu_backward(g, a),
            "GELU": lambda g=gradient, a=activations: operators.gelu_backward(g, a),
            "batch norm": lambda g=gradient, a=activations, s=statistics: (
                operators.native_batch_norm_backward(g, a, *s)
            ),
        }
        for name, call in calls.items():
            described = f"gradient of {name}, 64 x 64 x 14 x 14 {str(dtype)[6:]}"
            is_as_asked &= compared(described, call, fast, pairs, 2.0)
    return is_as_asked


def convolution(pairs: int) -> bool:
    """Convolutions of the kinds that ``convolution=recast`` knows, forward and backward."""
    fast = switched_on(lambda: convolutions.install(_raise))
    kinds = {
        "transposed, images of 1 x 1": (torch.nn.ConvTranspose2d(64, 256, 7), (64, 64, 1, 1), 2.0),
        "transposed, to 1 channel": (torch.nn.ConvTranspose2d(64, 1, 4, 2, 1), (64, 64, 14, 14), 1),
        "kernel as large as images": (torch.nn.Conv2d(256, 1, 7), (64, 256, 7, 7), 1.0),
        "of 1 channel, stride 2": (torch.nn.Conv2d(1, 64, 4, 2, 1), (64, 1, 28, 28), 1.0),
    }
    is_as_asked = True
    for dtype in (torch.float32, torch.bfloat16):
        for name, (module, shape, asked) in kinds.items():
            module = module.to(dtype)
            images = torch.randn(shape).to(dtype).requires_grad_()
            gradient = torch.ones_like(module(images))
            is_as_asked &= compared(
                f"convolution {name}, {str(dtype)[6:]}",
                lambda m=module, x=images, g=gradient: m(x).backward(g),
                fast,
                pairs,
                asked,
            )
    return is_as_asked


def elements(pairs: int) -> bool:
    """Functions of single elements."""
    library = dispatch.load_kernel("elementwise", "torch's own operators")
    fast = switched_on(lambda: elementwise.install(library, _raise))
    operators = torch.ops.aten
    spectrum = torch.randn(32, 65, 200, dtype=torch.complex64)
    is_as_asked = compared("abs, 416,000 complex", spectrum.abs, fast, pairs, 3.0)
    for dtype in (torch.float32, torch.bfloat16):
        gradient, x = torch.randn(2, 2048, 1024).to(dtype)
        calls = {
            "tanh": lambda x=x: torch.tanh(x),
            "GELU by tanh": lambda x=x: F.gelu(x, approximate="tanh"),
            "gradient of GELU by tanh": lambda g=gradient, x=x: operators.gelu_backward(
                g, x, approximate="tanh"
            ),
        }
        for name, call in calls.items():
            described = f"{name}, 2048 x 1024 {str(dtype)[6:]}"
            is_as_asked &= compared(described, call, fast, pairs, 1.5)
    return is_as_asked


def embedding(pairs: int) -> bool:
    """Gradients of tables, of which a batch looks up little."""
    library = dispatch.load_kernel("embedding", "torch's own gradients of embedding bags")
    fast = switched_on(lambda: embeddings.install(library, _raise))
    lengths = torch.randint(1, 41, (256,))
    is_as_asked = True
    for rows, width, asked in ((20_000, 32, 3.0), (100_000, 32, 1.5), (100_000, 128, 0.9)):
        table = torch.randn(rows, width, requires_grad=True)
        looked_up = (rows * torch.rand(int(lengths.sum())) ** 3).long()
        bags = F.embedding_bag(looked_up, table, lengths.cumsum(0) - lengths, mode="mean")
        is_as_asked &= compared(
            f"gradient of embedding bags, {rows} x {width}, {len(looked_up)} lookups",
            functools.partial(
                torch.autograd.grad, bags, table, torch.ones_like(bags), retain_graph=True
            ),
            fast,
            pairs,
            asked,  # of a large table, fresh memory takes most
        )
    return is_as_asked


PARTS = {
    "bernoulli": bernoulli,
    "dropout": dropout,
    "cross_entropy": cross_entropy,
    "attention": attention,
    "fastpath": fastpath,
    "clipping": clip,
    "layouts": layouts,
    "convolution": convolution,
    "elementwise": elements,
    "embedding": embedding,
    "optimizers": optimizers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    results = [PARTS[name](arguments.pairs) for name in arguments.parts or PARTS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
