"""Finding the root modules: those that the program calls outermost.

A module is a root by how it is called, whatever its position in the module tree, so roots are only
known once they are called. Every class that owns parameters or submodules is watched during a
search, which lasts a few steps, and stays watched if an instance of it was called outermost.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from flatout.intercept import _watch, objects
from flatout.intercept.containment import OnFailure, contain
from flatout.intercept.watches import ClassWatch
from flatout.wire.turns import FORWARD

_FIRST_STEPS = 3
"""Steps that the first search takes; the first step alone may be a sanity check."""

_CHECKS = 3
"""Calls at which a module without parameters is checked: some modules create their layers in their
first call."""


class _ModuleClass:
    """A module class that is watched, or was during a search.

    Args:
        reference: to the class.
        watch: on its ``__call__``.
    """

    def __init__(self, reference: weakref.ref[type], watch: ClassWatch) -> None:
        self.reference = reference
        self.watch = watch
        self.has_roots = False
        self.is_refused = False


class RootSearch:
    """Watches ``__call__`` of the module classes of the program.

    No module and no class of the program is kept alive.

    Args:
        log: of the watches.
        begins: called when a new search begins, which needs to be told of closed steps.
        on_skip: called with a subject and a reason when a class cannot be watched.
        on_watch_failure: called with a failure of this class.

    Attributes:
        is_active: whether a search goes on.
        keeps_watches: whether classes without roots stay watched after the search, so that which
            calls are known to be outermost does not depend on when the log was read.
    """

    def __init__(
        self,
        log: _watch.Log,
        begins: Callable[[], None],
        on_skip: Callable[[str, str], None],
        on_watch_failure: OnFailure,
    ) -> None:
        self.is_active = True
        self.keeps_watches = False
        self._log = log
        self._begins = begins
        self._on_skip = on_skip
        self._on_watch_failure = on_watch_failure
        self._steps = 0
        self._called: dict[int, weakref.ref[Any]] = {}
        self._checks: dict[int, int] = {}
        self._classes: dict[int, _ModuleClass] = {}
        self._plain_module: type | None = None

    @property
    def roots(self) -> list[Any]:
        """The living modules that were called outermost and have parameters."""
        are_roots = self._log.roots
        modules = (ref() for identity, ref in list(self._called.items()) if are_roots.get(identity))
        return [module for module in modules if module is not None]

    def prepare(self) -> None:
        """Prepare the log, before any watch is installed."""
        import torch

        self._plain_module = torch.nn.Module
        self._log.check_root = contain(self._on_watch_failure, self._check_root)
        self._log.roots = {}

    def watch_script_modules(self) -> None:
        """Watch the class of script modules, which never register a child."""
        import torch

        self._watch_class(torch.jit.ScriptModule)

    def remove(self) -> None:
        """Remove all watches."""
        for known in list(self._classes.values()):
            known.watch.remove()
        self._classes = {}

    def close_step(self) -> None:
        """Note that a step has closed during a search, and end the search after enough of them."""
        self._steps += 1
        if self._steps >= _FIRST_STEPS:
            self.is_active = False
            for known in list(self._classes.values()):
                if not known.has_roots and not self.keeps_watches:
                    known.watch.remove()

    def resume(self) -> None:
        """Search for one more step, if no search goes on: the program has begun something new."""
        if self.is_active:
            return
        self.is_active = True
        self._begins()
        self._steps = _FIRST_STEPS - 1
        for known in list(self._classes.values()):
            self._install(known)

    def child_registered(self, parent: Any, name: str, child: Any) -> None:
        """Watch the class of a module that registers a parameter or a submodule (a torch hook)."""
        self._add_class(type(parent))

    def module_restored(self, module: Any) -> None:
        """Watch the class of an unpickled or copied module, whose children are not registered."""
        self._add_class(type(module))

    def _add_class(self, module_class: type) -> None:
        if module_class is self._plain_module or id(module_class) in self._classes:
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
        """Return whether a module that was called outermost has parameters, and is a root."""
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
        return is_root
