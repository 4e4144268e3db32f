"""A program may ask where torch is, in every way there is, before it imports it."""
# long
# flatout run
# flatout run | lazy
# flatout run | failing
# flatout run | threads
# flatout run | by_hand
# bare in a process of its own: it looks for torch before it imports it

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import pickle
import pkgutil
import sys
import threading
import traceback
import types


def train() -> None:
    """A step that flatout sees, if it is there."""
    import torch

    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    print(type(torch), type(torch.__loader__).__name__, torch.__spec__.loader is torch.__loader__)
    print("exec_module" in vars(torch.__loader__), "torch" in sys.modules)


def ask() -> None:
    for _ in range(3):
        spec = importlib.util.find_spec("torch")
        print(spec.name, spec.origin == spec.loader.path, type(spec.loader).__name__)
    print(spec.loader.is_package("torch"), spec.has_location, "torch" in sys.modules)
    print(len(spec.loader.get_source("torch")) > 1000, spec.loader.get_code("torch").co_name)
    print(isinstance(spec.loader, importlib.abc.SourceLoader), repr(spec) == repr(spec))
    print(spec.loader.get_resource_reader("torch") is not None)
    print([m.name for m in pkgutil.iter_modules(spec.submodule_search_locations)][:1])
    for finder in sys.meta_path:
        if finder.find_spec("torch", None) is not None:
            print("found")
            break


def lazy() -> None:
    spec = importlib.util.find_spec("torch")
    loader = importlib.util.LazyLoader(spec.loader)
    spec.loader = loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["torch"] = module
    loader.exec_module(module)
    print(type(module).__name__, "torch.nn" in sys.modules)
    print(module.nn.__name__, type(module).__name__)


def failing() -> None:
    held = sys.modules.pop("ctypes", None)
    sys.modules["ctypes"] = None  # type: ignore[assignment]
    for _ in range(2):
        try:
            import torch  # noqa: F401
        except ImportError as error:
            frames = traceback.extract_tb(error.__traceback__)
            print(type(error).__name__, [frame.name for frame in frames], "torch" in sys.modules)
    del sys.modules["ctypes"]
    if held is not None:
        sys.modules["ctypes"] = held


def threads() -> None:
    seen = []
    workers = [
        threading.Thread(target=lambda: seen.append(importlib.import_module("torch").__name__))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(seen)


def by_hand() -> None:
    spec = importlib.util.find_spec("torch")
    module = sys.modules["torch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(isinstance(module, types.ModuleType), inspect.getsourcefile(module) == spec.origin)
    print(pickle.loads(pickle.dumps(spec.loader)) == spec.loader)
    print(importlib.resources.files("torch").joinpath("version.py").is_file())


ask()
if len(sys.argv) > 1:
    globals()[sys.argv[1]]()
train()
