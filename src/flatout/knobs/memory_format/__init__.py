"""Run convolutions on images in channels_last memory format, for which kernels are faster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flatout.intercept import engagement
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.place import Undo
from flatout.knob import Card, Facts, Knob, Match

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

    from flatout.intercept.place import stand_before
    from flatout.knobs.memory_format.gradients import keep_layouts

    wrapper = ChannelsLast(host)
    failed = host.applied.withdraws(NAME)
    places: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (nn.Conv2d, "_conv_forward", wrapper.convolve),
        (nn.ConvTranspose2d, "forward", wrapper.convolve),
        (checkpoint, _checkpointed(checkpoint), wrapper.checkpointed),
        (checkpoint.CheckpointFunction, "forward", wrapper.checkpointed_by_reentrance),
    )
    with contextlib.ExitStack() as undo:
        if hasattr(torch.library, "get_kernel"):
            undo.callback(keep_layouts(failed))
        undo.callback(host.forward_wrappers.append(wrapper))
        for owner, name, function in places:
            undo.callback(stand_before(owner, name, failed, function))
        return undo.pop_all().close


def _checkpointed(checkpoint: ModuleType) -> str:
    """The function of torch that gets what a checkpoint without reentrance computes again."""
    name = "_checkpoint_without_reentrant_generator"
    of_2_14 = f"{name}_impl"  # which the other one calls there
    return of_2_14 if hasattr(checkpoint, of_2_14) else name


class ChannelsLast:
    """A forward wrapper: convolutions inside get and give channels last, the caller does not.

    Parameters stay as they are: torch takes the format of its input for all of a convolution, so
    neither optimizers nor checkpoints ever see another one.

    Args:
        host: of this process.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._suits: WeakIdentityDict[Any, bool] = WeakIdentityDict()
        self._is_on = False
        self._is_left = False

    def convolve(
        self, own: Callable[..., Any], module: Any, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of a method ``own`` of convolutions, whose input it turns around.

        Args:
            own: torch's method.
            module: the convolution.
            input: batch x channels x height x width.
            args, kwargs: what the method gets besides.
        """
        import torch

        is_on = self._is_on and not torch.compiler.is_compiling()
        if is_on and module.groups == 1 and input.dim() == 4:
            engagement.calls[NAME] += 1
            input = channels_last(input)
        return own(module, input, *args, **kwargs)

    def checkpointed(
        self, own: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of the function ``own`` of torch that gets what a checkpoint computes again.

        That happens in backward, where calls of modules are not seen, and is held against the
        first time, whose random numbers it draws. So the layouts are those of the time when the
        checkpoint began, in both passes.
        """
        again = functools.partial(self._within, self._is_on, function)
        return self._first(self._is_on, own(again, *args, **kwargs))

    def checkpointed_by_reentrance(
        self, own: Callable[..., Any], ctx: Any, function: Callable[..., Any], *args: Any
    ) -> Any:
        """The same for the forward pass of torch's older way, which keeps what it calls."""
        return own(ctx, functools.partial(self._within, self._is_on, function), *args)

    def _first(self, is_on: bool, passes: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        before, self._is_left = self._is_left, not is_on
        try:
            return (yield from passes)
        finally:
            self._is_left = before

    def _within(self, is_on: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._is_on, self._is_left
        self._is_on, self._is_left = is_on, not is_on
        try:
            return function(*args, **kwargs)
        finally:
            self._is_on, self._is_left = before

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Around an outermost module call."""
        is_decided = self._is_on or self._is_left
        if is_decided or NAME in self._host.applied.failures or not self._is_for(module):
            return call(module, *args, **kwargs)
        self._is_on = True
        try:
            with self._host.applied.blames(NAME):
                output = call(module, *args, **kwargs)
        finally:
            self._is_on = False
        return as_in_rows(output)

    def _is_for(self, module: Any) -> bool:
        """Whether most of a module's convolutions are neither grouped nor of other dimensions."""
        if module not in self._suits:
            from torch import nn

            from flatout.intercept import objects

            kinds = (nn.Conv2d, nn.ConvTranspose2d)
            found = [m for m in objects.modules(module) if issubclass(type(m), kinds)]
            plain = sum(convolution.groups == 1 for convolution in found)
            self._suits[module] = plain > len(found) / 2
            if not self._suits[module]:
                why = "grouped convolutions" if found else "no two-dimensional convolutions"
                name = objects.class_name(module)
                self._host.events.add("skipped", NAME, f"{name} is left alone: it has {why}")
        return self._suits[module]


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """The same values with the channels side by side; ``images`` itself where they are."""
    import torch

    batch, channels, height, width = images.shape
    if channels > 1 and height * width > 1:
        return images.contiguous(memory_format=torch.channels_last)
    # Of one channel or one pixel every layout is both; only the strides tell torch which is meant.
    return images.contiguous().view(batch, height, width, channels).permute(0, 3, 1, 2)


def as_in_rows(output: Any) -> Any:
    """Tensors in nested sequences and mappings as the module would have returned them."""
    import torch

    from flatout.intercept.nested import mapped

    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return tensor.contiguous()
        return tensor

    return mapped(contiguous, output)


KNOB = Knob(
    name=NAME,
    summary="run convolutions on images in channels_last memory format",
    settings=("channels_last",),
    exactness={"channels_last": "resampled"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob converts the inputs of `Conv2d` and `ConvTranspose2d` to the memory format "
        "`torch.channels_last`, which their outputs and the following operators keep. The output "
        "of an outermost module call is made contiguous again. On the CPU, gradients are converted "
        "to the memory format of the activations that they belong to. Parameters, their gradients "
        "and the optimizer's state keep their memory format, so fused optimizers and checkpoints "
        "are safe. (Torch's fused optimizer steps are silently wrong where the strides of state "
        "and parameter differ.) Where torch fails on the format (a `view` of activations), the "
        "program gets the error, and the knob is withdrawn. Modules in which at least half of the "
        "convolutions are grouped are left alone. Dropout on images draws the same random numbers, "
        "but applies them to other elements.",
        helps="Convolutional networks on the CPU (oneDNN) and, under autocast, on tensor cores.",
        hurts="Networks with operators between the convolutions that need contiguous inputs, "
        "because each of them takes two copies; images with few channels.",
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
)
