"""Compile the outermost modules, or their repeated blocks, by ``module.compile()`` in place."""

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
from flatout.intercept import handled_calls
from flatout.intercept.containment import report
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet
from flatout.intercept.patch import Undo
from flatout.knob import MATMUL_OPERATORS, Card, Facts, Knob, Match

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
"""The arguments of ``torch.nn.Module.compile`` for each setting."""

MOST_EVENTS = 20
"""The record mentions at most this many calls that compiled a graph."""

MOST_COMPILING_CALLS = 8
"""After this many calls of one module that compiled something, nothing stays compiled. The first
call, a shape that turns out to vary, and evaluation with its shapes cause four or five such calls.
Dynamo stops compiling a piece of code after as many (``torch._dynamo.config.recompile_limit``), but
keeps checking all its guards."""


def match(facts: Facts) -> Match:
    """Offer the default setting where there is a compiler; matmuls are not expected to gain."""
    why = missing() if facts.device == "cpu" else None
    if why is not None:
        return Match((), why)
    matmul_share = facts.share(*MATMUL_OPERATORS)
    return Match(("default",), share=None if matmul_share is None else max(0.0, 1 - matmul_share))


def missing() -> str | None:
    """What Inductor needs to compile for the CPU and this machine lacks; ``None`` if nothing."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "there is no C++ compiler (g++ or clang++)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's headers are not installed ({header})"
    return None


def apply(host: Host, setting: str) -> Undo:
    """Compile each outermost module at its first call after flatout's search for them is over.

    Raises:
        RefusedError: ``reduce-overhead`` without CUDA, or no compiler.
    """
    from flatout.intercept import device

    if setting == "reduce-overhead" and not device.has_cuda():
        raise RefusedError("reduce-overhead needs CUDA, and there is no CUDA device")
    if device.accelerator() is None and (why := missing()):
        raise RefusedError(why)
    wrapper = Compiled(host, setting, OPTIONS[setting])
    with contextlib.ExitStack() as undo:
        undo.callback(wrapper.restore)
        undo.callback(host.forward_wrappers.append(wrapper))
        return undo.pop_all().close


class Compiled:
    """The forward wrapper that compiles modules.

    Args:
        host: the process that is tuned.
        setting: one of this knob's settings.
        options: arguments of ``torch.nn.Module.compile``.
    """

    def __init__(self, host: Host, setting: str, options: Mapping[str, Any]) -> None:
        self._host = host
        self._is_regional = setting == "regional"
        self._uses_cuda_graphs = setting == "reduce-overhead"
        self._options = options
        self._compiled: WeakIdentityDict[Any, WeakIdentitySet[Any]] = WeakIdentityDict()
        self._compiling_calls: WeakIdentityDict[Any, int] = WeakIdentityDict()
        self._graphs_and_breaks = (0, 0)
        self._event_count = 0

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an outermost module call; compile the module first, if it is not compiled yet."""
        host = self._host
        if NAME in host.applied.failures:
            return call(module, *args, **kwargs)
        if module not in self._compiled:
            if host.hooks.root_search.is_active:
                return call(module, *args, **kwargs)  # flatout's hooks would be traced as well
            self._compiled[module] = self._compile(module)
        if not self._compiled[module]:
            return call(module, *args, **kwargs)

        handled_calls.counts[NAME] += 1
        with falling_back(self._withdraw), host.applied.withdraw_on_torch_error(NAME):
            output = self._run(call, module, args, kwargs)
        if self._record_new_graphs():
            self._count_compiling_call(module)
        return output

    def _withdraw(self, error: Exception) -> None:
        self.restore()
        self._host.applied.withdraw(NAME, error)

    def _run(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not self._uses_cuda_graphs:
            return call(module, *args, **kwargs)
        import torch

        from flatout.intercept.nested import map_tensors

        torch.compiler.cudagraph_mark_step_begin()
        # The next call writes its outputs into the same memory.
        return map_tensors(torch.Tensor.clone, call(module, *args, **kwargs))

    def _compile(self, root: Any) -> WeakIdentitySet[Any]:
        """Mark the modules in ``root`` to be compiled, and return them.

        The set is empty where the program compiles or scripts ``root`` itself.
        """
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
            compile_in_place(module, self._options)
        return WeakIdentitySet(chosen)

    def _record_new_graphs(self) -> bool:
        """Record the number of graphs if the last call has compiled some; returns whether it
        has."""
        from torch._dynamo.utils import counters

        graphs = counters["stats"]["unique_graphs"]
        if graphs == self._graphs_and_breaks[0]:
            return False
        reasons: Counter[str] = counters["graph_break"]
        breaks = sum(reasons.values())
        message = f"{graphs} graphs compiled, {breaks} breaks"
        if breaks > self._graphs_and_breaks[1]:
            first_line = next(iter(reasons.most_common(1)))[0].strip().splitlines()[0]
            message += f", most often: {first_line}"
        self._graphs_and_breaks = graphs, breaks
        self._event_count += 1
        if self._event_count <= MOST_EVENTS:
            self._host.events.add("noticed", NAME, message)
        return True

    def _count_compiling_call(self, module: Any) -> None:
        """Withdraw the knob when a module compiles again and again."""
        calls = self._compiling_calls[module] = (self._compiling_calls.get(module) or 0) + 1
        if calls >= MOST_COMPILING_CALLS:
            self.restore()
            why = f"{calls} calls of {type(module).__qualname__} had to compile something anew"
            self._host.applied.withdraw(NAME, RuntimeError(why))

    def restore(self) -> None:
        """Let all modules run uncompiled again."""
        for modules in self._compiled.values():
            for module in modules:
                module.__dict__.pop("_compiled_call_impl", None)
        self._compiled.clear()


def compile_in_place(module: Any, options: Mapping[str, Any]) -> None:
    """Call ``module.compile()``, so that it also compiles modules of torch's own classes.

    Dynamo passes over frames of torch's files, and ``module.compile()`` begins with one: a
    ``Sequential`` would run uncompiled. ``torch.compile(module)`` puts another frame around it.

    Args:
        module: the module.
        options: arguments of ``torch.nn.Module.compile``.
    """
    import torch
    from torch._dynamo import external_utils, trace_rules

    module.compile(**options)
    if trace_rules.check(module.forward):
        call = external_utils.wrap_inline(module._call_impl)
        code = call.__code__
        call.__code__ = code.replace(co_name=code.co_name)  # Dynamo's cache belongs to the code
        module._compiled_call_impl = torch.compile(call, **options)


@contextlib.contextmanager
def falling_back(failed: Callable[[Exception], None]) -> Iterator[None]:
    """Let Dynamo run code uncompiled where compiling it fails, which it finds out before it runs.

    Torch logs such failures to the program's stderr; here they are passed to ``failed`` instead.

    Args:
        on_failure: called with the exception of each such failure.
    """
    from torch._dynamo import config

    def intercept_failure(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.WARNING or not isinstance(error, Exception):
            return True
        report(failed, error)
        return False

    if config.fail_on_recompile_limit_hit:  # torch refuses to suppress errors with this option
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(intercept_failure)
    try:
        with config.patch(suppress_errors=True):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(intercept_failure)


_LOGGERS = ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")
"""The loggers to which torch reports code that it cannot compile."""


def blocks(root: Any) -> list[Any]:
    """The modules of the class that occurs most often within one list of modules, at least twice.

    Of nested lists, only the outermost is searched.
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
    summary="compile the outermost modules, or their repeated blocks, in place with torch.compile",
    settings=tuple(OPTIONS),
    exactness=dict.fromkeys(OPTIONS, "reshuffled"),
    hot=True,
    slow_start=True,
    platforms=("cpu", "cuda", "xpu"),
    card=Card(
        what="The knob calls `module.compile()` on each outermost module. This works in place: "
        "the module's class, `state_dict` and parameters do not change.\n\n"
        "- `default`: compile with torch's defaults.\n"
        "- `regional`: compile only the blocks that a module repeats in a list. They "
        "share their compiled code, so compiling takes a fraction of the time.\n"
        "- `dynamic`: compile for any shapes from the start.\n"
        "- `max-autotune`: time several kernels for each operation and keep the fastest.\n"
        "- `reduce-overhead`: replay whole CUDA graphs, and copy their outputs.\n\n"
        "The record that flatout writes of each run counts graphs and graph breaks. If "
        "code cannot be compiled, or if a module is recompiled again and again, flatout "
        "turns the knob off, and all modules run uncompiled from then on. Dropout in "
        "compiled regions draws from Inductor's own generator, so the knobs `random` and "
        "`attention` have no effect there. LSTM and GRU stay on oneDNN and cuDNN. The "
        "knob does not change modules that the program compiles or scripts itself.",
        helps="The knob helps programs with many small operations between the matmuls, or with "
        "much overhead from Python and kernel launches, on CPU, CUDA, ROCm and XPU.",
        hurts="Shapes that change cause recompilation (`dynamic` may help). In short runs, "
        "compiling may take longer than it saves, because it takes about a minute. "
        "Modules with many graph breaks gain little.",
        by_hand="Call `model.compile()`, or `for block in model.blocks: block.compile()`, before "
        "the first step.",
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
