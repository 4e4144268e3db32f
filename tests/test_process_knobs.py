"""Knobs of the process: MKL, allocator, threads, garbage collection, denormals, precision."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatout import knobs, machine
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs import allocator, code_pages, mkl, threads
from flatout.knobs.gc import FEWEST_FROZEN
from flatout.wire.record import RunRecord, read_run
from flatout.wire.request import Comparison, Request
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


def run(tmp_path: Path, program: str, *settings: str, **environment: str) -> tuple[Any, RunRecord]:
    """What a program prints (JSON) under ``flatout run --set``, and its record."""
    (tmp_path / "program.py").write_text(program)
    home = tmp_path / "home"
    words = [word for setting in settings for word in ("--set", setting)]
    kept = {k: v for k, v in os.environ.items() if k not in (*threads.VARIABLES, "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-m", "flatout", "run", *words, "--", sys.executable, "program.py"],
        cwd=tmp_path,
        env={**kept, "FLATOUT_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run_directory,) = (home / "runs").iterdir()
    return json.loads(done.stdout), read_run(run_directory)


def events(record: RunRecord) -> list[tuple[str, str]]:
    assert record.main is not None
    return [(event.what, event.subject) for event in record.main.events]


# mkl

PRODUCTS = """
import json, torch
torch.manual_seed(0)
worst = 0.0
for a, b in (((300, 200), (200, 100)), ((4, 30, 50), (4, 50, 7)), ((1, 64), (64, 1000))):
    one, other = torch.randn(a), torch.randn(b)
    product = one.double() @ other.double()
    worst = max(worst, (one @ other - product).abs().max().item() / product.abs().max().item())
net = torch.nn.Linear(8, 8)
for _ in range(3): net(torch.randn(4, 8)).sum().backward()
print(json.dumps(worst))
"""

KNOWN = Facts("cpu", operators={"aten::addmm": 0.5, "aten::relu": 0.1})


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_products_are_right_when_mkl_is_told_to_take_all_instructions(tmp_path: Path) -> None:
    if not machine.has_cpu_flags(mkl.FLAGS):
        pytest.skip("this processor has no AVX-512")
    worst, record = run(tmp_path, PRODUCTS, "mkl=avx512")
    assert worst < 1e-6
    assert events(record) == [("applied", "mkl")]


def test_mkl_is_left_alone_where_the_program_was_not_started_for_it(host: Host) -> None:
    with pytest.raises(RefusedError, match="not started with the library"):
        knobs.get("mkl").apply(host, "avx512")


def test_what_is_preloaded_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path))
    preloaded = mkl.variables("avx512", {"LD_PRELOAD": "libmine.so"})["LD_PRELOAD"]
    mine, ours = preloaded.split(":")
    assert mine == "libmine.so"
    assert Path(ours).exists()
    monkeypatch.setattr(mkl.kernels, "find_compiler", lambda: None)
    assert mkl.variables("avx512", {}) == {}


@pytest.mark.parametrize(
    ("vendor", "flags", "facts", "why"),
    [
        ("AuthenticAMD", mkl.FLAGS, KNOWN, None),
        ("GenuineIntel", mkl.FLAGS, KNOWN, "MKL already uses this processor's full"),
        (None, mkl.FLAGS, KNOWN, "the vendor is unknown"),
        ("AuthenticAMD", {"avx2"}, KNOWN, "no AVX-512"),
        ("AuthenticAMD", mkl.FLAGS, Facts("cpu", operators={"aten::relu": 1.0}), "no matmuls"),
    ],
)
def test_mkl_is_offered_where_it_leaves_units_idle(
    vendor: str | None,
    flags: set[str],
    facts: Facts,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(machine, "has_cpu_flags", lambda wanted: wanted <= flags)
    offer = knobs.get("mkl").offer(facts)
    assert offer.settings == (("avx512",) if why is None else ())
    if why is None:
        assert offer.share == pytest.approx(0.3)
    else:
        assert why in (offer.refusal or "")


# allocator

SHOW = "import json, os, torch\nprint(json.dumps({k: os.environ.get(k) for k in %s}))\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("setting", allocator.TUNABLES)
def test_a_program_starts_with_the_tunables(tmp_path: Path, setting: str) -> None:
    shown, record = run(tmp_path, SHOW % ["GLIBC_TUNABLES"], f"allocator={setting}")
    assert shown == {"GLIBC_TUNABLES": allocator.TUNABLES[setting]}
    assert events(record) == [("applied", "allocator")]


FAULTS = """
import json, resource, torch
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
sizes = (12_000_000, 9_000_000, 11_000_000)
for size in sizes: torch.empty(size).fill_(1)
before = faults()
for _ in range(10):
    for size in sizes: torch.empty(size).fill_(1)
print(json.dumps(faults() - before))
"""


@pytest.mark.skipif(
    allocator._glibc() is None or allocator._glibc() < allocator.OLDEST_GLIBC,
    reason="glibc without these tunables",
)
def test_kept_memory_is_not_faulted_in_again(tmp_path: Path) -> None:
    for folder in ("bare", "kept"):
        (tmp_path / folder).mkdir()
    bare, _ = run(tmp_path / "bare", FAULTS)
    kept, _ = run(tmp_path / "kept", FAULTS, "allocator=keep")
    assert bare > 50_000
    assert kept < bare / 100


@pytest.mark.parametrize(
    ("variable", "value"),
    [("GLIBC_TUNABLES", "glibc.malloc.arena_max=1"), ("MALLOC_ARENA_MAX", "2")],
)
def test_an_allocator_that_is_steered_already_is_left_alone(
    tmp_path: Path, variable: str, value: str
) -> None:
    names = ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"]
    program, own = SHOW % names, {variable: value}
    shown, record = run(tmp_path, program, "allocator=keep", **own)
    assert shown == {**dict.fromkeys(names), **own}
    assert record.main is not None
    (event,) = record.main.events
    assert event.what == "skipped"
    assert f"{variable} was set already" in event.why


def test_other_tunables_and_preloads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "library", lambda name: f"lib{name}.so.9")
    given = {"GLIBC_TUNABLES": "glibc.rtld.nns=4", "LD_PRELOAD": "libmine.so"}
    assert allocator.variables("hugepages", given) == {
        "GLIBC_TUNABLES": "glibc.rtld.nns=4:glibc.malloc.hugetlb=1"
    }
    assert allocator.variables("tcmalloc", given) == {"LD_PRELOAD": "libmine.so:libtcmalloc.so.9"}
    assert allocator.variables("jemalloc", {}) == {
        "LD_PRELOAD": "libjemalloc.so.9",
        "MALLOC_CONF": allocator.JEMALLOC_CONF,
    }
    assert allocator.variables("jemalloc", {"LD_PRELOAD": "/opt/libtcmalloc.so"}) == {}


def test_an_allocator_that_is_not_installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "library", lambda name: None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert allocator.variables("jemalloc", {}) == {}
    with pytest.raises(RefusedError, match="jemalloc is not available"):
        knobs.get("allocator").apply(host, "jemalloc")


def test_which_allocators_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(allocator, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(allocator, "library", lambda name: None)
    offer = knobs.get("allocator").offer
    assert offer(Facts("cpu", huge_pages="madvise")).settings == ("keep", "hugepages")
    assert "never" in str(offer(Facts("cpu", huge_pages="never")).refusal)
    monkeypatch.setattr(allocator, "_glibc", lambda: (2, 31))
    assert "2.35" in str(offer(Facts("cpu", huge_pages="always")).refusal)
    monkeypatch.setattr(allocator, "library", lambda name: name)
    assert offer(Facts("cpu")).settings == ("tcmalloc", "jemalloc")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert offer(Facts("cpu")).refusal == "MALLOC_TOP_PAD_ is set already"


# threads


@pytest.fixture
def number() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_set_and_set_back(
    host: Host, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 6)
    for setting, expected in {"one": 1, "half": 3, "all": 6}.items():
        undo = knobs.get("threads").apply(host, setting)
        assert torch.get_num_threads() == expected
        undo()
        assert torch.get_num_threads() == number
    undo = knobs.get("threads").apply(host, "one")
    torch.set_num_threads(4)  # the program's own choice
    undo()
    assert torch.get_num_threads() == 4


def test_threads_of_the_environment_hold(
    host: Host, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(RefusedError, match="the environment sets OMP_NUM_THREADS"):
        knobs.get("threads").apply(host, "one")
    assert torch.get_num_threads() == number


def test_which_numbers_of_threads_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, now, settings in (
        (1, 1, ()),
        (1, 4, ("one",)),
        (2, 2, ("one",)),
        (2, 8, ("all", "one")),
        (8, 8, ("half", "one")),
        (8, None, ("all", "half", "one")),
    ):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        assert knobs.get("threads").offer(Facts("cpu", threads=now)).settings == settings


# code_pages

MOVED_CODE = """
import json, re, threading, types
from pathlib import Path
import torch
from flatout.knobs import code_pages

def step():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    net(torch.randn(8, 32)).square().sum().backward()
    return net[0].weight.grad.tolist()

def mapped_code():
    found = re.findall(r"^(\\w+)-(\\w+) r-xp .* (\\S+torch_cpu\\S*)$",
                       Path("/proc/self/maps").read_text(), re.MULTILINE)
    return sum(int(end, 16) - int(start, 16) for start, end, _ in found)

kept = set()
host = types.SimpleNamespace(keep=lambda knob, name, make: kept)
expected, code = step(), mapped_code()
results, is_over = [], threading.Event()

def keep_computing():
    while not is_over.is_set():
        results.append(torch.arange(1000.0).square().sum().item())

threads = [threading.Thread(target=keep_computing) for _ in range(2)]
for thread in threads:
    thread.start()
found = []
for _ in range(5):
    undo = code_pages.apply(host, "huge")
    moved = code - mapped_code()
    found.append((moved > 0, step() == expected))
    undo()
    found.append((mapped_code() == code, step() == expected))
is_over.set()
for thread in threads:
    thread.join()
print(json.dumps([found, len(set(results))]))
"""


@pytest.mark.skipif(not code_pages._is_supported(), reason="it is for Linux on x86-64")
def test_code_moves_to_huge_pages_and_back_while_threads_run_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MOVED_CODE)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[True, True]] * 10, 1]


def test_code_stays_where_the_system_does_not_allow_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EACCES)
        return -1

    libc = code_pages._libc()
    monkeypatch.setattr(libc, "mprotect", refuse)
    monkeypatch.setattr(code_pages, "_libc", lambda: libc)
    before = Path("/proc/self/maps").read_text().count("torch_cpu")
    with pytest.raises(RefusedError, match=r"does not allow it \(Permission denied\)"):
        code_pages.apply(host, "huge")
    assert Path("/proc/self/maps").read_text().count("torch_cpu") == before


def test_code_is_moved_where_steps_are_short_only() -> None:
    match = code_pages.match
    assert match(Facts("cpu", huge_pages="madvise", overhead_share=0.5)).settings == ("huge",)
    assert not match(Facts("cpu", huge_pages="madvise", overhead_share=0.02)).settings
    assert "are off on this machine" in str(match(Facts("cpu", huge_pages="never")).refusal)


# gc


def test_what_python_itself_has_frozen_is_no_decision(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # CPython 3.12 starts with so many
    before = gc.get_threshold()
    undo = knobs.get("gc").apply(host, "seldom")
    assert gc.get_threshold()[0] > before[0]
    undo()
    assert gc.get_threshold() == before


def test_garbage_is_collected_seldom_and_again_as_ever(host: Host) -> None:
    before = gc.get_threshold()
    undo = knobs.get("gc").apply(host, "seldom")
    assert gc.get_threshold()[0] > before[0]
    assert gc.get_freeze_count() > FEWEST_FROZEN
    assert gc.isenabled()
    undo()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() < FEWEST_FROZEN


def test_a_program_that_decides_on_garbage_itself(host: Host) -> None:
    gc.disable()
    try:
        with pytest.raises(RefusedError, match="itself"):
            knobs.get("gc").apply(host, "seldom")
        assert not gc.isenabled()
        assert gc.get_freeze_count() < FEWEST_FROZEN
    finally:
        gc.enable()
    gc.freeze()
    with pytest.raises(RefusedError, match="itself"):
        knobs.get("gc").apply(host, "seldom")
    gc.unfreeze()
    before = gc.get_threshold()
    undo = knobs.get("gc").apply(host, "seldom")
    gc.set_threshold(5, 5, 5)
    undo()
    assert gc.get_threshold() == (5, 5, 5)
    gc.set_threshold(*before)


# denormals

TINY = """
import json, torch
x = torch.full((1_000_000,), 1e-39)
print(json.dumps([(x * 1.5).count_nonzero().item(), torch.get_num_threads()]))
"""


def test_denormals_are_zero_in_every_thread(tmp_path: Path) -> None:
    (count, number), record = run(tmp_path, TINY, "denormals=flush")
    assert number > 0
    assert count == 0
    assert events(record) == [("applied", "denormals")]
    knob = knobs.get("denormals")
    assert knob.offer(Facts("cpu")).settings == ()


# precision=medium


def products() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    return a @ b, a.double() @ b.double()


def test_medium_stays_within_bfloat16_and_is_undone(host: Host) -> None:
    convolution = torch.nn.Conv2d(16, 16, 3)
    x = torch.randn(2, 16, 32, 32)
    bare, exact = products()
    bare_map = convolution(x)
    undo = knobs.get("precision").apply(host, "medium")
    assert torch.get_float32_matmul_precision() == "medium"
    rounded, _ = products()
    # bfloat16 keeps 8 bits: 2**-8 relative on each factor, 256 products of about 1.
    assert (rounded - exact).abs().max() < 2 * 2**-8 * 256**0.5 * 4
    torch.testing.assert_close(convolution(x), bare_map, rtol=0.05, atol=0.05)
    undo()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(products()[0], bare)
    assert torch.equal(convolution(x), bare_map)


def test_medium_leaves_no_trace_and_no_choice_of_the_program_undone(host: Host) -> None:
    backends: Any = torch.backends
    switches = (backends.mkldnn.matmul, backends.cuda.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    knobs.get("precision").apply(host, "medium")()
    assert [switch.fp32_precision for switch in switches] == before
    undo = knobs.get("precision").apply(host, "medium")
    torch.set_float32_matmul_precision("high")
    try:
        undo()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def test_medium_leaves_a_choice_of_the_program_alone(host: Host) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RefusedError, match="has chosen"):
            knobs.get("precision").apply(host, "medium")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# together


def test_kernels_are_built_and_variables_known_before_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    request = Request(comparison=Comparison(arms=({}, {"random": "fast"})))
    assert knobs.prepare(request, {}) == {}
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    assert knobs.prepare(Request(settings={"allocator": "hugepages"}), {}) == {
        "GLIBC_TUNABLES": allocator.TUNABLES["hugepages"]
    }


def test_an_allocator_is_tried_whatever_one_process_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: allocator.OLDEST_GLIBC)
    monkeypatch.setattr(allocator, "_variable_in_use", lambda environment: None)
    few, many = (
        allocator.KNOB.offer(Facts("cpu", huge_pages="madvise", page_fault_share=share))
        for share in (0.0, 0.2)
    )
    assert few.settings[:2] == many.settings[:2] == ("keep", "hugepages")
    assert (few.share, many.share) == (None, 0.2)
