"""The knob ``attention``: held against float64, seeds and states as ever, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flatout import kernels, knobs
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knob import Facts, Match
from flatout.knobs.attention import blocks as blocks_of_scores
from flatout.knobs.attention import cpu, heads
from flatout.knobs.attention import kernel as asked
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


@pytest.fixture
def fast(host: Host) -> Iterator[None]:
    undo = knobs.get("attention").apply(host, "fast")
    yield
    undo()
    assert not host.applied.failures


@pytest.fixture(params=["whole heads", "one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_is_fast", lambda: request.param == "whole heads")
    if request.param == "many blocks":
        monkeypatch.setattr(asked, "BLOCK_ROWS", 7)
        monkeypatch.setattr(asked, "BLOCK_BYTES", 4 * 7 * 50 * 2)


def inputs(
    rows: int = 37, columns: int = 37, dtype: torch.dtype = torch.float32, width: int = 16
) -> Tensors:
    torch.manual_seed(1)
    shapes = (2, 3, rows, 16), (2, 3, columns, 16), (2, 3, columns, width)
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def raising(error: Exception) -> None:
    raise error


def factors(options: cpu.Options, rows: int, columns: int) -> torch.Tensor:
    """What the kernel multiplies the probabilities with."""
    query, key = torch.zeros(6, rows, 1), torch.zeros(6, columns, 1)
    block = next(options.blocks(slice(0, 6), query, key, None))[0]
    block.rows, block.columns = rows, columns
    made = torch.empty(2, 3, rows, columns)
    kernel().dropout_factors(cpu.ctypes.addressof(block), made.data_ptr())
    return made


def kernel() -> cpu.Kernel:
    return cpu.Kernel(kernels.load("attention"))


def reference(
    tensors: Tensors, mask: torch.Tensor | None, options: cpu.Options
) -> tuple[torch.Tensor, Tensors]:
    """Output and gradients in float64, of inputs with the same rounding."""
    query, key, value = (x.detach().double().requires_grad_() for x in tensors)
    scores = query @ key.mT * options.scale
    rows, columns = scores.shape[2:]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if options.is_causal:
        scores = scores.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(1), -math.inf)
    probabilities = scores.softmax(-1).nan_to_num(0.0)
    output = (probabilities * factors(options, rows, columns).double()) @ value
    return output.detach(), torch.autograd.grad(output.square().sum(), (query, key, value))


MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 37, 45) > 0.3,
    "rows of nothing": lambda: torch.arange(45).expand(2, 3, 37, 45) < torch.arange(37)[:, None],
    "padding": lambda: torch.arange(45) < torch.tensor([31, 0])[:, None, None, None],
    "expanded padding": lambda: (
        torch.arange(45) < torch.tensor([16, 44])[:, None, None, None]
    ).expand(2, 3, 37, 45),
    "numbers for each head": lambda: torch.randn(3, 1, 45),
    "two dimensions": lambda: torch.randn(37, 45),
    "bfloat16": lambda: torch.randn(2, 3, 37, 45).bfloat16(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_with_a_mask_as_in_float64(blocks: None, mask: Callable[[], torch.Tensor | None]) -> None:
    tensors, chosen = inputs(37, 45, width=20), mask()
    options = cpu.Options(0.3, False, 50_000, 77, 3)
    output = cpu.apply(*tensors, chosen, options, kernel(), raising, pytest.fail)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    expected, expected_gradients = reference(tensors, chosen, options)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    for found, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 30_000, 65_536])
@pytest.mark.parametrize("shape", [(37, 37), (5, 200), (200, 5), (1, 1), (130, 300)])
def test_causal_as_in_float64(blocks: None, shape: tuple[int, int], keep: int) -> None:
    tensors = inputs(*shape)
    options = cpu.Options(0.25, True, keep, 5, 3)
    output = cpu.apply(*tensors, None, options, kernel(), raising, pytest.fail)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    expected, expected_gradients = reference(tensors, None, options)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
    for found, right in zip(gradients, expected_gradients, strict=True):
        largest = right.abs().max().item()
        torch.testing.assert_close(found.double(), right, atol=1e-4 + 1e-5 * largest, rtol=1e-4)


def test_in_bfloat16_about_as_close_to_float64_as_torch_is(blocks: None) -> None:
    tensors = inputs(64, 64, torch.bfloat16)
    options = cpu.Options(
        0.25, True, cpu.ALWAYS, 5, 3
    )  # without dropout, to have torch's own beside it
    expected = reference(tensors, None, options)

    def errors(output: torch.Tensor) -> list[float]:
        gradients = torch.autograd.grad(output.float().square().sum(), tensors)
        pairs = zip((output, *gradients), (expected[0], *expected[1]), strict=True)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    ours = errors(cpu.apply(*tensors, None, options, kernel(), raising, pytest.fail))
    torchs = errors(F.scaled_dot_product_attention(*tensors, is_causal=True))
    assert all(a < 1.6 * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


@pytest.mark.parametrize(
    ("rows", "columns", "width", "mask"),
    [
        *((37, 45, 23, name) for name in MASKS),
        *(
            (37, 37, 23, "causal"),
            (130, 77, 64, "causal"),
            (1, 45, 1, "none"),
            (64, 64, 32, "none"),
        ),
    ],
)
def test_in_bfloat16_as_in_float64(
    blocks: None, rows: int, columns: int, width: int, mask: str
) -> None:
    causal = mask == "causal"
    chosen = None if causal else MASKS[mask]()
    tensors = inputs(rows, columns, torch.bfloat16, width)
    options = cpu.Options(0.3, causal, 50_000, 77, 3)
    output = cpu.apply(*tensors, chosen, options, kernel(), raising, pytest.fail)
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    expected, expected_gradients = reference(tensors, chosen, options)
    for found, right in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (found.double() - right).norm() <= 0.015 * right.norm() + 0.01


@pytest.mark.parametrize("width", [1, 8, 16, 23, 64, 100])
def test_widths_and_strides_of_whole_heads(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """As a model's projection gives them: heads side by side in a row, one of them transposed."""
    monkeypatch.setattr(heads, "_is_fast", lambda: True)
    torch.manual_seed(2)
    leaves = tuple(torch.randn(2, 21, 3 * width, requires_grad=True) for _ in range(2))
    query, key = (x.view(2, 21, 3, width).transpose(1, 2) for x in leaves)
    last = torch.randn(2, 3, width, 21, requires_grad=True)
    options = cpu.Options(0.3, False, 40_000, 9, 3)
    output = cpu.apply(query, key, last.mT, None, options, kernel(), raising, pytest.fail)
    outer = torch.randn(2, 21, 3, width).transpose(1, 2)
    found = torch.autograd.grad(output, (*leaves, last), outer)
    exact = tuple(x.detach().double().requires_grad_() for x in (*leaves, last))
    one, other = (x.view(2, 21, 3, width).transpose(1, 2) for x in exact[:2])
    probabilities = (one @ other.mT * 0.3).softmax(-1) * factors(options, 21, 21).double()
    right = probabilities @ exact[2].mT
    torch.testing.assert_close(output.double(), right, atol=1e-5, rtol=1e-5)
    for a, b in zip(found, torch.autograd.grad(right, exact, outer.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whatever_the_default_dtype(blocks: None, dtype: torch.dtype) -> None:
    tensors = inputs()

    def run() -> Tensors:
        mask = torch.arange(37) < torch.arange(37)[:, None] + 3
        options = cpu.Options(0.3, False, 50_000, 77, 3)
        output = cpu.apply(*tensors, mask, options, kernel(), raising, pytest.fail)
        return output, *torch.autograd.grad(output.sum(), tensors)

    expected = run()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_large_scores_overflow_nothing() -> None:
    tensors = tuple((x.detach() * 100).requires_grad_() for x in inputs())
    options = cpu.Options(1.0, True, cpu.ALWAYS, 5, 3)
    output = cpu.apply(*tensors, None, options, kernel(), raising, pytest.fail)
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert all(x.isfinite().all() for x in (output, *gradients))
    expected = reference(tensors, None, options)[0]
    torch.testing.assert_close(output.double(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("mask", ["none", "numbers for each head"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0, 2.0])
def test_scales_of_all_kinds(blocks: None, scale: float, mask: str) -> None:
    tensors, chosen = inputs(37, 45), MASKS[mask]()
    options = cpu.Options(scale, False, cpu.ALWAYS, 5, 3)
    output = cpu.apply(*tensors, chosen, options, kernel(), raising, pytest.fail)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    expected, expected_gradients = reference(tensors, chosen, options)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    for found, right in zip(gradients, expected_gradients, strict=True):
        largest = right.abs().max().item()
        torch.testing.assert_close(found.double(), right, atol=1e-4 + 1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("size", [1e5, 1e9, 1e15])
def test_of_enormous_scores_the_largest_is_taken(blocks: None, size: float) -> None:
    query, key, value = (x.detach() for x in inputs())
    options = cpu.Options(0.3, False, cpu.ALWAYS, 5, 3)
    output = cpu.apply(
        query * size, key * size, value, None, options, kernel(), raising, pytest.fail
    )
    expected = reference((query * size, key * size, value), None, options)[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def bmm_spoils_the_row_before(dtype: torch.dtype) -> bool:
    """Whether torch's own product reads a row of odd length one element too far, as oneDNN does on
    processors with AMX: what is not a number then spoils two rows."""
    left = torch.ones(1, 37, 37, dtype=dtype)
    left[0, 20] = math.nan
    return bool(torch.bmm(left, torch.ones(1, 37, 16, dtype=dtype))[0, 19].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_none(blocks: None, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    options = cpu.Options(0.3, True, cpu.ALWAYS, 5, 3)
    with torch.no_grad():
        query[0, 1, 20, 3] = math.nan
        query[1, 2, 30] = math.inf  # scores of both signs
    output = cpu.apply(query, key, value, None, options, kernel(), raising, pytest.fail)
    expected = reference((query, key, value), None, options)[0]  # 0 where it is not a number
    row_is_bad = torch.zeros(2, 3, 37, dtype=torch.bool)
    row_is_bad[0, 1, 20] = row_is_bad[1, 2, 30] = True
    good = ~row_is_bad
    if bmm_spoils_the_row_before(dtype):
        good[:, :, :-1] &= ~row_is_bad[:, :, 1:]
    assert output[row_is_bad].isnan().any(-1).all()
    assert not output[good].isnan().any()
    torch.testing.assert_close(output[good].double(), expected[good], atol=0.02, rtol=0.02)
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
    for found in gradients:
        assert found[0, 1].isnan().any()
        assert found[1, 2].isnan().any()
        assert found[0, 0].isfinite().all()
    assert gradients[2][0, 1, :21].isnan().all()  # of all values that the row sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_that_is_not_finite_spoils_what_it_does_in_torch(
    host: Host, dtype: torch.dtype, where: str, value: float
) -> None:
    """0 times what is not finite is no number, also where nobody sees it."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(2, 2, 33, 16) for name in ("query", "key", "value")}
    tensors[where][0, 0, -1] = value
    mask = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    for seen in (30, 0):  # none at all in the second
        mask[0, ..., seen:] = False
        bare, plan = (
            F.scaled_dot_product_attention(*(x.to(dtype) for x in tensors.values()), attn_mask=mask)
            for _ in turned_off_and_on(host)
        )
        assert torch.equal(bare.isnan(), plan.isnan()), seen
        torch.testing.assert_close(plan, bare, rtol=0.02, atol=0.02, equal_nan=True)


def turned_off_and_on(host: Host) -> Iterator[None]:
    yield
    undo = knobs.get("attention").apply(host, "fast")
    yield
    undo()


def test_the_same_with_any_number_of_threads(fast: None) -> None:
    def run(threads: int) -> Tensors:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            tensors = inputs(200, 200)
            output = F.scaled_dot_product_attention(*tensors, dropout_p=0.3)
            return output, *torch.autograd.grad(output.square().sum(), tensors)
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        assert torch.equal(one == 0, two == 0)


def test_each_probability_is_kept_as_often_as_asked(fast: None) -> None:
    kept = dropout(rows=64, columns=300, dropout_p=0.3) > 0
    share = kept.float().mean((0, 1))
    count = kept.shape[0] * kept.shape[1]
    deviation = math.sqrt(0.3 * 0.7 / count)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=5 * deviation / 138)
    assert (share - 0.7).abs().max() < 6 * deviation
    neighbours = (kept[..., 1:] == kept[..., :-1]).float().mean().item()
    heads = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx(0.58, abs=0.004)
    assert heads == pytest.approx(0.58, abs=0.004)


def dropout(rows: int, columns: int, dropout_p: float) -> torch.Tensor:
    """Dropped probabilities, all of which were the same before."""
    query, key = torch.zeros(4, 16, rows, 8), torch.zeros(4, 16, columns, 8)
    value = torch.eye(columns).expand(4, 16, columns, columns)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)


def test_the_mean_of_the_output_is_that_without_dropout(fast: None) -> None:
    assert dropout(64, 300, 0.3).mean().item() == pytest.approx(1 / 300, rel=2e-3)
    assert dropout(64, 300, 0.9999).max().item() == pytest.approx(65536 / 7 / 300)


def test_seeds_and_saved_states_mean_what_they_meant(fast: None) -> None:
    torch.manual_seed(3)
    first = dropout(8, 40, 0.5)
    state = torch.get_rng_state()
    second = dropout(8, 40, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(8, 40, 0.5), first)
    torch.set_rng_state(state)
    assert torch.equal(dropout(8, 40, 0.5), second)


def test_paired_leaves_the_generator_as_torch_does(host: Host) -> None:
    torch.manual_seed(3)
    dropout(8, 40, 0.5)
    expected = torch.rand(3)
    undo = knobs.get("attention").apply(host, "paired")
    torch.manual_seed(3)
    ours = dropout(8, 40, 0.5)
    assert torch.equal(torch.rand(3), expected)
    undo()
    torch.manual_seed(3)
    assert not torch.equal(dropout(8, 40, 0.5), ours)
    assert torch.equal(torch.rand(3), expected)


def test_undone_it_is_torchs_own_again(host: Host) -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(8, 40, 0.5)

    own = drawn()
    for _ in range(2):
        undo = knobs.get("attention").apply(host, "fast")
        assert not torch.equal(drawn(), own)
        undo()
        assert torch.equal(drawn(), own)


def left_alone(tensors: Tensors) -> dict[str, Callable[[], Any]]:
    query, key, value = tensors
    attend = F.scaled_dot_product_attention
    bias = torch.zeros(37, 37, requires_grad=True)
    wide = [x[..., :1].expand(2, 3, 37, 130) for x in (key, value)]

    def jvp() -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query, query)
            made = attend(dual, key, value, dropout_p=0.5)
            return torch.autograd.forward_ad.unpack_dual(made).tangent

    return {
        "hardly any dropout": lambda: attend(query, key, value, dropout_p=1e-6),
        "no dropout, long rows": lambda: attend(query[..., :1].expand(2, 3, 37, 130), *wide),
        "all dropped": lambda: attend(query, key, value, dropout_p=1.0),
        "three dimensions": lambda: attend(query[0], key[0], value[0], dropout_p=0.5),
        "float64": lambda: attend(*(x.double() for x in tensors), dropout_p=0.5),
        "a batch that broadcasts": lambda: attend(query, key[:1], value[:1], dropout_p=0.5),
        "grouped queries": lambda: attend(
            query, key[:, :1], value[:, :1], dropout_p=0.5, enable_gqa=True
        ),
        "a mask with gradient": lambda: torch.autograd.grad(
            attend(query, key, value, bias, dropout_p=0.5).sum(), bias
        )[0],
        "torch.func": lambda: torch.func.grad(lambda x: attend(x, key, value, dropout_p=0.5).sum())(
            query
        ),
        "vmap": lambda: torch.vmap(
            lambda x: attend(x, key[0], value[0], dropout_p=0.5), randomness="different"
        )(query),
        "forward mode": jvp,
        "compiled": lambda: torch.compile(attend, backend="aot_eager")(
            query, key, value, dropout_p=0.5
        ),
        "empty": lambda: attend(query[:, :, :0], key, value, dropout_p=0.5),
    }


@pytest.mark.parametrize("case", left_alone(inputs()))
def test_left_to_torch(host: Host, case: str) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return left_alone(inputs())[case]()

    own = run()
    undo = knobs.get("attention").apply(host, "fast")
    torch._dynamo.reset()
    assert torch.equal(run(), own)
    undo()
    assert not host.applied.failures


def calls_of(run: Callable[[], Any]) -> set[str]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        run()
    return {event.key for event in profiled.key_averages()}


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("rows", "trains", "is_ours"),
    [(37, True, True), (600, True, False), (600, False, True), (2100, False, False)],
)
def test_without_dropout_heads_of_a_fitting_size(
    host: Host, monkeypatch: pytest.MonkeyPatch, rows: int, trains: bool, is_ours: bool
) -> None:
    monkeypatch.setattr(heads, "_is_fast", lambda: True)
    tensors = [x[:1, :1] for x in inputs(rows, rows)]

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(trains):
            return F.scaled_dot_product_attention(*tensors, is_causal=True)

    state = torch.get_rng_state()
    undo = knobs.get("attention").apply(host, "fast")
    output = run()
    called = calls_of(run)
    undo()
    assert (FLASH in called) is not is_ours
    torch.testing.assert_close(output, run(), atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert FLASH in calls_of(run)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("layout", ["of a projection", "in order"])
def test_without_dropout_the_output_has_torchs_layout(
    host: Host, monkeypatch: pytest.MonkeyPatch, layout: str, trains: bool
) -> None:
    """A program may view it as it is used to."""
    monkeypatch.setattr(heads, "_is_fast", lambda: True)
    tensors = [x.detach().requires_grad_(trains) for x in inputs()]
    if layout == "of a projection":
        tensors = [
            x.transpose(1, 2).contiguous().view(2, 37, 3, 16).transpose(1, 2) for x in tensors
        ]
    own = F.scaled_dot_product_attention(*tensors)
    undo = knobs.get("attention").apply(host, "fast")
    found = F.scaled_dot_product_attention(*tensors)
    undo()
    assert found.stride() == own.stride()


def test_a_backend_that_the_program_has_chosen_stays(
    fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_is_fast", lambda: True)
    with sdpa_kernel(SDPBackend.MATH):
        called = calls_of(lambda: F.scaled_dot_product_attention(*inputs()))
    assert "aten::_scaled_dot_product_attention_math" in called


def test_without_the_registers_attention_without_dropout_is_torchs(
    fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_is_fast", lambda: False)
    assert FLASH in calls_of(lambda: F.scaled_dot_product_attention(*inputs()))


def test_transformer_layers_in_inference_take_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_is_fast", lambda: True)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tokens, padding = torch.randn(3, 10, 32), torch.arange(10) >= torch.tensor([[10], [4], [7]])

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return layer(tokens, src_key_padding_mask=padding).clone()

    own = run()
    undo = knobs.get("attention").apply(host, "fast")
    off = knobs.get("fastpath").apply(host, "off")  # together, in any order
    undo()
    undo = knobs.get("attention").apply(host, "fast")
    off()
    found, called = run(), calls_of(run)
    undo()
    assert not {"aten::_transformer_encoder_layer_fwd", FLASH} & called
    torch.testing.assert_close(found[~padding], own[~padding], atol=1e-5, rtol=1e-4)
    assert "aten::_transformer_encoder_layer_fwd" in calls_of(run)
    assert not host.applied.failures


def test_it_is_tried_where_there_is_attention() -> None:
    def offered(**operators: float) -> Match:
        shares = {name.replace("__", "::"): share for name, share in operators.items()}
        return knobs.get("attention").offer(
            Facts("cpu", operators=shares, unfused_attention_share=0.0)
        )

    flash = {"aten__scaled_dot_product_attention": 0.01, FLASH.replace("::", "__"): 0.2}
    assert offered(**flash).share == pytest.approx(0.2)
    taken = {"aten___transformer_encoder_layer_fwd": 0.1, "aten___masked_softmax": 0.3}
    assert offered(**taken).share == pytest.approx(0.4)
    assert not offered(aten__mm=1.0).settings


@pytest.mark.parametrize("mistake", [{"is_causal": True}, {"attn_mask": torch.ones(3, 3)}])
def test_mistakes_are_reported_by_torch(fast: None, mistake: dict[str, Any]) -> None:
    mistake = {"attn_mask": torch.zeros(37, 37), **mistake}
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*inputs(), dropout_p=0.5, **mistake)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_gradient_of_the_gradient(fast: None, is_transposed: bool) -> None:
    tensors = tuple(x.detach().double() for x in inputs(5, 5))

    def penalty(query: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        single = (query.float(), *(x.float() for x in tensors[1:]))
        if is_transposed:
            single = tuple(x.mT.contiguous().mT for x in single)
        output = F.scaled_dot_product_attention(*single, dropout_p=0.5, is_causal=True)
        gradient = torch.autograd.grad(output.square().sum(), query, create_graph=True)[0]
        return gradient.square().sum()

    query = tensors[0].requires_grad_()
    found = torch.autograd.grad(penalty(query), query)[0]
    direction = torch.randn_like(query)
    step = 1e-3
    difference = penalty(query + step * direction) - penalty(query - step * direction)
    slope = difference.item() / (2 * step)
    assert (found * direction).sum().item() == pytest.approx(slope, rel=2e-2)


def test_recomputed_under_activation_checkpointing(fast: None) -> None:
    def gradients(is_checkpointed: bool) -> Tensors:
        tensors = inputs()
        torch.manual_seed(3)

        def block(*args: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(*args, dropout_p=0.5, is_causal=True) * 2

        output = (
            checkpoint(block, *tensors, use_reentrant=False) if is_checkpointed else block(*tensors)
        )
        return torch.autograd.grad(output.square().sum(), tensors)

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_backward_under_autocast_and_after_a_layout_of_its_own(fast: None) -> None:
    def gradients(in_autocast: bool) -> Tensors:
        tensors = inputs()
        torch.manual_seed(3)
        swapped = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
        output = F.scaled_dot_product_attention(*swapped, dropout_p=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
            return torch.autograd.grad(output.transpose(1, 2).reshape(2, 37, -1).sum(), tensors)

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("when", ["outputs", "gradients"])
def test_a_failure_is_reported_and_the_result_is_there(
    host: Host, monkeypatch: pytest.MonkeyPatch, when: str, is_whole: bool
) -> None:
    def gradients(breaks: str = "") -> Tensors:
        tensors = inputs()
        torch.manual_seed(3)
        if breaks:
            module = heads if is_whole else blocks_of_scores
            monkeypatch.setattr(
                module, "IMPLEMENTATION", module.IMPLEMENTATION._replace(**{breaks: None})
            )
        output = F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
        return torch.autograd.grad(output.square().sum(), tensors)

    monkeypatch.setattr(heads, "_is_fast", lambda: is_whole)
    own = gradients()
    undo = knobs.get("attention").apply(host, "fast")
    ours = gradients()
    found = gradients(when)
    undo()
    assert "TypeError" in host.applied.failures["attention"]
    for one, other in zip(found, own if when == "outputs" else ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_backend_is_preferred_inside_module_calls(host: Host) -> None:
    from torch.nn.attention import SDPBackend

    from flatout.knobs.attention import Preference

    order = torch._C._get_sdp_priority_order()
    seen = []
    prefer = Preference("CUDNN_ATTENTION")
    found = prefer(
        lambda module, x, y: seen.append(torch._C._get_sdp_priority_order()) or x + y,
        None,
        (1,),
        {"y": 2},
    )
    assert found == 3
    assert seen[0][0] == int(SDPBackend.CUDNN_ATTENTION)
    assert torch._C._get_sdp_priority_order() == order
    with pytest.raises(RefusedError, match="CUDA"):
        knobs.get("attention").apply(host, "cudnn")
