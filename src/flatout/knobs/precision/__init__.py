"""Lower precision of matrix products and convolutions: inside their kernels, or by autocast."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.patch import Undo
from flatout.knob import PRODUCTS, Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.knobs.precision.autocast import Autocast

NAME = "precision"

PLAIN_AUTOCAST = ("bf16", "fp16")

FASTER = 1.2
"""How many times the rate of bfloat16 that of float16 must be for loss scaling to be worth it."""


def match(facts: Facts) -> Match:
    """Refuses only where half precision was measured to be slower than float32.

    Where a loss is made of probabilities, plain autocast is not offered: it rounds those next to 1,
    which shows in the losses when the model has become sure of itself, long after a proof may have
    ended. On CUDA, autocast refuses such a loss itself
    (https://docs.pytorch.org/docs/stable/amp.html, "Prefer binary_cross_entropy_with_logits").
    """
    rates = facts.matmul_flops_per_s
    float32 = rates.get("float32") or 0.0
    bf16, fp16 = rates.get("bfloat16"), rates.get("float16")
    settings: tuple[str, ...] = ("bf16", "safe", "medium")
    if bf16 is not None and bf16 < float32:
        settings = ()
    if fp16 is not None and fp16 > FASTER * max(bf16 or 0.0, float32):
        settings += ("fp16",)
    why = (
        f"this machine multiplies bfloat16 matrices at {(bf16 or 0) / 1e9:.3g} GFLOP/s, float32 at "
        f"{float32 / 1e9:.3g} GFLOP/s"
    )
    losses = (name for name in facts.operators or () if "binary_cross_entropy" in name)
    if settings and any("logits" not in name for name in losses):
        settings = tuple(setting for setting in settings if setting not in PLAIN_AUTOCAST)
        why = "its loss is made of probabilities, which plain autocast rounds next to 1"
    return Match(settings, None if settings else why, facts.share(*PRODUCTS))


def apply(host: Host, setting: str) -> Undo:
    """Turn autocast on around the outermost modules, or let float32 products round inside."""
    return {"medium": _medium, "bf16": _bf16, "safe": _safe, "fp16": _fp16}[setting](host)


def _medium(host: Host) -> Undo:
    import torch

    mkldnn: Any = torch.backends.mkldnn
    try:
        before = torch.get_float32_matmul_precision()
        convolutions = mkldnn.conv.fp32_precision
    except (RuntimeError, AttributeError) as error:  # set through the newer, finer switches
        raise RefusedError(f"the precision of float32 products cannot be read: {error}") from error
    if before != "highest" or convolutions not in ("none", "ieee"):
        raise RefusedError("the program has chosen the precision of float32 products")
    engagement.calls[NAME] += 1  # of all products from now on
    torch.set_float32_matmul_precision("medium")
    mkldnn.conv.fp32_precision = "bf16"

    def undo() -> None:
        torch.set_float32_matmul_precision(before)
        mkldnn.conv.fp32_precision = convolutions

    return undo


def _bf16(host: Host) -> Undo:
    import torch

    from flatout.knobs.precision.autocast import PackingAutocast

    autocast = PackingAutocast(host, NAME, torch.bfloat16)
    return _installed(host, autocast)


def _safe(host: Host) -> Undo:
    import torch

    from flatout.intercept import device
    from flatout.knobs.precision.autocast import SafeAutocast
    from flatout.knobs.precision.operators import Float32Operators

    accelerator = device.accelerator()
    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"torch {torch.__version__} cannot hand its kernels over")
    operators = Float32Operators(
        "cpu" if accelerator is None else accelerator.type,
        host.applied.on_failure_of(NAME),
    )
    autocast = SafeAutocast(host, NAME, torch.bfloat16, operators)
    return _installed(host, autocast)


def _fp16(host: Host) -> Undo:
    import torch

    from flatout.knobs.precision.autocast import ScaledAutocast
    from flatout.knobs.precision.scaling import LossScaling

    scaling = LossScaling(host, NAME)
    autocast = ScaledAutocast(host, NAME, torch.float16, scaling)
    with contextlib.ExitStack() as undo:
        undo.callback(scaling.install())
        undo.callback(_installed(host, autocast))
        return undo.pop_all().close


def _installed(host: Host, autocast: Autocast) -> Undo:
    """An autocast around the outermost modules."""
    with contextlib.ExitStack() as undo:
        undo.callback(autocast.close)
        undo.callback(host.forward_wrappers.append(autocast))
        return undo.pop_all().close


KNOB = Knob(
    name=NAME,
    summary="matrix products and convolutions in half precision",
    settings=("medium", "safe", "bf16", "fp16"),
    exactness=dict.fromkeys(("medium", "safe", "bf16", "fp16"), "reduced"),
    hides_gains=True,
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="`medium`: tensors stay in float32, and the factors of matrix products and "
        "convolutions are rounded to bfloat16 (on CUDA to TF32) inside the kernels that can do "
        "so, in training and evaluation, until the program sets a precision itself.\n\n"
        "`bf16`: each outermost module call that records gradients runs under `torch.autocast`, "
        "and so does each call of a program that only infers; "
        "what it returns comes back in float32, so losses outside the module are computed as "
        "before. Parameters, gradients and optimizer state stay in float32. The first pass of each "
        "module, and its 8th, 64th and so on, is in float32 and looked at: if anything but torch's "
        "own operators would meet half precision (hooks, attributes and lists in which tensors are "
        "kept, custom autograd functions, NumPy), its products round what they are given and "
        "return float32, which is slower and shows the program the types that it has without. "
        "Evaluation passes, programs that use autocast themselves, what is traced or exported, and "
        "modules that are checkpointed outside of any other's forward, are left as they are. On "
        "the CPU, a "
        "program that only infers keeps copies of the weights of its linear layers, in bfloat16 "
        "and in the order that oneDNN wants them in, which takes half of these weights' memory "
        "again, and a C compiler; before each use a weight's memory is looked at, and if it has "
        "changed, it is packed again.\n\n"
        "`safe`: the same, but what is known to suffer runs in float32: sigmoid, softmax, "
        "logarithms, powers and norms (batch norm takes its statistics in float32 anyway), and "
        "the last matrix product or convolution of each outermost module, unless its hyperbolic "
        "tangent is what the module returns, as of those that make images.\n\n"
        "`fp16`: autocast to float16 with the loss scaling of `torch.amp.GradScaler`, for devices "
        "that multiply float16 faster than bfloat16. Gradients are divided by the scale before "
        "they are added to anything, so hooks of parameters, clipping and accumulation see what "
        "they would see without; a step whose gradients are not finite is left out. It is turned "
        "back where the program looks at gradients on their way: hooks of other tensors and of "
        "modules, autograd functions of its own.",
        helps="Matrix products and convolutions dominate, and the device multiplies bfloat16 "
        "faster than float32 (AMX, AVX512-BF16, tensor cores).",
        hurts="`bf16`: a probability computed inside the module (Sigmoid before `BCELoss`) rounds "
        "to exactly 1, which destroys the training; `safe` keeps it, and is tried alone where "
        "that loss is used. Small shapes, where the casts "
        "cost more than they save. `fp16`: values beyond 65504.",
        by_hand='`torch.set_float32_matmul_precision("medium")` and '
        '`torch.backends.mkldnn.conv.fp32_precision = "bf16"`; or '
        "`with torch.autocast(device_type, torch.bfloat16): output = model(input)`, and "
        "the loss outside, on `output.float()`; for float16 with `torch.amp.GradScaler`",
        sources=(
            "https://docs.pytorch.org/docs/stable/amp.html",
            "https://docs.pytorch.org/docs/stable/notes/mkldnn.html",
            "https://arxiv.org/abs/1710.03740 (loss scaling)",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("autocast",),
    kernels=("fingerprint",),
)
