"""Building kernels, and the generator of ``bernoulli.c``."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from flatout import kernels
from flatout.knobs.random.cpu import Bernoulli

# building


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path))
    return tmp_path / "cache" / "kernels"


def test_a_kernel_is_built_once(empty_cache: Path) -> None:
    library = kernels.build("bernoulli")
    made = library.stat()
    assert kernels.build("bernoulli") == library
    assert library.stat().st_mtime_ns == made.st_mtime_ns
    assert list(empty_cache.iterdir()) == [library]


def test_processes_that_build_at_once_all_get_it(empty_cache: Path) -> None:
    program = "from flatout import kernels; import torch; kernels.load('bernoulli').bernoulli_8"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 1


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
        "Bernoulli(kernels.load('bernoulli'), print).fill(torch.empty(10**6), 0.5, 1)\n"
        "assert pools() == before, pools() - before\n"
        "assert threads() == count\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


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
    return Bernoulli(library, print)


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
