# The start-up hook: Python imports a module of this name when it starts, and flatout's launcher
# puts this folder first on the module path. The hook hides itself from the program, waits for torch
# to be imported, and runs the program's own sitecustomize. Any Python 3 must be able to read it.
import os
import sys


def _hide():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    sys.path_importer_cache.pop(here, None)


class _TorchFinder:
    """Is first on sys.meta_path until torch is imported, and finds no other module.

    A program may ask where torch is as often as it likes, import it lazily, or fail to import it
    and try again. So this finder returns what the finders behind it return, and changes only the
    loader: it runs torch as before, and then starts the agent.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        is_behind = False
        for finder in list(sys.meta_path):
            if is_behind and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._let_wake(spec.loader)
                    return spec
            is_behind = is_behind or finder is self
        return None

    def _let_wake(self, loader):
        """Let a loader start the agent; it otherwise looks and behaves as before."""

        def exec_module(module):
            loader.__dict__.pop("exec_module", None)
            loader.exec_module(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _run_in_thread(_import_modules)
            _activate()
            if os.environ.get("FLATOUT_RANKS"):
                _follow_companions("imported", 60)

        # Python leaves frames of the import system, which has this name, out of tracebacks.
        exec_module.__code__ = exec_module.__code__.replace(
            co_filename="<frozen importlib._bootstrap>"
        )
        if hasattr(loader, "exec_module") and not isinstance(loader, type):
            try:
                loader.exec_module = exec_module
            except (AttributeError, TypeError):
                pass  # this loader cannot be changed: torch is imported and not watched


def _run_in_thread(call):
    """Run a call in a thread of its own, and wait for it.

    glibc takes the memory of each thread from another heap (malloc(3): arenas), so what the agent's
    modules need does not lie between the program's blocks. If it did, glibc could return memory to
    the system at each step that it keeps in the program alone, or the other way round.

    If the call fails, this is not reported, because ``_activate`` repeats it.
    """
    import _thread

    def run():
        try:
            call()
        except Exception:  # noqa: BLE001
            pass
        finally:
            done.release()

    # This thread holds the import locks of torch and of the modules that import it. The other
    # thread must not wait for them, because this thread waits for it.
    names = sys.stdlib_module_names | {"torch"}
    specs = [
        module.__dict__["__spec__"]
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in names and "__spec__" in getattr(module, "__dict__", ())
    ]
    unfinished = [spec for spec in specs if getattr(spec, "_initializing", False)]
    done = _thread.allocate_lock()
    done.acquire()
    stack_bytes = _thread.stack_size(0)  # the program may have set one that is too small
    for spec in unfinished:
        spec._initializing = False
    try:
        _thread.start_new_thread(run, ())
        done.acquire()
    except RuntimeError:
        pass  # no thread can be started
    finally:
        for spec in unfinished:
            spec._initializing = True
        _thread.stack_size(stack_bytes)


def _import_modules():
    _find_package()
    from flatout.agent import import_modules

    import_modules()


def _find_package():
    """Make this copy of flatout importable, unless the program has imported another."""
    if "flatout" in sys.modules:
        return
    import importlib.util

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    spec = importlib.util.spec_from_file_location(
        "flatout", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["flatout"] = package
    spec.loader.exec_module(package)


def _activate():
    try:
        _find_package()
        from flatout.agent import activate
    except Exception as error:  # noqa: BLE001 - it is reported, and the program goes on
        try:  # not through the program's buffers, which would try again at its end
            if sys.__stderr__ is not None:
                line = "flatout: the agent could not be loaded: {!r}\n".format(error)
                os.write(sys.__stderr__.fileno(), line.encode("utf-8", "backslashreplace"))
        except (OSError, ValueError):
            pass
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
        return  # the run directory cannot be written
    sys.meta_path.insert(0, _TorchFinder())
    if os.environ.get("FLATOUT_RANKS"):
        _seed_alike()
        _follow_companions("begun", 10)


def _seed_alike():
    """Let the ranks of a run draw the same numbers where the program gives no seed of its own."""
    if "--multiprocessing-fork" not in sys.orig_argv:  # their words differ between the ranks
        import random

        random.seed(repr((os.environ["FLATOUT_SEED"], sys.orig_argv)))


def _follow_companions(what, seconds):
    """Let the first process of rank 0 go on a little after those of the other ranks.

    They see in their copy-on-write views what rank 0 has written to the real files. So a program
    that makes a folder, or goes on from a file if it exists, must find none of rank 0's there. Rank
    0 waits for the others where they begin, and where they have imported torch, which may take long
    on one host and not on another.
    """
    import time

    run = os.environ["FLATOUT_RUN"]
    rank, size = int(os.environ["FLATOUT_RANK"]), int(os.environ["FLATOUT_RANKS"])
    try:
        os.close(os.open(os.path.join(run, "%s-%d" % (what, rank)), os.O_CREAT | os.O_EXCL, 0o644))
    except OSError:
        return  # this is not the first process of the rank
    if rank:
        return
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        present = os.listdir(run)
        if all(
            any("%s-%d" % (note, r) in present for note in (what, "died", "gone"))
            for r in range(1, size)
        ):
            break
        time.sleep(0.01)
    time.sleep(0.1)


_hide()
_start()
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: E402, F401 - the program's own; site ignores it when there is none
