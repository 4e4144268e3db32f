"""What watching costs a step, at steps of about 1, 10 and 100 ms, and what flatout costs the calls
without gradients between two steps.

    python benchmarks/overhead.py [--processes 12] [--pairs 6] [--only calls]

*Inside one process* under ``flatout run``, watched and bare steps of one loop take turns: for a
bare step the watches on backward and on the optimizer are taken out, the root is called past its
own, and the one on the loader is asleep (a tenth of a microsecond). Of four steps two are watched,
the outer or the inner ones by lot; their difference cancels drift, and the mean of the middle half
of all differences is a process's figure. The write of the record, which comes four times a second,
is timed apart and added. The 95 % confidence interval is over processes. Exits with 1 if any of it
lies above what is allowed (20 microseconds and 0.5 % of the step).

*Against the bare command*, as a check on that: two living processes, bare and watched, take turns
on one core. They differ by some percent however they are started (memory layout), in either
direction, so this is done for the shortest step only and fails only if the whole interval lies
above what is allowed.

*Calls without gradients*: rollouts of a policy, as those of stable-baselines3's PPO
(``collect_rollouts`` calls the policy, an update calls its method ``evaluate_actions``), and of a
small network. Between two updates stand 600 calls with a batch of one, watched or past the watch,
with or without one setting, of each setting that such a program can get. The order is by lot as
above. Times are CPU times of the only thread, which other work on the machine disturbs less. The
figure is the median of the differences over rounds; its 95 % confidence interval comes from their
order statistics. Fails if the lower end lies above 3 %. If stable-baselines3 is installed, its own
rollouts are timed in the same way.

Run it on a machine that does nothing else; it takes some 20 minutes, most of it for the long
steps, which scatter by more than what is looked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from scipy import stats

ALLOWED_US = 20.0
ALLOWED_SHARE = 0.005
WRITES_A_SECOND = 4
TRIMMED = 0.25
"""Share of the differences left out at either end: steps that another tenant disturbed."""

PREPARED = """
import functools, json, random, statistics, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, turns):
        super().__init__()
        self.turns = turns
        self.first = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.turns):
            x = torch.tanh(self.again(x))
        return self.last(x)

turns, steps = map(int, sys.argv[1:])
torch.manual_seed(0)
torch.set_num_threads(1)
data = TensorDataset(torch.randn(16 * steps, 64), torch.randint(0, 10, (16 * steps,)))
loader = DataLoader(data, batch_size=16)
net = Net(turns)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
loss_function = nn.CrossEntropyLoss()
"""

ALTERNATING = (
    PREPARED
    + """
from torch.optim import optimizer as torch_optimizer

session = sys.modules["flatout.agent"]._session
log = session.hooks._log
batches = iter(loader)
for _ in range(len(loader) // 10):
    x, y = next(batches)
    loss = loss_function(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
session._read()  # the search for roots is over then
assert not session.hooks.tracks_steps
log.read_period_ns = 2**62
watched_backward = torch.autograd._engine_run_backward
(backward_watch,) = (
    watch
    for watch in session.hooks._watches
    if getattr(watch, "name", None) == "_engine_run_backward"
)
step_hooks = [
    (hooks, dict(hooks))
    for hooks in (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
]

def watch(on):
    log.awake = on
    torch.autograd._engine_run_backward = watched_backward if on else backward_watch.original
    for hooks, ours in step_hooks:
        hooks.update(ours) if on else hooks.clear()

bare_net = functools.partial(nn.Module.__call__, net)
lot = random.Random(0)
added, bare, writes = [], [], []
since = time.perf_counter()
for _ in range(len(loader) * 9 // 40):
    order = lot.choice([(True, False, False, True), (False, True, True, False)])
    taken = [0.0, 0.0]
    for on in order:
        watch(on)
        start = time.perf_counter()
        x, y = next(batches)
        outputs = net(x) if on else bare_net(x)
        loss = loss_function(outputs, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken[on] += (time.perf_counter() - start) * 1e6
    bare.append(taken[0] / 2)
    added.append((taken[1] - taken[0]) / 2)
    if time.perf_counter() - since > 0.5:  # a quarter of a second of events
        start = time.perf_counter()
        session._read()
        since = time.perf_counter()
        writes.append((since - start) * 1e6)
watch(True)
print(json.dumps([statistics.median(bare), added, statistics.fmean(writes)]))
"""
)

LOCKSTEP = (
    PREPARED
    + """
for _ in sys.stdin:
    batches = iter(loader)
    start = time.perf_counter()
    for x, y in batches:
        loss = loss_function(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print((time.perf_counter() - start) / steps * 1e6, flush=True)
"""
)

CALLS = """
import functools, json, random, sys, time
import torch
from torch import nn

class Extractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.value = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())

    def forward(self, features):
        return self.policy(features), self.value(features)

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.extractor = Extractor()
        self.action = nn.Linear(64, 2)
        self.value = nn.Linear(64, 1)

    def forward(self, observation):
        policy, value = self.extractor(self.flatten(observation))
        distribution = torch.distributions.Categorical(logits=self.action(policy))
        actions = distribution.sample()
        return actions, self.value(value), distribution.log_prob(actions)

    def evaluate_actions(self, observation, actions):
        policy, value = self.extractor(self.flatten(observation))
        distribution = torch.distributions.Categorical(logits=self.action(policy))
        return self.value(value), distribution.log_prob(actions)

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, observation):
        return self.layers(observation)

    def evaluate_actions(self, observation, actions):
        output = self(observation)
        return output, output

class OwnLoop:
    '''A loop of the kind of PPO's, without an environment.'''

    def __init__(self, net):
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)

    def update(self):
        observation, actions = torch.randn(64, 4), torch.randint(0, 2, (64,))
        value, log_probability = self.net.evaluate_actions(observation, actions)
        loss = value.square().mean() - log_probability.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.optimizer.step()

    def roll_out(self, call, calls):
        with torch.no_grad():
            for _ in range(calls):
                call(torch.zeros(1, 4))

class StableBaselines3:
    def __init__(self):
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback

        class Nothing(BaseCallback):
            def _on_step(self):
                return True

        self.ppo = PPO("MlpPolicy", "CartPole-v1", n_steps=CALLS, n_epochs=1, seed=0, device="cpu")
        _, self.callback = self.ppo._setup_learn(10**9, Nothing())
        self.net = self.ppo.policy

    def update(self):
        if self.ppo.rollout_buffer.full:
            self.ppo.train()

    def roll_out(self, call, calls):
        self.ppo.policy = call if call is not self.net else self.net
        self.ppo.collect_rollouts(self.ppo.env, self.callback, self.ppo.rollout_buffer, calls)
        self.ppo.policy = self.net

class Past:
    '''A module that is called past its watch.'''

    def __init__(self, net):
        self.__dict__["net"] = net

    def __call__(self, *args, **kwargs):
        return nn.Module.__call__(self.net, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.net, name)

kind, rounds, *settings = sys.argv[1:]
CALLS = 600
torch.manual_seed(0)
torch.set_num_threads(1)
loops = {"policy": lambda: OwnLoop(Policy()), "small": lambda: OwnLoop(Small())}
loop = loops.get(kind, StableBaselines3)()
session = sys.modules["flatout.agent"]._session
host = session.host
for _ in range(8):  # the search for roots ends, and each network's inputs are known
    loop.roll_out(loop.net, CALLS)
    loop.update()
session._read()
lot = random.Random(0)
past = (functools.partial(nn.Module.__call__, loop.net) if kind in loops else Past(loop.net))
for setting in ["", *settings]:
    bare, added = [], []
    for _ in range(int(rounds)):
        order = lot.choice([(True, False, False, True), (False, True, True, False)])
        taken = [0.0, 0.0]
        for on in order:
            if on and setting:
                host.applied.apply(*setting.split("="))
            loop.update()
            start = time.thread_time()
            loop.roll_out(loop.net if on else past, CALLS)
            taken[on] += (time.thread_time() - start) / CALLS * 1e6 / 2
            if on and setting:
                host.applied.undo(setting.split("=")[0])
        bare.append(taken[0])
        added.append(taken[1] - taken[0])
    print(json.dumps([setting, bare, added]), flush=True)
"""

CALLS_SETTINGS = (
    *("precision=bf16", "precision=safe", "optimizer=onepass", "elementwise=fast"),
    *("random=fast", "clipping=onepass", "gc=seldom", "zero_grad=none", "gradients=on_demand"),
)
"""The hot settings that a program of small networks can get on a CPU."""

CALLS_ROUNDS = 16
CALLS_IN_A_ROUND = 600
ALLOWED_CALLS_SHARE = 0.03

STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
"""Without it glibc returns memory in one process and keeps it in the next, as the heap happens to
lie, which moves a 10 ms step by 2 ms."""


class Size(NamedTuple):
    """One length of step: the network's turns, and the steps of a process."""

    turns: int
    steps: int


STEPS = {1: 4000, 10: 2000, 100: 500}
"""Milliseconds of a step -> steps of a process."""
LOCKSTEP_STEPS = 100
LOCKSTEP_BLOCKS = 60


class Added(NamedTuple):
    """What watching adds to a step in microseconds: mean and 95 % interval over processes."""

    mean: float
    low: float
    high: float
    single: list[float]

    @classmethod
    def over(cls, single: list[float]) -> Added:
        mean = statistics.fmean(single)
        half = float(stats.t.ppf(0.975, len(single) - 1) * stats.sem(single))
        return cls(mean, mean - half, mean + half, single)

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} us ({self.low:.1f} to {self.high:.1f}, "
            f"single ones {min(self.single):.1f} to {max(self.single):.1f})"
        )


class Bench:
    """The programs in a folder, ready to be started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "alternating.py").write_text(ALTERNATING)
        (folder / "lockstep.py").write_text(LOCKSTEP)
        (folder / "calls.py").write_text(CALLS)

    def start(self, program: str, size: Size, watched: bool) -> subprocess.Popen[str]:
        command = [sys.executable, str(self._folder / program), *map(str, size)]
        if watched:
            command = [sys.executable, "-m", "flatout", "run", "--", *command]
        return self._popen(command)

    def start_calls(self, words: list[str]) -> subprocess.Popen[str]:
        """Start the program of calls without gradients."""
        program = [sys.executable, str(self._folder / "calls.py"), *words]
        return self._popen([sys.executable, "-m", "flatout", "run", "--", *program])

    def _popen(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **STEADY_HEAP, "FLATOUT_HOME": str(self._folder / "home")},
        )

    def alternating(self, size: Size) -> tuple[float, float, float]:
        """One process, in us: its bare step, what watching adds, and what of that is writing."""
        process = self.start("alternating.py", size, watched=True)
        output, said = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(said)
        step_us, added, write_us = json.loads(output)
        writing_us = write_us * WRITES_A_SECOND * step_us / 1e6
        return step_us, float(stats.trim_mean(added, TRIMMED)) + writing_us, writing_us

    def turns(self, step_us: float) -> int:
        """How many turns of the network make a step of this length here."""
        times = []
        for turns in (4, 404):
            loop = self.start("lockstep.py", Size(turns, LOCKSTEP_STEPS), watched=False)
            times.append(min(_block_us(loop) for _ in range(5)))
            loop.communicate()
        turn_us = (times[1] - times[0]) / 400
        return max(1, round(4 + (step_us - times[0]) / turn_us))

    def lockstep(self, turns: int) -> tuple[float, float]:
        """One pair of processes: the bare step, and what watching adds to it, in us."""
        size = Size(turns, LOCKSTEP_STEPS)
        loops = [self.start("lockstep.py", size, watched) for watched in (False, True)]
        for loop in loops * 5:
            _block_us(loop)
        bare, added = [], []
        for turn in range(LOCKSTEP_BLOCKS):
            times = {loop: _block_us(loop) for loop in loops[:: 1 if turn % 2 else -1]}
            bare.append(times[loops[0]])
            added.append(times[loops[1]] - times[loops[0]])
        for loop in loops:
            loop.communicate()
        return statistics.median(bare), float(stats.trim_mean(added, TRIMMED))


def time_calls(bench: Bench, kind: str) -> bool:
    """Time the calls without gradients of one loop; returns whether any setting costs too much."""
    words = [kind, str(CALLS_ROUNDS), *CALLS_SETTINGS]
    process = bench.start_calls(words)
    output, said = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(said)
    failed = False
    for line in output.splitlines():
        setting, bare, added = json.loads(line)
        call_us = statistics.median(bare)
        shares = sorted(one / call_us for one in added)
        rank = int(stats.binom.ppf(0.025, len(shares), 0.5))
        low, high = shares[rank - 1], shares[len(shares) - rank]
        failed |= low > ALLOWED_CALLS_SHARE
        print(
            f"calls without gradients, {kind}, {setting or 'no plan'}: {call_us:.1f} us each, "
            f"{statistics.median(shares):+.1%} under flatout ({low:+.1%} to {high:+.1%}, "
            f"{len(shares)} rounds of {4 * CALLS_IN_A_ROUND} calls)",
            flush=True,
        )
    return failed


def _block_us(loop: subprocess.Popen[str]) -> float:
    """The mean step of the next block of a lockstep loop."""
    assert loop.stdin is not None
    assert loop.stdout is not None
    loop.stdin.write("go\n")
    loop.stdin.flush()
    return float(loop.stdout.readline())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--only", choices=["calls"], help="only the calls without gradients")
    arguments = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two cores differ by some percent
    failed = False
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        kinds = ["policy", "small"]
        kinds += ["stable-baselines3"] * (importlib.util.find_spec("stable_baselines3") is not None)
        for kind in kinds:
            failed |= time_calls(bench, kind)
        if arguments.only == "calls":
            return int(failed)
        for step_ms, steps in STEPS.items():
            size = Size(bench.turns(step_ms * 1e3), steps)
            processes = [bench.alternating(size) for _ in range(arguments.processes)]
            step_us = statistics.fmean(step for step, _, _ in processes)
            writing_us = statistics.fmean(writing for _, _, writing in processes)
            added = Added.over([added for _, added, _ in processes])
            allowed_us = ALLOWED_US + ALLOWED_SHARE * step_us
            failed |= added.high > allowed_us
            print(
                f"{step_ms} ms: a step of {step_us:.0f} us, watching adds {added}, of which "
                f"{writing_us:.1f} us are the record's writing; allowed {allowed_us:.1f} us "
                f"({arguments.processes} processes of {size.steps} steps)",
                flush=True,
            )
        turns = bench.turns(min(STEPS) * 1e3)
        pairs = [bench.lockstep(turns) for _ in range(arguments.pairs)]
        step_us = statistics.fmean(step for step, _ in pairs)
        added = Added.over([added for _, added in pairs])
        allowed_us = ALLOWED_US + ALLOWED_SHARE * step_us
        failed |= added.low > allowed_us
        print(
            f"against the bare command: a step of {step_us:.0f} us, {added} more under flatout; "
            f"allowed {allowed_us:.1f} us ({arguments.pairs} pairs of processes)"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
