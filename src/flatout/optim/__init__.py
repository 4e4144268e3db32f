"""Torch's optimizers with steps that take one pass over memory, to be used in one's own code.

Each class is a subclass of the class of the same name in ``torch.optim``, with the same arguments,
behaviour and ``state_dict``, so checkpoints can be exchanged in both directions. In the formulas, g
is the gradient (negated with ``maximize``; plus weight decay times the parameter, unless the weight
decay is decoupled), p is the parameter, t is the step, counted from 1, and every operation is
elementwise.

On a CPU, ``kernels/optimizers.c`` steps float32 parameters. It needs a C compiler at its first use;
without one, torch steps the parameters, and a warning is issued once. Torch also steps everything
else: other dtypes, sparse gradients, gradients laid out unlike their parameters, parameters that
share memory, and optimizers created with ``foreach=True`` or ``fused=True``. On accelerators, the
default is torch's fused step, for the classes that have one.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flatout import kernels
from flatout.optim import functional

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
]


@functools.cache
def _kernel_override() -> functional.Override | None:
    """The override that steps with the kernels; ``None``, with one warning, if they cannot be
    built.

    Raises:
        flatout.kernels.KernelError: the library lacks a function.
    """
    try:
        library = kernels.load("optimizers")
    except kernels.KernelError as error:
        warnings.warn(f"flatout.optim steps as torch.optim does: {error}", stacklevel=4)
        return None
    return functional.Override(functional.OnePass(library), _raise)


def _raise(error: Exception) -> None:
    raise error


class _OnePass(torch.optim.Optimizer):
    """The base class of all optimizers in this module."""

    _form: str
    _torch_step: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = next(c for c in cls.__mro__ if c.__module__.startswith("torch.optim"))
        # Unwrapped, because hooks and the profiler already wrap this class's own step.
        cls._torch_step = inspect.unwrap(base.step)

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        can_fuse = "fused" in inspect.signature(super().__init__).parameters
        if not isinstance(params, torch.Tensor):  # for a single tensor, torch raises its own error
            params = list(params)
            can_fuse = can_fuse and _all_on_accelerator(params)
        if can_fuse and not kwargs.keys() & {"fused", "foreach", "differentiable", "capturable"}:
            kwargs["fused"] = True
        super().__init__(params, *args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what ``closure`` returns, or ``None`` without a closure.

        Args:
            closure: evaluates the model again and returns the loss. It may step other optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            override = None if torch.compiler.is_compiling() else _kernel_override()
            if override is None:
                self._torch_step()
            else:
                with functional.override_context(self._form, override):
                    self._torch_step()
        return loss


def _all_on_accelerator(params: list[Any]) -> bool:
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    tensors = [t for group in groups for t in _as_list(group["params"])]
    return bool(tensors) and all(
        isinstance(t, torch.Tensor)
        and t.device.type in ("cuda", "mps", "xpu")
        and t.is_floating_point()
        for t in tensors
    )


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, torch.Tensor):
        return [params]
    return [p[1] if isinstance(p, tuple) else p for p in params]


class SGD(_OnePass, torch.optim.SGD):
    """Stochastic gradient descent, with momentum and Nesterov momentum.

    m = momentum * m + (1 - dampening) * g (m = g at the first step); p -= lr * m, or, Nesterov,
    p -= lr * (g + momentum * m); without momentum p -= lr * g.

    Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    _form = "sgd"


class Adam(_OnePass, torch.optim.Adam):
    """Adaptive moment estimation.

    m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g^2;
    p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps). With ``amsgrad``, the largest v
    so far is used instead of v.

    The moments start at 0 and are therefore too small at first, by factors of 1 - beta1^t and
    1 - beta2^t. The bias correction divides by these; without it, the first step would be
    (1 - beta1) / sqrt(1 - beta2) times as long, which is 3.2 with the defaults.

    Kingma and Ba, Adam: A method for stochastic optimization, ICLR 2015, arXiv:1412.6980;
    Reddi et al., On the convergence of Adam and beyond, ICLR 2018 (AMSGrad).
    """

    _form = "adam"


class AdamW(_OnePass, torch.optim.AdamW):
    """Adam with decoupled weight decay: p *= 1 - lr * weight_decay before the step.

    Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019, arXiv:1711.05101.
    """

    _form = "adam"


class RMSprop(_OnePass, torch.optim.RMSprop):
    """Steps divided by a running root mean square of the gradients.

    v = alpha * v + (1 - alpha) * g^2; p -= lr * g / (sqrt(v) + eps). Centered: sqrt(v - u^2), with
    u = alpha * u + (1 - alpha) * g. With momentum: m = momentum * m + g / (sqrt(..) + eps);
    p -= lr * m.

    Tieleman and Hinton, Lecture 6.5, COURSERA: Neural networks for machine learning, 2012;
    centered: Graves, Generating sequences with recurrent neural networks, 2013, arXiv:1308.0850.
    """

    _form = "rmsprop"


class Adagrad(_OnePass, torch.optim.Adagrad):
    """Steps divided by the root of the sum of all squared gradients so far.

    s += g^2; p -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps).

    Duchi, Hazan and Singer, Adaptive subgradient methods, JMLR 12, 2011.
    """

    _form = "adagrad"


class Adadelta(_OnePass, torch.optim.Adadelta):
    """Steps that have the unit of the parameter.

    v = rho * v + (1 - rho) * g^2; d = sqrt(u + eps) / sqrt(v + eps) * g;
    u = rho * u + (1 - rho) * d^2; p -= lr * d.

    Zeiler, ADADELTA: An adaptive learning rate method, 2012, arXiv:1212.5701.
    """

    _form = "adadelta"


class Adamax(_OnePass, torch.optim.Adamax):
    """Adam with the infinity norm instead of the second moment.

    m as in Adam; u = max(beta2 * u, abs(g) + eps); p -= lr / (1 - beta1^t) * m / u.

    Kingma and Ba, section 7.1, arXiv:1412.6980.
    """

    _form = "adamax"


class NAdam(_OnePass, torch.optim.NAdam):
    """Adam with Nesterov's momentum.

    m, v as in Adam; mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2); M_t = mu_1 * ... * mu_t;
    p -= lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_t * mu_{t+1}) * m)
    / (sqrt(v / (1 - beta2^t)) + eps).

    Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016.
    """

    _form = "nadam"


class RAdam(_OnePass, torch.optim.RAdam):
    """Rectified Adam, which is not adaptive until the variance of its step size is tractable.

    m, v as in Adam; R = 2 / (1 - beta2) - 1; r_t = R - 2 * t * beta2^t / (1 - beta2^t). While
    r_t <= 5: p -= lr * m / (1 - beta1^t). Then: p -= lr * m / (1 - beta1^t)
    * sqrt(1 - beta2^t) / (sqrt(v) + eps)
    * sqrt((r_t - 4) * (r_t - 2) * R / ((R - 4) * (R - 2) * r_t)).

    Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020,
    arXiv:1908.03265.
    """

    _form = "radam"
