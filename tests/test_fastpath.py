"""The knob ``fastpath``: transformer layers in inference compute the same without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knob import Facts
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


def operators(encoder: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    """What it gives, and what it calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profiled:
        output = encoder(args[0], src_key_padding_mask=args[1])
    return output, {event.key for event in profiled.key_averages()}


def test_a_padded_batch_gives_the_same_by_another_way(host: Host) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tokens, lengths = torch.randn(3, 10, 32), torch.tensor([10, 4, 7])
    padding = torch.arange(10) >= lengths[:, None]
    expected, bare = operators(encoder, tokens, padding)
    assert "aten::_transformer_encoder_layer_fwd" in bare
    undo = knobs.get("fastpath").apply(host, "off")
    found, turned = operators(encoder, tokens, padding)
    undo()
    assert "aten::_transformer_encoder_layer_fwd" not in turned
    assert "aten::scaled_dot_product_attention" in turned
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-4)
    assert "aten::_transformer_encoder_layer_fwd" in operators(encoder, tokens, padding)[1]


def test_nested_tensors_of_a_padded_batch_stay_with_their_zeros(host: Host) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    tokens, lengths = torch.randn(3, 10, 32), torch.tensor([10, 4, 7])
    padding = torch.arange(10) >= lengths[:, None]
    expected, bare = operators(encoder, tokens, padding)
    undo = knobs.get("fastpath").apply(host, "off")
    found, turned = operators(encoder, tokens, padding)
    undo()
    assert not expected[padding].any()
    assert torch.equal(found, expected)
    assert turned == bare
    assert torch.backends.mha.get_fastpath_enabled()


def test_called_with_names(host: Host) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [attention(query=x, key=x, value=x)[0], layer(src=x)]

    own = run()
    undo = knobs.get("fastpath").apply(host, "off")
    found = run()
    undo()
    for ours, theirs in zip(found, own, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_the_program_has_chosen_stays(host: Host) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(RefusedError, match="itself"):
            knobs.get("fastpath").apply(host, "off")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_it_is_offered_where_the_fast_path_is_taken() -> None:
    taken = {"aten::_transformer_encoder_layer_fwd": 0.01, "aten::_masked_softmax": 0.7}
    offer = knobs.get("fastpath").offer(Facts("cpu", operators=taken))
    assert offer.settings == ("off",)
    assert offer.share == pytest.approx(0.71)
    assert not knobs.get("fastpath").offer(Facts("cpu", operators={"aten::mm": 1.0})).settings
