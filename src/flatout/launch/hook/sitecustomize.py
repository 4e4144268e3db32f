# The start-up hook: Python imports a module of this name when it starts, flatout's launcher puts
# this folder first on the module path. It takes itself out of what the program can see, waits for
# torch, and lets the program's own sitecustomize have its turn. Any Python 3 must be able to read
# it.
import os
import sys


def _hide():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    sys.path_importer_cache.pop(here, None)


class _TorchFinder:
    """First on sys.meta_path until torch is imported; knows no other module."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _TorchLoader(spec.loader)
        return spec


class _TorchLoader:
    """Runs torch's own loader, then wakes the agent."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _activate()


def _activate():
    try:
        if "flatout" not in sys.modules:
            import importlib.util

            root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            spec = importlib.util.spec_from_file_location(
                "flatout",
                os.path.join(root, "__init__.py"),
                submodule_search_locations=[root],
            )
            package = importlib.util.module_from_spec(spec)
            sys.modules["flatout"] = package
            spec.loader.exec_module(package)
        from flatout.agent import activate
    except Exception as error:  # noqa: BLE001 - said aloud; the program goes on
        sys.stderr.write("flatout: the agent could not be loaded: {!r}\n".format(error))
    else:
        activate()


def _start():
    run = os.environ.get("FLATOUT_RUN")
    if not run or os.environ.get("FLATOUT_DISABLE") == "1" or sys.version_info < (3, 10):
        return
    try:
        with open(os.path.join(run, "started-{}".format(os.getpid())), "w"):
            pass
    except OSError:
        return  # there is nowhere to record to
    sys.meta_path.insert(0, _TorchFinder())


_hide()
_start()
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: E402, F401 - the program's own; site ignores it when there is none
