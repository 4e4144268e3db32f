"""Embed passages of text by a transformer encoder, and find the one nearest to the first.

    python embed_text.py --steps 100

The passages are the standard library's functions, of any length, padded to the longest of a batch.
The encoder has random weights: what it computes is what a trained one of its size would.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 128  # ASCII
LONGEST = 256


class Encoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, width) of length 1 of ``tokens`` (batch, time), 0 where padded."""
        places = torch.arange(tokens.shape[1])
        is_padding = places >= lengths[:, None]
        x = self.tokens(tokens) + self.positions(places)
        x = self.norm(self.encoder(x, src_key_padding_mask=is_padding))
        x = x.masked_fill(is_padding[..., None], 0.0).sum(1) / lengths[:, None]
        return F.normalize(x, dim=1)


def load_passages(count: int) -> list[bytes]:
    """The first functions of the library's modules, at most ``LONGEST`` bytes of each."""
    passages: list[bytes] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes()
        if text.isascii():
            passages += [
                part[:LONGEST] for part in re.split(rb"\n(?=def |class )", text) if len(part) > 40
            ]
        if len(passages) >= count:
            break
    return passages[:count]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="batches to embed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = Encoder(arguments.width, arguments.layers).eval()
    passages = load_passages(2000)
    first = None
    nearest, place = 0.0, 0
    for step in range(arguments.steps):
        at = step * arguments.batch_size % (len(passages) - arguments.batch_size)
        batch = [
            torch.frombuffer(bytearray(passage), dtype=torch.uint8).long()
            for passage in passages[at : at + arguments.batch_size]
        ]
        tokens = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        with torch.no_grad():
            found = model(tokens, torch.tensor([len(passage) for passage in batch]))
        first = found[0] if first is None else first
        likeness = found @ first
        if step == 0:
            likeness[0] = 0.0  # the first itself
        if likeness.max() > nearest:
            nearest, place = likeness.max().item(), at + int(likeness.argmax())
        if step % 5 == 0:
            print(
                f"step {step} nearest {nearest:.4f} mean {likeness.mean().item():.4f}", flush=True
            )
    print(passages[0].decode(), passages[place].decode(), sep="\n--\n")


if __name__ == "__main__":
    main()
