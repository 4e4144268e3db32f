"""Finding the root modules: the modules that the program calls outermost.

A call of a method that is a forward pass (``methods.py``) counts as a call of its module.

Whether a module is a root depends on how it is called and not on its position in the module tree,
so roots are only known once they are called. During a search, which lasts a few steps, every class
that has registered parameters or submodules is watched. A class stays watched after the search if
an instance of it was called outermost.
"""

from __future__ import annotations

import itertools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from flatout.intercept import _watch, methods, objects
from flatout.intercept.containment import OnFailure, contain, wrap
from flatout.intercept.methods import Method
from flatout.intercept.patch import Undo, replace_function
from flatout.intercept.watches import ClassWatch
from flatout.wire.turns import FORWARD

_FIRST_STEPS = 3
"""The number of steps that the first search takes. The first step alone may be a sanity check."""

_MOST_WAITED = 20_000
"""The number of other steps for which the first search waits for steps that train."""

_MOST_TRIED = 50
"""The number of calls without gradients after which a method that may be a forward pass is refused
at the next one."""

_CHECKS = 3
"""The number of outermost calls at which a module without parameters is checked. Some modules
create their layers in their first call."""


class _ModuleClass:
    """A module class that is watched, or was watched during a search.

    Args:
        reference: a weak reference to the class.
        watch: the watch on ``__call__`` of the class.

    Attributes:
        has_roots: whether an instance of the class is a root.
        is_refused: whether the class cannot be watched.
    """

    def __init__(self, reference: weakref.ref[type], watch: ClassWatch) -> None:
        self.reference = reference
        self.watch = watch
        self.has_roots = False
        self.is_refused = False


class _MethodWatch:
    """A watch on a method that is a forward pass.

    Dynamo and TorchScript find a Python function in its place, and compile the original. Only weak
    references to the class and to this function are kept.

    Args:
        log: the event log that the watch writes to.
        method: the method.
    """

    def __init__(self, log: _watch.Log, method: Method) -> None:
        import torch

        original, is_compiling = method.function, torch.compiler.is_compiling
        watch: Any = _watch.Watch(log, FORWARD, original, method.owner, method.name, None)

        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if is_compiling() else watch(*args, **kwargs)

        replace_function(method.owner, method.name, call)
        self._name = method.name
        self._owner = weakref.ref(method.owner)
        self._function = weakref.ref(objects.namespace(method.owner)[method.name])

    def remove(self) -> None:
        """Restore the original method, unless the program has replaced it."""
        owner, function = self._owner(), self._function()
        if owner is not None and objects.namespace(owner).get(self._name) is function is not None:
            setattr(owner, self._name, function.__wrapped__)


class RootSearch:
    """Watches ``__call__`` of the module classes of the program.

    Modules and classes of the program are referred to weakly only.

    Args:
        log: the event log that the watches write to.
        on_search_begin: called when a new search begins; ``close_step`` must then be called after
            each step.
        on_skip: called with a subject and a reason when a class cannot be watched.
        on_watch_failure: called with the exception when this class has failed.

    Attributes:
        is_active: whether a search is going on.
        keeps_watches: whether classes without roots stay watched after the search, so that which
            calls are known to be outermost does not depend on when the log was read.
    """

    def __init__(
        self,
        log: _watch.Log,
        on_search_begin: Callable[[], None],
        on_skip: Callable[[str, str], None],
        on_watch_failure: OnFailure,
    ) -> None:
        self.is_active = True
        self.keeps_watches = False
        self._log = log
        self._on_search_begin = on_search_begin
        self._on_skip = on_skip
        self._on_watch_failure = on_watch_failure
        self._steps = self._waited = 0
        self._called: dict[int, weakref.ref[Any]] = {}
        self._checks: dict[int, int] = {}
        self._classes: dict[int, _ModuleClass] = {}
        self._module_type: type | None = None
        self._judged: set[types.CodeType] = set()  # of methods
        self._refused: set[types.CodeType] = set()
        self._method_watches: list[_MethodWatch] = []
        self._trials: list[weakref.ref[Undo]] = []

    @property
    def roots(self) -> list[Any]:
        """The modules that were called outermost, have parameters and are still alive."""
        are_roots = self._log.roots
        modules = (ref() for identity, ref in list(self._called.items()) if are_roots.get(identity))
        return [module for module in modules if module is not None]

    def prepare(self) -> None:
        """Set up the log. To be called before any watch is installed."""
        import torch

        self._module_type = torch.nn.Module
        self._log.check_root = contain(self._on_watch_failure, self._check_root)
        self._log.roots = {}

    def watch_script_modules(self) -> None:
        """Watch the class of script modules, which never register a child."""
        import torch

        self._watch_class(torch.jit.ScriptModule)

    def remove(self) -> None:
        """Remove all watches."""
        for reference in self._trials:
            if (end := reference()) is not None:
                end()
        for watch in self._method_watches:
            watch.remove()
        for known in list(self._classes.values()):
            known.watch.remove()
        self._classes, self._method_watches, self._trials = {}, [], []

    def close_step(self, trains: bool) -> None:
        """Count a step that has ended during a search, and end the search after enough steps.

        Args:
            trains: whether the step trains, or the program does not train at all. A program may
                make thousands of steps without gradients (rollouts) before it calls the modules and
                methods with which it trains; the first search waits for these.
        """
        if not trains and self._waited < _MOST_WAITED:
            self._waited += 1
            return
        self._waited = _MOST_WAITED
        self._steps += 1
        if self._steps >= _FIRST_STEPS:
            self.is_active = False
            for known in list(self._classes.values()):
                if not known.has_roots and not self.keeps_watches:
                    known.watch.remove()

    def resume(self) -> None:
        """Restart the search for the duration of one step, because the program may now call new
        modules. Does nothing during a search."""
        if self.is_active:
            return
        self.is_active = True
        self._on_search_begin()
        self._steps = _FIRST_STEPS - 1
        for known in list(self._classes.values()):
            self._install(known)

    def add_parent(self, parent: Any, name: str, child: Any) -> None:
        """Watch the class of a module that registers a parameter or a submodule (a torch hook)."""
        self._add_class(type(parent))

    def add_restored_module(self, module: Any) -> None:
        """Watch the class of an unpickled or copied module, whose children are not registered."""
        self._add_class(type(module))

    def _add_class(self, module_class: type) -> None:
        if module_class is self._module_type or id(module_class) in self._classes:
            return  # a watch on torch.nn.Module itself would be inherited by every module class
        fx = sys.modules.get("torch.fx.graph_module")
        if fx is not None and issubclass(module_class, fx.GraphModule):
            return  # torch.fx derives a permanent __call__ from the one that it finds on the class
        self._watch_class(module_class)
        self.resume()

    def _watch_class(self, module_class: type) -> None:
        identity, classes = id(module_class), self._classes

        def forget(gone: weakref.ref[type]) -> None:
            known = classes.get(identity)
            if known is not None and known.reference is gone:
                del classes[identity]

        watch = ClassWatch(self._log, module_class, "__call__", FORWARD)
        classes[identity] = known = _ModuleClass(weakref.ref(module_class, forget), watch)
        self._install(known)

    def _install(self, known: _ModuleClass) -> None:
        if known.is_refused:
            return
        why = known.watch.install()
        if why is not None:
            known.is_refused = True
            self._on_skip(f"forward of {known.watch.class_name}", why)

    def _check_root(self, module: Any) -> bool:
        """Return whether a module that was called outermost is a root, which needs parameters."""
        identity = id(module)
        is_root = next(objects.parameters(module), None) is not None
        if identity not in self._called:
            called, checks, roots = self._called, self._checks, self._log.roots

            def forget(_: object) -> None:
                for known in (called, checks, roots):
                    known.pop(identity, None)

            called[identity] = weakref.ref(module, contain(self._on_watch_failure, forget))
        self._checks[identity] = self._checks.get(identity, 0) + 1
        if is_root or self._checks[identity] == _CHECKS:
            self._log.roots[identity] = is_root
        if is_root and id(type(module)) in self._classes:
            self._classes[id(type(module))].has_roots = True
        if is_root and not self.keeps_watches:
            self._find_method(module)
        return is_root

    # Methods

    def _find_method(self, module: Any) -> None:
        """Try the method that has called a module outermost, if it may be a forward pass."""
        import torch

        method = methods.find_around(module, self._refused)
        if method is None or method.function.__code__ in self._judged:
            return
        self._judged.add(method.function.__code__)
        part, left = weakref.ref(module), itertools.count(_MOST_TRIED, -1)

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not torch.is_grad_enabled() and next(left) > 0:
                return result
            end()
            self._judge(method, methods.is_forward_pass(result), part())
            return result

        contained = wrap(self._on_watch_failure, call, method.function)
        end = replace_function(method.owner, method.name, contained)
        self._trials.append(weakref.ref(end))  # the class holds it

    def _judge(self, method: Method, is_forward_pass: bool, part: Any) -> None:
        """Watch a method that is a forward pass. If it is none, a method inside of it may be one
        that has called the same module, ``part``."""
        if not is_forward_pass:
            self._refused.add(method.function.__code__)
            self._log.roots.pop(id(part), None)
            return
        if objects.namespace(method.owner).get(method.name) is method.function:
            self._method_watches.append(_MethodWatch(self._log, method))
