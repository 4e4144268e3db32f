"""Building kernels, what they make of special values, and the generator of ``bernoulli.c``."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from flatout import kernels, knobs
from flatout.kernels import extensions
from flatout.knobs.random.cpu import Bernoulli
from tests.hosts import host_in

# building


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_a_kernel_is_built_once(empty_cache: Path) -> None:
    library = kernels.build("bernoulli")
    made = library.stat()
    assert kernels.build("bernoulli") == library
    assert library.stat().st_mtime_ns == made.st_mtime_ns
    assert list(empty_cache.iterdir()) == [library]


def test_processes_that_build_at_once_build_it_once(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with eight ranks, each compiled the extensions, on the same cores."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    program = "from flatout import kernels; import torch; kernels.load('bernoulli').bernoulli_8"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 1
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len([command for command in commands if " -c " in command]) == 1


def test_a_builder_that_never_ends_does_not_stop_the_others(tmp_path: Path) -> None:
    library = tmp_path / "kernel.so"
    with kernels.built_by_one(library, 60), kernels.built_by_one(library, 0):
        pass
    assert not list(tmp_path.iterdir())


def test_another_compiler_builds_another(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kernels.build("bernoulli")
    monkeypatch.setenv("CC", "cc -DOTHER")
    assert kernels.build("bernoulli") != first


def test_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(kernels.KernelError, match="there is no C compiler"):
        kernels.build("bernoulli")


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo broken >&2; exit 1", "cannot build bernoulli.c: broken"), ("exit 3", "status 3")],
)
def test_a_compiler_that_fails(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(kernels.KernelError, match=said):
        kernels.build("bernoulli")
    assert list(empty_cache.iterdir()) == []


def test_a_library_that_cannot_be_loaded(empty_cache: Path) -> None:
    kernels.build("bernoulli").write_bytes(b"not a library")
    with pytest.raises(kernels.KernelError, match="cannot be loaded"):
        kernels.load.__wrapped__("bernoulli")


def test_there_is_one_pool_of_threads() -> None:
    program = (
        "import torch\n"
        "from flatout import kernels\n"
        "from flatout.knobs.random.cpu import Bernoulli\n"
        "def pools(): return {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l}\n"
        "torch.ones(10**6).add_(1); before = pools()\n"
        "threads = lambda: len(__import__('os').listdir('/proc/self/task'))\n"
        "count = threads()\n"
        "Bernoulli(kernels.load('bernoulli')).fill(torch.empty(10**6), 0.5, 1)\n"
        "assert pools() == before, pools() - before\n"
        "assert threads() == count\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_function_is_said_by_name() -> None:
    library = kernels.load("bernoulli")
    with pytest.raises(kernels.KernelError, match=r"bernoulli-.*\.so has no function bernouli_8"):
        library.bernouli_8  # noqa: B018 - to read it is what is tested
    with pytest.raises(AttributeError):
        library.__deepcopy__  # noqa: B018 - as of any object


# numbers that are not ordinary, under knobs that compute as torch does but for rounding


def losses(logits: torch.Tensor, **options: Any) -> Callable[[], list[torch.Tensor]]:
    def run() -> list[torch.Tensor]:
        x = logits.clone().requires_grad_()
        loss = F.cross_entropy(x, torch.arange(len(x)), **options)
        (slope,) = torch.autograd.grad(loss.sum(), x)
        return [loss.detach(), slope]

    return run


def unit(inputs: torch.Tensor, first: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        gru = nn.GRU(4, 16, bidirectional=True)
        x, state = inputs.clone().requires_grad_(), first.clone().requires_grad_()
        states, last = gru(x, state)
        wanted = (x, state, *gru.parameters())
        return [states.detach(), *torch.autograd.grad(states.sum() + last.sum(), wanted)]

    return run


def bags(mode: str, outer: torch.Tensor, factor: float) -> Callable[[], list[torch.Tensor]]:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        table = nn.EmbeddingBag(2000, 32, mode=mode, padding_idx=3)
        looked_up, starts = torch.randint(2000, (100,)), torch.tensor([0, 0, 9, 100])
        factors = torch.full((100,), factor) if mode == "sum" else None
        made = table(looked_up, starts, per_sample_weights=factors)
        (slope,) = torch.autograd.grad(made, table.weight, outer)
        return [made.detach(), slope]

    return run


def special_cases() -> Iterator[tuple[str, str, Callable[[], list[torch.Tensor]]]]:
    generator = torch.Generator().manual_seed(0)
    for value in (torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-39):
        logits = torch.randn(32, 1500, generator=generator)
        logits[3, 7], logits[5, 5], logits[8] = value, value, value
        for dtype in (torch.float32, torch.bfloat16):
            for options in (
                {"reduction": "none"},
                {"label_smoothing": 0.1, "reduction": "none"},
                {"label_smoothing": 1.0, "reduction": "sum"},
                {"ignore_index": 5},
            ):
                yield "cross_entropy", "fused", losses(logits.to(dtype), **options)
        inputs, first = torch.randn(5, 3, 4), torch.randn(2, 3, 16)
        inputs[2, 1, 0] = value
        yield "recurrent", "fused", unit(inputs, first)
        first[0, 0, 0] = value
        yield "recurrent", "fused", unit(torch.full((5, 3, 4), -0.0), first)
        outer = torch.ones(4, 32)
        outer[2, 1] = value
        for mode, factor in (("sum", 0.0), ("sum", value), ("mean", 1.0)):
            yield "embedding", "fast", bags(mode, outer, factor)


def test_special_values_come_out_as_torchs(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    for number, (knob, setting, run) in enumerate(special_cases()):
        bare = run()
        undo = knobs.get(knob).apply(host, setting)
        plan = run()
        undo()
        assert not host.applied.failures
        for found, expected in zip(plan, bare, strict=True):
            tolerance = 0.02 if found.dtype is torch.bfloat16 else 2e-5
            torch.testing.assert_close(
                *(found, expected),
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda said, case=(number, knob): f"{case}: {said}",
            )


# the generator


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernels.load("bernoulli")


def words(library: ctypes.CDLL, key: int, blocks: int) -> np.ndarray:
    """Shape ``(blocks, word, lane)``."""
    out = np.empty((blocks, 4, 16), np.uint32)
    library.philox_words(
        ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(blocks), ctypes.c_uint64(key)
    )
    return out


def philox(counter: int, key: int, rounds: int = 7) -> list[int]:
    """Philox4x32 as the paper has it, on Python's integers."""
    mask = 2**32 - 1
    a, b, c, d = counter & mask, counter >> 32, 0, 0
    k0, k1 = key & mask, key >> 32
    for _ in range(rounds):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ k0, y & mask, (x >> 32) ^ d ^ k1, x & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [a, b, c, d]


def test_the_words_are_those_of_the_paper(library: ctypes.CDLL) -> None:
    # The known answers of Random123 1.14, tests/kat_vectors, for counter and key of zeros.
    assert philox(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    for key in (0, 1, 2**63 - 1, 0x0123456789ABCDEF):
        out = words(library, key, 3)
        for counter in range(3 * 16):
            assert out[counter // 16, :, counter % 16].tolist() == philox(counter, key)


@pytest.fixture(scope="module")
def bernoulli(library: ctypes.CDLL) -> Bernoulli:
    return Bernoulli(library)


DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_holds_the_same_draws(bernoulli: Bernoulli, dtype: torch.dtype) -> None:
    for count in (0, 1, 63, 64, 65, 1000):
        expected, out = torch.empty(count), torch.full((count,), 7).to(dtype)
        bernoulli.fill(expected, 0.3, 5)
        bernoulli.fill(out, 0.3, 5)
        assert out.double().tolist() == expected.double().tolist()


def test_the_number_of_threads_changes_nothing(bernoulli: Bernoulli) -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        out = torch.empty(100_001)
        bernoulli.fill(out, 0.1, 9)
        results.append(out)
    torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0]) for out in results)


def test_a_tail_leaves_what_is_behind_it(bernoulli: Bernoulli) -> None:
    whole = torch.full((200,), 7.0)
    bernoulli.fill(whole[:130], 0.5, 3)
    assert set(whole[:130].tolist()) == {0.0, 1.0}
    assert whole[130:].tolist() == [7.0] * 70


def test_zero_and_one_are_certain(bernoulli: Bernoulli) -> None:
    out = torch.empty(1_000_001)
    bernoulli.fill(out, 0.0, 1)
    assert out.sum().item() == 0
    bernoulli.fill(out, 1.0, 1)
    assert out.sum().item() == len(out)


# Each of these tests has one chance in a million to fail for a good generator; the keys are fixed.
SIGNIFICANCE = 1e-6


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.9])
def test_mean_over_positions_and_calls(bernoulli: Bernoulli, p: float) -> None:
    calls = torch.empty(200, 20_000)
    for key, row in enumerate(calls):
        bernoulli.fill(row, p, key)
    ones = int(calls.sum().item())
    assert stats.binomtest(ones, calls.numel(), p).pvalue > SIGNIFICANCE
    for dim, trials in ((0, 200), (1, 20_000)):
        expected = trials * p
        if expected < 5:
            continue
        counts = calls.sum(dim).double().numpy()
        chi = ((counts - expected) ** 2).sum() / (expected * (1 - p))
        tail = stats.chi2(len(counts))
        assert min(tail.cdf(chi), tail.sf(chi)) > SIGNIFICANCE / 2


@pytest.mark.parametrize("lag", [1, 2, 15, 16, 17, 48, 64, 1024])
def test_neighbours_are_independent(bernoulli: Bernoulli, lag: int) -> None:
    out = torch.empty(2_000_000)
    bernoulli.fill(out, 0.5, 77)
    sign = out * 2 - 1
    z = (sign[lag:] * sign[:-lag]).sum().item() / (len(out) - lag) ** 0.5
    assert abs(z) < stats.norm.isf(SIGNIFICANCE / 2)


def test_runs_of_eight_are_equally_frequent(bernoulli: Bernoulli) -> None:
    out = torch.empty(8 * 500_000)
    bernoulli.fill(out, 0.5, 123)
    codes = (out.view(-1, 8) * 2.0 ** torch.arange(8)).sum(1).int()
    assert stats.chisquare(torch.bincount(codes, minlength=256).numpy()).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**62])
def test_calls_are_independent(bernoulli: Bernoulli, other: int) -> None:
    first, second = torch.empty(1_000_000), torch.empty(1_000_000)
    bernoulli.fill(first, 0.5, 0)
    bernoulli.fill(second, 0.5, other)
    table = [[int(((first == i) & (second == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE


def test_words_are_uniform(library: ctypes.CDLL) -> None:
    out = words(library, 42, 20_000).ravel()
    for shift in (0, 8, 16, 24):
        counts = np.bincount((out >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > SIGNIFICANCE


# extensions


@pytest.mark.skipif(extensions.missing() is not None, reason="there is no C++ compiler")
def test_extensions_are_built_before_anything_is_timed(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that built them in between took a minute longer, and tune found no time for a proof."""
    source = empty_cache.parent / "tiny.cpp"
    source.write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("answer") = 42; }\n'
    )
    monkeypatch.setattr(extensions, "_source", lambda name: source)
    with extensions.built_only(), pytest.raises(kernels.KernelError, match="not been built yet"):
        extensions.load("tiny")
    assert not empty_cache.exists()
    assert extensions.load("tiny").answer == 42
    extensions.load.cache_clear()
    with extensions.built_only():
        assert extensions.load("tiny").answer == 42
    extensions.load.cache_clear()


def test_the_jobs_interpreter_builds_them_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    told: list[str] = []
    status = [1, 0]

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        empty_cache.mkdir(exist_ok=True)
        if status.pop(0):
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(extensions.subprocess, "run", run)
    for _ in range(4):
        knobs.build_extensions(
            {"replay", "optimizer", "gc"}, "python", "2.13", lambda: told.append("")
        )
    knobs.build_extensions({"gc"}, "python", "2.13", lambda: told.append(""))
    assert len(commands) == len(told) == 2  # again after a failure, and then not
    assert commands[1][2:] == ["replay", "steps"]
