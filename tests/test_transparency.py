"""Unusual uses of torch: under ``flatout run`` they print and leave what they do bare."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from frameworks.compare import compare

PREAMBLE = """
import copy, gc, io, os, random, sys, weakref
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(self.body(x))

def batch():
    return torch.randn(16, 8), torch.randint(0, 2, (16,))

def train(net, optimizer, steps=4):
    for _ in range(steps):
        x, y = batch()
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(type(net).__name__, repr(loss.item()))

def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net()
"""

PROGRAMS = {
    "compiled with the eager backend": """
    from torch._dynamo.utils import counters
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    train(compiled, sgd(net))
    whole = Net()
    @torch.compile(backend="eager", fullgraph=True)
    def loss_of(x, y):
        return F.cross_entropy(whole(x), y)
    optimizer = sgd(whole)
    for _ in range(4):
        loss = loss_of(*batch()); loss.backward(); optimizer.step()
        print(repr(loss.item()))
    in_place = Net(); in_place.compile(backend="eager")
    train(in_place, sgd(in_place))
    def broken(x):
        out = net(x)
        print("a graph break")
        return whole(out @ torch.ones(2, 8))
    explained = torch._dynamo.explain(broken)(batch()[0])
    print(explained.graph_count, explained.graph_break_count, explained.op_count)
    print({name: dict(counter) for name, counter in sorted(counters.items())})
    print(torch.export.export(net.eval(), (batch()[0],)).graph)
""",
    "traced, scripted, functional": """
    from torch.fx.experimental.proxy_tensor import make_fx
    train(net, sgd(net), 2)
    traced = torch.fx.symbolic_trace(net)
    print(traced.code)
    train(traced, sgd(traced))
    scripted = torch.jit.script(Net()); print(scripted.code)
    train(scripted, sgd(scripted))
    by_example = torch.jit.trace(net.eval(), batch()[0]); print(by_example.graph)
    train(by_example, sgd(by_example))
    print(make_fx(net)(batch()[0]).code)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    def loss_of(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)
    for _ in range(4):
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters, *batch())
        parameters = {name: value - 0.1 * gradients[name] for name, value in parameters.items()}
        print(repr(loss.item()))
    x, y = batch()
    gradients_of = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0), randomness="different")
    each = gradients_of(parameters, x[:, None], y[:, None])
    print({name: value.double().sum().item() for name, value in each.items()})
    print(torch.func.jacrev(net)(x[:1]).shape)
""",
    "unusual training loops": """
    lbfgs = torch.optim.LBFGS(net.parameters(), max_iter=4)
    for _ in range(2):
        x, y = batch()
        def closure():
            lbfgs.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            print("closure", repr(loss.item()))
            return loss
        lbfgs.step(closure)
    scheduler = torch.optim.lr_scheduler.StepLR(early := sgd(net), 1)
    scheduler.step()  # before the optimizer: torch warns
    train(net, early, 2)
    print(type(early.step).__name__, early.step.__qualname__)
    hooked = Net()
    for parameter in hooked.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        def update(parameter, own=own):
            own.step(); own.zero_grad()
        parameter.register_post_accumulate_grad_hook(update)
    teacher = torch.optim.swa_utils.AveragedModel(
        hooked, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(4):
        x, y = batch()
        with torch.no_grad():
            target = teacher(x)
        loss = F.cross_entropy(hooked(x), y) + F.mse_loss(hooked(x), target)
        loss.backward(); teacher.update_parameters(hooked)
        print("taught", repr(loss.item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for number in range(4):
        x, y = batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        scaler.scale(loss * (float("inf") if number == 2 else 1)).backward()
        scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
        print("scaled", repr(loss.item()), scaler.get_scale())
    from torch.utils.checkpoint import checkpoint
    for reentrant in (True, False):
        x, y = batch()
        hidden = checkpoint(net.body, x.requires_grad_(), use_reentrant=reentrant)
        F.cross_entropy(net.head(hidden), y).backward()
        print("checkpointed", reentrant, x.grad.sum().item())
    x, y = batch()
    loss = F.cross_entropy(net(x.requires_grad_()), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.pow(2).sum().backward()
    print("double backward", net.head.weight.grad.sum().item())
    original = optimizer.step
    optimizer.step = lambda *args, **kwargs: (print("patched step"), original(*args, **kwargs))[1]
    train(net, optimizer, 2)
    with torch.autograd.detect_anomaly():
        try:
            torch.sqrt(net(batch()[0]).sum() * 0 - 1).backward()
        except RuntimeError as error:
            print(error)
""",
    "unusual modules": """
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 2)
        def __call__(self, *args, **kwargs):
            print("own __call__")
            return super().__call__(*args, **kwargs)
        def __getattr__(self, name):
            if name == "made up":
                return 1
            return super().__getattr__(name)
        def forward(self, x):
            return self.inner.forward(x)
    class Later(Calls):
        pass
    train(later := Later(), sgd(later))
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    alone = nn.LazyLinear(2)
    for module in (lazy, alone):
        module(batch()[0])
        train(module, sgd(module))
        print(module, type(module), type(module).__mro__)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))
    print(type(normed).__name__)
    train(normed, sgd(normed))
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2)))
    train(spectral, sgd(spectral))
    seen = []
    handles = [
        net.register_forward_pre_hook(lambda module, args: seen.append("before")),
        net.head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape))),
        net.head.register_full_backward_hook(lambda module, *grads: seen.append("backward")),
    ]
    train(net, sgd(net), 2)
    print(seen)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    with torch.profiler.profile() as profiled, torch.no_grad():
        encoder.eval()(torch.randn(2, 4, 8))
    print(sorted({event.key for event in profiled.key_averages()}))
    recurrent, head = nn.LSTM(8, 4, 2, dropout=0.1, batch_first=True), nn.Linear(4, 2)
    optimizer = torch.optim.Adam([*recurrent.parameters(), *head.parameters()])
    state = None
    for _ in range(4):
        x, y = batch()
        out, state = recurrent(x[:, None], state)
        loss = F.cross_entropy(head(out[:, -1]), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        state = [part.detach() for part in state]
        print("lstm", repr(loss.item()))
    for broken in (lambda: net(torch.ones(3)), lambda: Net()(1, 2), lambda: net.head(None)):
        try:
            broken()
        except Exception as error:
            print(type(error), error)
    train(net, sgd(net), 2)
""",
    "state that a program can see": """
    import hashlib, logging, signal, threading, warnings
    import numpy
    optimizer = sgd(net)
    train(net, optimizer)
    print(hashlib.md5(torch.get_rng_state().numpy()).hexdigest())
    print(random.getstate()[1][-1], numpy.random.get_state()[2])
    print(torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype())
    print(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
    print(threading.active_count(), logging.root.handlers, len(warnings.filters))
    print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)])
    print([type(finder).__name__ for finder in sys.meta_path], "sitecustomize" in sys.modules)
    print(sorted(vars(net)), sorted(vars(optimizer)), net, optimizer)
    print(len(net._forward_hooks), len(optimizer._optimizer_step_post_hooks))
    print(sys.getrefcount(net), sys.getrefcount(optimizer))
    print(len(os.listdir("/proc/self/fd")), os.getcwd(), sys.argv, __file__)
    x, y = batch()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    dead = [weakref.ref(value) for value in (net, optimizer, loss)]
    gc.disable()
    del loss
    print(dead[2]() is None)
    del net, optimizer
    print([reference() is None for reference in dead])
""",
    "descriptors closed, as a daemon does": """
    train(net, sgd(net))
    os.closerange(3, 256)
    mine, too = open("mine.txt", "w"), open("mine too.txt", "w")  # open to the end
    train(net, sgd(net))
    mine.write("mine\\n")
    too.write("mine\\n")
""",
    "saved, copied, pickled": """
    import pickle, subprocess
    cloudpickle = None
    try:
        import cloudpickle
    except ImportError:
        pass
    optimizer = sgd(net)
    train(net, optimizer)
    again = copy.deepcopy(net)
    train(again, sgd(again), 2)
    twice = copy.deepcopy(optimizer)
    print(twice)
    torch.save(net, "net.pt")
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, "state.pt")
    torch.save(optimizer, "optimizer.pt")
    torch.save(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), "plain.pt")
    print(len(pickle.dumps(net)), len(pickle.dumps(optimizer)))
    torch.jit.script(net).save("scripted.jit")
    x = torch.ones(1, 8)
    print(net.eval()(x).tolist(), torch.jit.load("scripted.jit").eval()(x).tolist())
    loads = "import sys; sys.modules['flatout'] = None\\n"
    loads += "import pickle, torch\\nx = torch.ones(1, 8)\\n"
    loads += "print(torch.load('plain.pt', weights_only=False)(x).tolist())\\n"
    loads += "print(torch.load('optimizer.pt', weights_only=False))\\n"
    loads += "print(list(torch.load('state.pt', weights_only=True)['net']))\\n"
    if cloudpickle:
        by_value = io.BytesIO(cloudpickle.dumps((Net, net)))
        sys.stdout.flush()
        loads += "made, net = pickle.load(sys.stdin.buffer)\\n"
        loads += "print(net.eval()(x).tolist(), made.__call__.__qualname__)\\n"
        loads += "print(made().load_state_dict(net.state_dict()), made.forward.__qualname__)\\n"
    shell = [sys.executable, "-I", "-c", loads]
    done = subprocess.run(shell, input=by_value.getvalue() if cloudpickle else b"")
    print(done.returncode)
""",
    "workers and child processes": """
    import torch.multiprocessing as mp
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
    import children
    torch.manual_seed(0)
    data = TensorDataset(*batch())
    for how in ({"num_workers": 0}, {"num_workers": 1, "multiprocessing_context": "fork"},
                {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}):
        loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=children.collate, **how)
        optimizer = sgd(net)
        for epoch in range(2):
            for x, y, worker, random_number in loader:
                loss = F.cross_entropy(net(x), y)
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                print(worker, random_number, repr(loss.item()))
        del loader
    mp.spawn(children.train, (net,), nprocs=1)
    context = mp.get_context("fork")
    child = context.Process(target=children.train, args=(0, net))
    child.start(); child.join(); print(child.exitcode)
    pool = mp.get_context("spawn").Pool(1)
    print(pool.map(children.size, [torch.ones(2), net])); pool.close(); pool.join()
    sys.stdout.flush()
    if not os.fork():
        train(net, sgd(net), 2)
        sys.stdout.flush()
        os._exit(0)
    print(os.wait()[1])
""",
    "distributed wrappers": """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 2)
            self.calls = 0
        def forward(self, x):
            self.calls += 1
            return (self.other if self.calls % 2 else self.head)(self.body(x))
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    train(model, sgd(model))
    with model.no_sync():
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    static = DistributedDataParallel(Net(), static_graph=True, gradient_as_bucket_view=True)
    train(static, torch.optim.AdamW(static.parameters()))
    print(list(static.state_dict()))
    mesh = dist.init_device_mesh("cpu", (1,))
    sharded = Net()
    for part in (sharded.body, sharded):
        fully_shard(part, mesh=mesh)
    print(type(sharded), type(sharded).__mro__)
    train(sharded, torch.optim.Adam(sharded.parameters()))
    dist.destroy_process_group()
""",
    "compiled with inductor": """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath("../inductor")  # outlives this run
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes, which import torch
    from torch._dynamo.utils import counters
    compiled = torch.compile(net)
    train(compiled, sgd(net))
    net.eval()
    with torch.no_grad():
        print(compiled(torch.ones(1, 8)).tolist())
    print(dict(counters["graph_break"]), counters["stats"]["unique_graphs"])
    torch.save(net.state_dict(), "model.pt")
""",
}

CHILDREN = """
import torch
from torch import nn
from torch.utils.data import default_collate, get_worker_info

def collate(samples):
    worker = get_worker_info()
    x, y = default_collate(samples)
    return x, y, worker and worker.id, torch.rand(()).item()

def train(rank, net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        loss = net(torch.randn(4, 8)).pow(2).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        print("child", repr(loss.item()), flush=True)

def size(value):
    return value.numel() if isinstance(value, torch.Tensor) else len(list(value.parameters()))
"""


LONG = ("compiled with inductor", "workers and child processes")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in PROGRAMS],
)
def test_same_with_and_without(name: str, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "program.py").write_text(PREAMBLE + PROGRAMS[name])
    (template / "children.py").write_text(CHILDREN)
    own, record = compare(
        [sys.executable, "program.py"], template, tmp_path, Path(sys.executable), bare_runs=1
    )
    assert own.returncode == 0, own.stderr
    assert record.main is not None
    assert record.main.trains
    for process in record.processes:
        assert [event for event in process.events if event.what in ("failed", "skipped")] == []
