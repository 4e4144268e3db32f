"""Compilation: ``module.compile()`` in place on the outermost modules, or on their blocks."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.containment import report
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet
from flatout.intercept.patch import Undo
from flatout.knob import PRODUCTS, Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "compile"

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "regional": {},
    "default": {},
    "dynamic": {"dynamic": True},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}
"""Of ``torch.nn.Module.compile``, for each setting."""

MOST_SAID = 20
"""Graphs after which no more are spoken of in the record."""

MOST_COMPILING_CALLS = 8
"""Calls of one module that had to compile something after which it is left uncompiled. The first
one, a shape that turns out to vary, evaluation and its shapes make four or five; and Dynamo gives a
piece of code up after as many (``torch._dynamo.config.recompile_limit``), but goes on to check all
its guards."""


def match(facts: Facts) -> Match:
    """Needs a compiler, and something in the step besides matrix products."""
    why = missing() if facts.device == "cpu" else None
    if why is not None:
        return Match((), why)
    products = facts.share(*PRODUCTS)
    return Match(("default",), share=None if products is None else max(0.0, 1 - products))


def missing() -> str | None:
    """What Inductor lacks for the CPU on this machine, or ``None``."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "there is no C++ compiler (g++ or clang++)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's headers are not installed ({header})"
    return None


def apply(host: Host, setting: str) -> Undo:
    """Compile each outermost module at its next call after the search for them is over."""
    from flatout.intercept import device

    if setting == "reduce-overhead" and not device.has_cuda():
        raise RefusedError("reduce-overhead is for CUDA, and there is no CUDA device")
    if device.accelerator() is None and (why := missing()):
        raise RefusedError(why)
    wrapper = Compiled(host, setting, OPTIONS[setting])
    with contextlib.ExitStack() as undo:
        undo.callback(wrapper.restore)
        undo.callback(host.forward_wrappers.append(wrapper))
        return undo.pop_all().close


class Compiled:
    """The forward wrapper.

    Args:
        host: of this process.
        setting: of this knob.
        options: of ``torch.nn.Module.compile``.
    """

    def __init__(self, host: Host, setting: str, options: Mapping[str, Any]) -> None:
        self._host = host
        self._is_regional = setting == "regional"
        self._has_graphs_of_cuda = setting == "reduce-overhead"
        self._options = options
        self._compiled: WeakIdentityDict[Any, WeakIdentitySet[Any]] = WeakIdentityDict()
        self._compiling_calls: WeakIdentityDict[Any, int] = WeakIdentityDict()
        self._counted = (0, 0)
        self._said = 0

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Around an outermost module call."""
        host = self._host
        if NAME in host.applied.failures:
            return call(module, *args, **kwargs)
        if module not in self._compiled:
            if host.hooks.root_search.is_active:
                return call(module, *args, **kwargs)  # classes are watched: nothing to trace
            self._compiled[module] = self._compile(module)
        if not self._compiled[module]:
            return call(module, *args, **kwargs)

        engagement.calls[NAME] += 1
        with falling_back(self._failed), host.applied.withdraw_on_torch_error(NAME):
            output = self._run(call, module, args, kwargs)
        if self._has_compiled():
            self._count_call(module)
        return output

    def _failed(self, error: Exception) -> None:
        self.restore()
        self._host.applied.withdraw(NAME, error)

    def _run(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not self._has_graphs_of_cuda:
            return call(module, *args, **kwargs)
        import torch

        from flatout.intercept.nested import map_tensors

        torch.compiler.cudagraph_mark_step_begin()
        # The next call writes into the same memory.
        return map_tensors(torch.Tensor.clone, call(module, *args, **kwargs))

    def _compile(self, root: Any) -> WeakIdentitySet[Any]:
        """Set what is to be compiled; nothing where the program has compiled or scripted."""
        import torch

        from flatout.intercept import objects

        why = None
        if isinstance(root, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)) or any(
            module._compiled_call_impl is not None for module in objects.modules(root)
        ):
            why = "the program compiles it itself"
        chosen = blocks(root) if self._is_regional else [root]
        if not chosen:
            why = "it has no blocks of one class in a list"
        if why is not None:
            name = objects.class_name(root)
            self._host.events.add("skipped", NAME, f"{name} is left alone: {why}")
            return WeakIdentitySet()
        for module in chosen:
            module.compile(**self._options)
        return WeakIdentitySet(chosen)

    def _has_compiled(self) -> bool:
        """Whether there are more graphs than before the call; they are spoken of."""
        from torch._dynamo.utils import counters

        graphs = counters["stats"]["unique_graphs"]
        if graphs == self._counted[0]:
            return False
        broken: Counter[str] = counters["graph_break"]
        breaks = sum(broken.values())
        why = f"{graphs} graphs compiled, {breaks} breaks"
        if breaks > self._counted[1]:
            first = next(iter(broken.most_common(1)))[0].strip().splitlines()[0]
            why += f", most often: {first}"
        self._counted = graphs, breaks
        self._said += 1
        if self._said <= MOST_SAID:
            self._host.events.add("noticed", NAME, why)
        return True

    def _count_call(self, module: Any) -> None:
        """Give up when a module compiles again and again."""
        calls = self._compiling_calls[module] = (self._compiling_calls.get(module) or 0) + 1
        if calls >= MOST_COMPILING_CALLS:
            self.restore()
            why = f"{calls} calls of {type(module).__qualname__} had to compile something anew"
            self._host.applied.withdraw(NAME, RuntimeError(why))

    def restore(self) -> None:
        """Let everything run as before."""
        for modules in self._compiled.values():
            for module in modules:
                module.__dict__.pop("_compiled_call_impl", None)
        self._compiled.clear()


@contextlib.contextmanager
def falling_back(failed: Callable[[Exception], None]) -> Iterator[None]:
    """Let Dynamo run a piece of code as it is where compiling it fails, before any of it has run.

    Torch would say so on the program's stderr; it is told here instead.

    Args:
        failed: told of each such failure.
    """
    from torch._dynamo import config

    def is_said(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.WARNING or not isinstance(error, Exception):
            return True
        report(failed, error)
        return False

    if config.fail_on_recompile_limit_hit:  # torch refuses both at once
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_said)
    try:
        with config.patch(suppress_errors=True):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_said)


_LOGGERS = ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")
"""That tell what cannot be compiled."""


def blocks(root: Any) -> list[Any]:
    """The modules of the class that occurs most often within one list of modules, twice at least.

    Only the outermost of nested lists count.
    """
    from torch import nn

    from flatout.intercept import objects

    best: list[Any] = []

    def visit(module: Any) -> None:
        nonlocal best
        for child in objects.children(module):
            if isinstance(child, (nn.ModuleList, nn.Sequential)):
                blocks = objects.children(child)
                kinds = Counter(type(block) for block in blocks if objects.children(block))
                if kinds:
                    kind, count = kinds.most_common(1)[0]
                    if count > max(1, len(best)):
                        best = [block for block in blocks if type(block) is kind]
                    if count > 1:
                        continue
            visit(child)

    visit(root)
    return best


KNOB = Knob(
    name=NAME,
    summary="torch.compile in place on the outermost modules, or on their repeated blocks",
    settings=tuple(OPTIONS),
    exactness=dict.fromkeys(OPTIONS, "reshuffled"),
    hot=True,
    slow_start=True,
    platforms=("cpu", "cuda", "xpu"),
    card=Card(
        what="`module.compile()` on each outermost module, in place: its class, its `state_dict` "
        "and its parameters stay what they are. `regional` compiles the blocks that a module "
        "repeats in a list, once for all of them, which takes a fraction of the time; `dynamic` "
        "compiles for any shapes at once; `max-autotune` measures several kernels for each "
        "operation; `reduce-overhead` replays whole graphs of CUDA kernels, and copies what comes "
        "out. Graphs and breaks are counted in the record. Where something cannot be compiled, "
        "Dynamo runs it as it is; then, and when a module compiles again and again, all modules "
        "run as before, and the knob is turned back. Dropout in "
        "compiled regions has a generator of its own, so `random` and `attention` do nothing "
        "there. LSTM and GRU stay on oneDNN and cuDNN. Left alone: modules that the program "
        "compiles or scripts itself.",
        helps="Many small operations between the matrix products; overhead of Python and of "
        "launches. CPU, CUDA, ROCm, XPU.",
        hurts="Shapes that change (`dynamic` may help), short runs: compiling takes a minute. "
        "Modules that break the graph often.",
        by_hand="`model.compile()`, or `for block in model.blocks: block.compile()`, before the "
        "first step",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.compile.html",
            "https://docs.pytorch.org/tutorials/recipes/regional_compilation.html",
            "https://github.com/pytorch/pytorch/issues/158007 (RNNs)",
            "https://github.com/pytorch/pytorch/issues/170604 (outputs of CUDA graphs)",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the compilation of modules",),
)
