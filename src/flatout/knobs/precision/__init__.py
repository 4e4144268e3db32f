"""Run matmuls and convolutions in lower precision, inside their kernels or by autocast."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo
from flatout.knob import MATMUL_OPERATORS, Card, Facts, Inside, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.knobs.precision.autocast import Autocast

NAME = "precision"

PLAIN_AUTOCAST = ("bf16", "fp16")
"""The settings that keep no operators in float32 beyond those of ``torch.autocast``."""

FASTER = 1.2
"""``fp16`` is offered where float16 is at least this many times as fast as bfloat16 and float32;
otherwise it is not worth its loss scaling."""


def match(facts: Facts) -> Match:
    """Offer the settings unless half precision was measured to be slower than float32.

    Plain autocast is not offered where a loss takes probabilities. It rounds probabilities close to
    1, which shows in the losses only when the model has become confident, and a proof may end long
    before that. On CUDA, autocast itself refuses such a loss
    (https://docs.pytorch.org/docs/stable/amp.html, "Prefer binary_cross_entropy_with_logits").
    """
    rates = facts.matmul_flops_per_s
    float32 = rates.get("float32") or 0.0
    bf16, fp16 = rates.get("bfloat16"), rates.get("float16")
    settings: tuple[str, ...] = ("bf16", "safe", "medium")
    if bf16 is not None and bf16 < float32:
        settings = ()
    if fp16 is not None and fp16 > FASTER * max(bf16 or 0.0, float32):
        settings = ("fp16", *settings)
    why = (
        f"bfloat16 is slower than float32 on this machine ({(bf16 or 0) / 1e9:.3g} GFLOP/s against "
        f"{float32 / 1e9:.3g} GFLOP/s)"
    )
    losses = (name for name in facts.operators or () if "binary_cross_entropy" in name)
    if settings and any("logits" not in name for name in losses):
        settings = tuple(setting for setting in settings if setting not in PLAIN_AUTOCAST)
        why = "its loss takes probabilities, which plain autocast rounds close to 1"
    return Match(settings, None if settings else why, facts.share(*MATMUL_OPERATORS))


def apply(host: Host, setting: str) -> Undo:
    """Run outermost modules under autocast, or let float32 matmuls round their inputs.

    Raises:
        RefusedError: the program has chosen a precision itself, or this torch is too old.
    """
    functions = {
        "medium": _apply_medium,
        "bf16": _apply_bf16,
        "safe": _apply_safe,
        "fp16": _apply_fp16,
    }
    return functions[setting](host)


def _apply_medium(host: Host) -> Undo:
    import torch

    mkldnn: Any = torch.backends.mkldnn
    try:
        before = torch.get_float32_matmul_precision()
        convolutions = mkldnn.conv.fp32_precision
    except (RuntimeError, AttributeError) as error:  # set through the newer, finer switches
        raise RefusedError(f"the precision of float32 matmuls cannot be read: {error}") from error
    if before != "highest" or convolutions not in ("none", "ieee"):
        raise RefusedError("the program has chosen the precision of float32 matmuls")
    handled_calls.counts[NAME] += 1  # counted once: it acts on all matmuls from now on
    matmuls = [(b.matmul, b.matmul.fp32_precision) for b in (mkldnn, torch.backends.cuda)]
    torch.set_float32_matmul_precision("medium")
    mkldnn.conv.fp32_precision = "bf16"

    def undo() -> None:
        if torch.get_float32_matmul_precision() == "medium":  # else the program has set another
            torch.set_float32_matmul_precision(before)
            for backend, precision in matmuls:
                backend.fp32_precision = precision
        if mkldnn.conv.fp32_precision == "bf16":
            mkldnn.conv.fp32_precision = convolutions

    return undo


def _apply_bf16(host: Host) -> Undo:
    import torch

    from flatout.knobs.precision.autocast import PackingAutocast

    autocast = PackingAutocast(host, NAME, torch.bfloat16)
    return _install(host, autocast)


def _apply_safe(host: Host) -> Undo:
    import torch

    from flatout.intercept import device
    from flatout.knobs.precision.autocast import SafeAutocast
    from flatout.knobs.precision.operators import Float32Operators

    accelerator = device.accelerator()
    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"torch {torch.__version__} has no torch.library.get_kernel")
    operators = Float32Operators(
        "cpu" if accelerator is None else accelerator.type,
        host.applied.on_failure_of(NAME),
    )
    autocast = SafeAutocast(host, NAME, torch.bfloat16, operators)
    return _install(host, autocast)


def _apply_fp16(host: Host) -> Undo:
    import torch

    from flatout.knobs.precision.autocast import ScaledAutocast
    from flatout.knobs.precision.scaling import LossScaling

    scaling = LossScaling(host, NAME)
    autocast = ScaledAutocast(host, NAME, torch.float16, scaling)
    with contextlib.ExitStack() as undo:
        undo.callback(scaling.install())
        undo.callback(_install(host, autocast))
        return undo.pop_all().close


def inside(host: Host, setting: str) -> Inside:
    """Make single calls as the setting makes them inside an outermost module that it does not leave
    alone. The float32 operators of modules whose tensors are observed, and loss scaling, are not
    part of it.

    Raises:
        RefusedError: see ``apply``.
    """
    import torch

    from flatout.intercept import device
    from flatout.knobs.precision.autocast import in_float32
    from flatout.knobs.precision.operators import Float32Operators

    if setting == "medium":
        return Inside(undo=_apply_medium(host), is_everywhere=True)
    accelerator = device.accelerator_in_use()
    kind = "cpu" if accelerator is None else accelerator.type
    dtype = torch.float16 if setting == "fp16" else torch.bfloat16
    operators: Float32Operators | None = None
    if setting == "safe":
        if not hasattr(torch.library, "get_kernel"):
            raise RefusedError(f"torch {torch.__version__} has no torch.library.get_kernel")
        operators = Float32Operators(kind, host.applied.on_failure_of(NAME))

    def context(weight: Any) -> torch.autocast:
        if operators is not None and weight is not None:
            operators.add_head((id(weight), weight.shape))
        return torch.autocast(kind, dtype)

    def leave(outputs: Any) -> Any:
        return outputs if torch.is_autocast_enabled(kind) else in_float32(outputs)

    undo = (lambda: None) if operators is None else operators.remove
    return Inside(undo, context, leave=leave)


def _install(host: Host, autocast: Autocast) -> Undo:
    """Wrap the outermost modules in an autocast."""
    with contextlib.ExitStack() as undo:
        undo.callback(autocast.close)
        undo.callback(host.forward_wrappers.append(autocast))
        return undo.pop_all().close


KNOB = Knob(
    name=NAME,
    summary="run matmuls and convolutions in lower precision: TF32, bfloat16 or float16",
    settings=("medium", "safe", "bf16", "fp16"),
    exactness=dict.fromkeys(("medium", "safe", "bf16", "fp16"), "reduced"),
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob runs matmuls and convolutions in lower precision: TF32, bfloat16 or "
        "float16. Parameters, gradients and optimizer state stay in float32 under all "
        "settings.\n\n"
        "`medium`: all tensors stay in float32. The kernels of matmuls and convolutions "
        "round their inputs to bfloat16 (on CUDA to TF32) if they support that. This "
        "holds in training and evaluation, until the program sets a precision itself.\n\n"
        "`bf16`: each outermost module call runs under `torch.autocast` in bfloat16 if it "
        "records gradients, or if the program only infers. Its outputs are cast back to "
        "float32, so losses outside the module are computed as before.\n\n"
        "The 1st, 8th, 64th, ... pass of each module runs in float32, and flatout "
        "inspects its tensors. If half-precision tensors would reach hooks, custom autograd "
        "functions or NumPy, or be kept in attributes or lists, flatout replaces autocast "
        "for that module: each matmul casts its own inputs and returns float32. This is "
        "slower, but the program sees the same dtypes as without the knob.\n\n"
        "`bf16` does not change (a) evaluation passes of programs that train, (b) "
        "programs that use autocast themselves, (c) modules that are being traced or "
        "exported, and (d) modules that an activation checkpoint calls directly.\n\n"
        "On the CPU, if a program only infers, flatout keeps a copy of the weights of its "
        "linear layers, packed in bfloat16 for oneDNN. The packed copy takes additional "
        "memory, half the size of these weights, and needs a C compiler. Before each use, "
        "flatout checks a fingerprint of the weight, and packs it again if it has changed.\n\n"
        "`safe`: as `bf16`, but operators that are known to lose accuracy run in float32: "
        "sigmoid, softmax, logarithms, powers and norms (batch norm computes its "
        "statistics in float32 in any case), and the last matmul or convolution of each "
        "outermost module. That last one stays in half precision only if the module returns "
        "the result of a tanh, as image generators do.\n\n"
        "`fp16`: autocast to float16 with the loss scaling of `torch.amp.GradScaler`, for "
        "devices on which float16 is faster than bfloat16. Gradients are divided by the "
        "scale before they are accumulated, so parameter hooks, clipping and accumulation "
        "see unscaled gradients. A step whose gradients are not finite is skipped. "
        "Flatout turns the knob off if the program observes scaled gradients during "
        "backward: by hooks on non-parameter tensors or modules, or in custom autograd "
        "functions.",
        helps="The knob helps programs in which matmuls and convolutions dominate, on devices "
        "that compute them faster in bfloat16 than in float32 (AMX, AVX512-BF16, tensor "
        "cores).",
        hurts="`bf16` harms programs that compute a probability inside the module (Sigmoid "
        "before `BCELoss`), because the probability rounds to exactly 1, which ruins the "
        "training. `safe` keeps it in float32, and is the only autocast setting that "
        "`flatout tune` tries with that loss. `fp16` cannot represent values above 65504. "
        "With small shapes, the casts of all settings take longer than they save.",
        by_hand='Set `torch.set_float32_matmul_precision("medium")` and '
        '`torch.backends.mkldnn.conv.fp32_precision = "bf16"`; or use `with '
        "torch.autocast(device_type, torch.bfloat16): output = model(input)`, and compute "
        "the loss outside, from `output.float()`. For float16, add `torch.amp.GradScaler`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/amp.html",
            "https://docs.pytorch.org/docs/stable/notes/mkldnn.html",
            "https://arxiv.org/abs/1710.03740 (loss scaling)",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    hides_gains=True,
    claims=("autocast",),
    kernels=("fingerprint",),
    replaces=MATMUL_OPERATORS,
    inside=inside,
)
