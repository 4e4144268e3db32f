"""Run convolutions on images in channels_last memory format, for which kernels are faster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flatout.intercept import handled_calls
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Inside, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host

NAME = "memory_format"


def match(facts: Facts) -> Match:
    """Offer the setting where a step contains convolutions."""
    if facts.lack("convolution"):
        return Match((), "there are no convolutions in a step")
    return Match(("channels_last",))


def apply(host: Host, setting: str) -> Undo:
    """Convert the inputs of convolutions, from the next outermost module call on."""
    import torch
    from torch import nn
    from torch.utils import checkpoint

    from flatout.intercept.patch import wrap_function
    from flatout.knobs.memory_format.gradients import convert_gradients

    wrapper = ChannelsLast(host)
    on_failure = host.applied.on_failure_of(NAME)
    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (nn.Conv2d, "_conv_forward", wrapper.convolve),
        (nn.ConvTranspose2d, "forward", wrapper.convolve),
        (checkpoint, _checkpoint_generator_name(checkpoint), wrapper.checkpoint),
        (checkpoint.CheckpointFunction, "forward", wrapper.reentrant_checkpoint),
    )
    with contextlib.ExitStack() as undo:
        if hasattr(torch.library, "get_kernel"):
            undo.callback(convert_gradients(on_failure))
        undo.callback(host.forward_wrappers.append(wrapper))
        for owner, name, function in replacements:
            undo.callback(wrap_function(owner, name, on_failure, function))
        return undo.pop_all().close


def inside(host: Host, setting: str) -> Inside:
    """Make single calls as the setting makes them inside an outermost module that it does not leave
    alone."""
    import torch

    from flatout.knobs.memory_format.gradients import convert_gradients

    convolutions = (torch.conv2d, torch.conv_transpose2d)

    def convert(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        groups = args[6] if len(args) > 6 else 1  # the seventh argument of both functions
        if function in convolutions and args and args[0].dim() == 4 and groups == 1:
            return (channels_last(args[0]), *args[1:])
        return args

    undo: Undo = lambda: None  # noqa: E731
    if hasattr(torch.library, "get_kernel"):
        undo = convert_gradients(host.applied.on_failure_of(NAME))
    return Inside(undo, convert=convert, leave=make_contiguous)


def _checkpoint_generator_name(checkpoint: ModuleType) -> str:
    """The name of torch's function that is given the function of a non-reentrant checkpoint."""
    name = "_checkpoint_without_reentrant_generator"
    name_in_2_14 = f"{name}_impl"  # there, the function ``name`` calls this one
    return name_in_2_14 if hasattr(checkpoint, name_in_2_14) else name


class ChannelsLast:
    """A forward wrapper inside of which convolutions have channels_last inputs and outputs.

    Parameters keep their memory format, so neither optimizers nor checkpoints ever see another one:
    for a convolution, torch uses the memory format of its input.

    Args:
        host: the process that is tuned.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._suitable: WeakIdentityDict[Any, bool] = WeakIdentityDict()
        self._is_converting = False
        self._is_kept_off = False

    def convolve(
        self,
        original: Callable[..., Any],
        module: Any,
        input: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Replaces a method of convolutions, and converts its input.

        Args:
            original: torch's method.
            module: the convolution.
            input: batch x channels x height x width.
            args, kwargs: the other arguments of the method.
        """
        import torch

        is_converting = self._is_converting and not torch.compiler.is_compiling()
        if is_converting and module.groups == 1 and input.dim() == 4:
            handled_calls.counts[NAME] += 1
            input = channels_last(input)
        return original(module, input, *args, **kwargs)

    def checkpoint(
        self, original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces torch's function for non-reentrant activation checkpoints.

        A checkpoint is recomputed in backward, outside of this wrapper. Its tensors must match
        those of the first pass, and it draws the same random numbers. So both passes convert, or do
        not convert, as was the case when the checkpoint began.
        """
        recompute = functools.partial(self._run, self._is_converting, function)
        return self._run_first(self._is_converting, original(recompute, *args, **kwargs))

    def reentrant_checkpoint(
        self, original: Callable[..., Any], ctx: Any, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Replaces the forward pass of torch's reentrant activation checkpoints."""
        return original(ctx, functools.partial(self._run, self._is_converting, function), *args)

    def _run_first(
        self, is_converting: bool, passes: Generator[Any, Any, Any]
    ) -> Generator[Any, Any, Any]:
        before, self._is_kept_off = self._is_kept_off, not is_converting
        try:
            return (yield from passes)
        finally:
            self._is_kept_off = before

    def _run(
        self, is_converting: bool, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        before = self._is_converting, self._is_kept_off
        self._is_converting, self._is_kept_off = is_converting, not is_converting
        try:
            return function(*args, **kwargs)
        finally:
            self._is_converting, self._is_kept_off = before

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an outermost module call, converting the inputs of its convolutions."""
        is_decided = self._is_converting or self._is_kept_off
        if is_decided or NAME in self._host.applied.failures or not self._is_suitable(module):
            return call(module, *args, **kwargs)
        self._is_converting = True
        try:
            with self._host.applied.withdraw_on_torch_error(NAME):
                output = call(module, *args, **kwargs)
        finally:
            self._is_converting = False
        return make_contiguous(output)

    def _is_suitable(self, module: Any) -> bool:
        """Whether more than half of a module's two-dimensional convolutions are not grouped."""
        if module not in self._suitable:
            from torch import nn

            from flatout.intercept import objects

            kinds = (nn.Conv2d, nn.ConvTranspose2d)
            convolutions = [m for m in objects.modules(module) if issubclass(type(m), kinds)]
            ungrouped = sum(convolution.groups == 1 for convolution in convolutions)
            self._suitable[module] = ungrouped > len(convolutions) / 2
            if not self._suitable[module]:
                why = "grouped convolutions" if convolutions else "no two-dimensional convolutions"
                name = objects.class_name(module)
                self._host.events.add("skipped", NAME, f"{name} is left alone: it has {why}")
        return self._suitable[module]


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """The images in channels_last memory format; ``images`` itself if they have it already."""
    import torch

    batch, channels, height, width = images.shape
    if channels > 1 and height * width > 1:
        return images.contiguous(memory_format=torch.channels_last)
    # With one channel or one pixel, both memory formats are the same order in memory, and torch
    # tells them apart only by the strides.
    return images.contiguous().view(batch, height, width, channels).permute(0, 3, 1, 2)


def make_contiguous(output: Any) -> Any:
    """Make channels_last tensors in nested sequences and mappings contiguous."""
    import torch

    from flatout.intercept.nested import map_tensors

    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return tensor.contiguous()
        return tensor

    return map_tensors(contiguous, output)


KNOB = Knob(
    name=NAME,
    summary="run convolutions on images in channels_last memory format",
    settings=("channels_last",),
    exactness={"channels_last": "resampled"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob converts the inputs of `Conv2d` and `ConvTranspose2d` to the memory "
        "format `torch.channels_last`, which their outputs and the following operators "
        "keep. The output of an outermost module call is made contiguous again. On the "
        "CPU, gradients of activations are converted to the memory format of these "
        "activations.\n\n"
        "Parameters, their gradients and the optimizer's state keep their memory format, "
        "so fused optimizers and checkpoints are safe. (Torch's fused optimizer steps "
        "silently compute wrong results if the strides of state and parameter differ.)\n\n"
        "If torch fails on the format, as for a `view` of activations, torch's error is "
        "raised in the program, which usually ends it, and flatout turns the knob off. A "
        "tune finds this out in a trial, and leaves the knob out. The knob does not change "
        "modules in which at least half of the convolutions are grouped.\n\n"
        "The class is `resampled` because of dropout on images: it draws the same random "
        "numbers, but applies them to other elements, so its masks differ.",
        helps="The knob helps convolutional networks on the CPU (oneDNN) and, under autocast, "
        "on tensor cores.",
        hurts="Networks become slower if operators between the convolutions need contiguous "
        "inputs, because each of them takes two copies. Images with few channels gain "
        "nothing.",
        by_hand="Call `model = model.to(memory_format=torch.channels_last)` before creating the "
        "optimizer, and `images = images.contiguous(memory_format=torch.channels_last)` at each "
        "step.",
        sources=(
            "https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html",
            "https://github.com/pytorch/pytorch/issues/34977 (grouped convolutions)",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the layout of images",),
    replaces=("convolution",),
    inside=inside,
)
