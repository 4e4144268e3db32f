"""Makes outermost calls by replaying what they have computed before."""

from __future__ import annotations

import builtins
import contextlib
import functools
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from flatout.intercept import handled_calls, objects
from flatout.intercept.containment import knob_of
from flatout.intercept.identity import WeakIdentityDict
from flatout.knobs.replay.capture import NotCapturedError, capture, specialisations

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "replay"

_CALL_MODULE = torch.nn.Module.__call__
"""What is called if the program calls a module whose class has no ``__call__`` of its own."""

CAPTURED_AFTER = 2
"""Inputs of the same shapes and kinds are captured when they come once more after so many times.
Capturing takes a second or more, in which thousands of short calls could be made."""

MOST_GRAPHS = 6
"""At most this many graphs are captured of a module. Dynamo's own limit for one function is eight.
Whatever matches none of them runs as it is."""

MOST_MISSES = 64
"""After this many calls that match no graph, the module is left alone if fewer have matched one: it
has ever new shapes, or changes something that it depends on at every call."""

PROMPT_GRAPHS, MOST_MODULES = 2, 4
"""So many graphs of a module are captured as soon as they are wanted, for training and for
evaluation, for example, and so many times as many of modules of the same form that live at the same
time, as the critics of SAC do. A program that makes one network after another, as for each fold of
a cross-validation, would capture all of them."""

LATE_SHARE = 0.02
"""Further graphs are captured when their capture takes at most this share of the time since the
first one."""

LOOKED_AT_STEPS = 8
"""For so many optimizer steps, it is looked whether the program needs gradients of gradients."""

MOST_ARGUMENTS = 255
"""The largest number of arguments of a call of a built-in function in code that Dynamo makes.
CPython 3.11 has two instructions for a call; it skips the second one after some calls of a built-in
function, and does not know that it is longer where there are more arguments. Its own compiler never
makes such calls."""

MOST_REPEATED = 8
"""After this many backward passes of a graph that had to be computed by autograd (for gradients of
gradients, or of some outputs only), the module is left alone: they take twice the time."""


class Graph(NamedTuple):
    """A captured graph.

    Attributes:
        guards: Dynamo's guards; its attribute ``cache_entry`` is ``None`` once the graph is no
            longer valid, because something that the guards compare by identity was freed.
        holds: checks the guards, given the local variables of the call; compiled code.
        run: what Dynamo makes of the call; it runs the pass.
        name: the name of the pass among the global variables of ``run``.
        replayed: the pass.
        is_specialised: whether the pass is for the gradients of some of its outputs.
    """

    guards: Any
    holds: Callable[[dict[str, Any]], bool]
    run: Callable[..., Any]
    name: str = ""
    replayed: Any = None
    is_specialised: bool = False


class CaptureTimes:
    """Decides whether there is time to capture a further graph.

    Args:
        now_s: the clock, in seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = now_s
        self._began_s: float | None = None
        self._counts: Counter[Any] = Counter()
        self._modules: dict[Any, list[weakref.ref[Any]]] = {}
        self._late_s = 0.0
        self._longest_s = 0.0

    def add(self, form: Any, module: Any) -> None:
        """Take note of a module of this form."""
        self._modules.setdefault(form, []).append(weakref.ref(module))

    def has_time(self, form: Any) -> bool:
        """Return whether there is time for a graph of a module of this form."""
        if self._began_s is None or not self._is_late(form):
            return True
        most_s = LATE_SHARE * (self._now_s() - self._began_s)
        return self._late_s + self._longest_s <= most_s

    @contextlib.contextmanager
    def capturing(self, form: Any) -> Iterator[None]:
        """A context in which a graph of a module of this form is captured."""
        begin_s = self._now_s()
        if self._began_s is None:
            self._began_s = begin_s
        try:
            yield
        finally:
            taken_s = self._now_s() - begin_s
            self._longest_s = max(self._longest_s, taken_s)
            self._late_s += taken_s if self._is_late(form) else 0.0
            self._counts[form] += 1

    def _is_late(self, form: Any) -> bool:
        """Return whether a further graph of this form is not one of the prompt ones."""
        if self._counts[form] < PROMPT_GRAPHS:
            return False
        known = self._modules[form] = [one for one in self._modules[form] if one() is not None]
        return self._counts[form] >= PROMPT_GRAPHS * min(max(len(known), 1), MOST_MODULES)


class ReplayedCalls:
    """The captured graphs of an outermost module, or of one of its methods.

    It does not refer to the module.

    Args:
        native: the extension ``kernels/replay.cpp``.
        backend: turns what Dynamo has captured into a pass of ``native``.
        say: called with the kind of an event and its message.
        capturing: returns the context in which a graph is captured.
        times: decides whether there is time for it.
        form: what modules have in common whose graphs are likely to be the same.
        function: the method; ``None``: the calls are those of the module itself.

    Attributes:
        may_capture: whether calls that match no graph count, and may be captured.
        is_left_alone: whether the module is not replayed any more.
    """

    def __init__(
        self,
        native: ModuleType,
        backend: Callable[..., Any],
        say: Callable[[str, str], None],
        capturing: Callable[[], AbstractContextManager[None]],
        times: CaptureTimes,
        form: Any,
        function: types.FunctionType | None = None,
    ) -> None:
        self.may_capture = True
        self.is_left_alone = False
        self._native = native
        self._say = say
        self._capturing = capturing
        self._times = times
        self._form = form
        self._graphs: list[Graph] = []
        self._passes: dict[str, Any] = {}
        self._wide: set[str] = set()
        self._hits = self._misses = 0
        self._seen: Counter[Any] = Counter()
        self._specialised: WeakIdentityDict[Any, bool] = WeakIdentityDict()
        # Dynamo's cache belongs to the code, and what it makes to the global variables.
        code = (_call_module if function is None else _call_method).__code__
        variables = {"__builtins__": builtins, "__name__": __name__, "function": function}
        self._function = function
        self._traced = types.FunctionType(code.replace(co_name=code.co_name), variables)
        self._capture = torch.compile(self._traced, backend=backend, dynamic=False, fullgraph=True)

    def call(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a call; stands in for the method, or for the module's ``_call_impl``."""
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return self._call_as_usual(module, args, kwargs)  # a pass has no derivative of these
        values = {"module": module, "args": args, "kwargs": kwargs}
        for graph in self._graphs:
            if graph.guards.cache_entry is not None and graph.holds(values):
                self._hits += 1
                handled_calls.counts[NAME] += 1
                return graph.run(module, args, kwargs)
        if self.may_capture and self._wants_capture(args, kwargs):
            return self._capture_and_run(module, args, kwargs)
        return self._call_as_usual(module, args, kwargs)

    def _call_as_usual(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._function is not None:
            return self._function(module, *args, **kwargs)
        return module._call_impl(*args, **kwargs)

    def _wants_capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Count a call that matches no graph, and return whether to capture it."""
        if len(self._graphs) < MOST_GRAPHS and not self._times.has_time(self._form):
            return False  # it says nothing of the module: later there may be time
        self._misses += 1
        if self._misses >= MOST_MISSES and self._hits < self._misses:
            calls = self._hits + self._misses
            self.leave_alone(f"{self._misses} of {calls} calls had other inputs than those before")
            return False
        if len(self._graphs) >= MOST_GRAPHS:
            return False
        kind = (torch.is_grad_enabled(), *map(_describe, tree_leaves((args, kwargs))))
        self._seen[kind] += 1
        return self._seen[kind] == CAPTURED_AFTER + 1

    def _capture_and_run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        options = {"record_runtime_overhead": False, "skip_nnmodule_hook_guards": False}
        known = {name: value for name, value in options.items() if hasattr(dynamo_config, name)}
        try:
            with (
                self._capturing(),
                self._times.capturing(self._form),
                dynamo_config.patch(known),
            ):
                result = self._capture(module, args, kwargs)
        except TorchDynamoException as error:  # raised before anything is run
            # If the call fails as well, its inputs are to blame.
            result = self._call_as_usual(module, args, kwargs)
            self.leave_alone(_explain(error))
            return result
        self._collect_graphs()
        return result

    def _collect_graphs(self) -> None:
        """Collect the graphs from Dynamo's cache, to check and run them without its frame hook."""
        variables = self._traced.__globals__
        self._seen.clear()  # what is no input, such as the mode, may change what inputs match
        self._graphs = []
        for entry in _debug_get_cache_entry_list(self._traced.__code__):
            replayed, of_pass = None, ""
            for name in entry.code.co_names:
                passed = getattr(variables.get(name), "_torchdynamo_orig_callable", None)
                if isinstance(passed, self._native.Pass):
                    if entry.code.co_stacksize > MOST_ARGUMENTS:
                        self._wide.add(name)
                    self._set_pass(name, passed)
                if name in self._passes:
                    replayed, of_pass = self._passes[name], name
            run = types.FunctionType(entry.code, variables)
            guards = entry.guard_manager
            graph = Graph(guards, guards.root.check, run, of_pass, replayed)
            self._graphs.append(graph._replace(is_specialised=replayed in self._specialised))
        newest = self._graphs[0].replayed if self._graphs else None
        if newest is not None:
            self._say(
                "noticed",
                f"graph {len(self._graphs)} of at most {MOST_GRAPHS}: {len(newest.forward)} "
                f"operators forward, {len(newest.backward)} backward",
            )

    def _set_pass(self, name: str, passed: Any) -> None:
        """Let what Dynamo has made call a pass, without the wrapper that turns Dynamo off in it."""
        self._passes[name] = passed
        function = passed.function
        if name in self._wide:
            function = functools.partial(function)  # no built-in function
        self._traced.__globals__[name] = function

    def look_at_backward(self) -> None:
        """Capture passes for the gradients that they were given, if these are fewer, or leave the
        module alone if its backward passes are not those that were captured."""
        self._graphs = [self._specialise(graph) for graph in self._graphs]
        if any(
            graph.replayed is not None
            and (graph.replayed.repetitions >= MOST_REPEATED or graph.replayed.made_graphs)
            for graph in self._graphs
        ):
            self.leave_alone(
                "its backward passes are of other outputs, or have gradients of their own"
            )

    def _specialise(self, graph: Graph) -> Graph:
        """Return a graph for the outputs that had gradients, if they were fewer than expected."""
        passed = graph.replayed
        if graph.is_specialised or passed is None or not passed.repetitions or not passed.used:
            return graph
        used = [place for place in range(passed.returned) if passed.used >> place & 1]
        try:
            with self._capturing():
                made = specialisations[passed](used)
        except (NotCapturedError, TorchDynamoException, RuntimeError) as error:
            self._say("noticed", f"has no graph for the gradients of some outputs: {error}")
            return graph._replace(is_specialised=True)
        self._specialised[made] = True
        self._set_pass(graph.name, made)
        return graph._replace(replayed=made, is_specialised=True)

    def leave_alone(self, why: str) -> None:
        """Replay the calls no more, for a reason, which is a clause."""
        self.is_left_alone = True
        self._graphs = []
        self._say("skipped", f"is left alone: {why}")


def _call_module(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def _call_method(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(module, *args, **kwargs)  # noqa: F821


def _describe(value: Any) -> Any:
    """Return what must be the same for two inputs to be likely to match the same graph."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return value if isinstance(value, (bool, int, float, str)) else type(value)


def _explain(error: TorchDynamoException) -> str:
    """Return why Dynamo has not captured a call, as a clause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NotCapturedError):
            return str(cause)
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    lines = str(error).strip().splitlines()
    return f"it cannot be captured ({lines[0] if lines else type(error).__name__})"


def _find_method(called: Any) -> types.FunctionType | None:
    """Return the function that the program has called if it is a method, and no ``__call__``."""
    is_call = getattr(called, "__name__", "__call__") in ("__call__", "_wrapped_call_impl")
    return called if isinstance(called, types.FunctionType) and not is_call else None


@dataclass
class _Program:
    """What has been found out about the program; it is kept when the knob is undone."""

    needs_second_order: bool = False


class Replays:
    """The forward wrapper that replays outermost module calls.

    Args:
        host: the process that is tuned.
        native: the extension ``kernels/replay.cpp``.
    """

    def __init__(self, host: Host, native: ModuleType) -> None:
        self._host = host
        self._native = native
        self._repetitions = 0
        self._steps = 0
        self._program: _Program = host.keep(NAME, "program", _Program)
        self._backend = host.keep(NAME, "backend", lambda: functools.partial(capture, native))
        self._times: CaptureTimes = host.keep(NAME, "times", CaptureTimes)
        self._modules: WeakIdentityDict[Any, dict[Any, ReplayedCalls]] = host.keep(
            NAME, "modules", WeakIdentityDict
        )

    def __call__(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an outermost module call."""
        hooks = self._host.hooks
        called = hooks.callbacks.called
        function = None if called is _CALL_MODULE else _find_method(called)
        known = self._modules.get(module)
        if known is None:
            known = self._modules[module] = {}
        if self._program.needs_second_order:
            return call(module, *args, **kwargs)
        replayed = known.get(function)
        is_searching = hooks.root_search.is_active
        if replayed is None and not is_searching:
            replayed = known[function] = self._begin(module, function)
        if replayed is None or replayed.is_left_alone:
            return call(module, *args, **kwargs)
        replayed.may_capture = not is_searching  # flatout's hooks would be captured as well
        entries = self._host.forward_wrappers.entries
        if called is _CALL_MODULE and len(entries) == 1:
            return replayed.call(module, *args, **kwargs)  # as below, with fewer calls
        if function is not None:
            # What other settings do around the call would be left out.
            is_alone = all(knob_of(one.callback) in (None, NAME) for one in entries)
            make = replayed.call if is_alone else call
            return make(module, *args, **kwargs)
        own = module.__dict__
        own["_compiled_call_impl"] = functools.partial(replayed.call, module)
        try:
            return call(module, *args, **kwargs)
        finally:
            own.pop("_compiled_call_impl", None)

    def look(self, _: Any) -> None:
        """Leave modules alone whose backward passes are not those that were captured."""
        self._steps += 1
        if self._steps == LOOKED_AT_STEPS:
            self._host.backward_wrappers.remove(self.look_at_order)
        repetitions = self._native.repetitions()
        if repetitions == self._repetitions:
            return
        self._repetitions = repetitions
        for known in list(self._modules.values()):
            for replayed in known.values():
                replayed.look_at_backward()

    def look_at_order(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replay nothing in a program that asks for gradients of gradients.

        They are computed by autograd over a second call, whose gradients it adds up in another
        order. It is a backward wrapper.
        """
        create_graph = kwargs["create_graph"] if "create_graph" in kwargs else args[3:4] == (True,)
        if create_graph and not self._program.needs_second_order:
            self._program.needs_second_order = True
            self._host.events.add("skipped", NAME, "nothing is replayed: gradients have gradients")
        return call(*args, **kwargs)

    def _begin(self, module: Any, function: types.FunctionType | None) -> ReplayedCalls:
        name, add = objects.class_name(module), self._host.events.add
        if function is not None:
            name = f"{name}.{function.__name__}"

        def say(what: str, message: str) -> None:
            add(what, NAME, f"{name} {message}" if what == "skipped" else f"{name}: {message}")

        with torch._C.DisableTorchFunctionSubclass():
            shapes = tuple(
                None if is_lazy(parameter) else parameter.shape
                for parameter in objects.parameters(module)
            )
        self._times.add((name, shapes), module)
        replayed = ReplayedCalls(
            self._native,
            self._backend,
            say,
            self._host.capturing,
            self._times,
            form=(name, shapes),
            function=function,
        )
        if isinstance(module, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)) or any(
            one._compiled_call_impl is not None for one in objects.modules(module)
        ):
            replayed.leave_alone("the program compiles it itself")
        return replayed
