"""An LSTM language model on the standard library's sources, with dropout and Adam.

    python lstm_language.py --steps 500 --seed 1

Random windows of the text, each from a state of zeros; the vocabulary is that of its words.
"""

from __future__ import annotations

import argparse
import collections
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

TEXT_BYTES = 2_000_000


def load_tokens(vocabulary: int) -> torch.Tensor:
    """The words and signs of the sources as numbers; 0 for all that are rare."""
    words: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text("utf-8", errors="ignore")
        words += re.findall(r"\w+|[^\w\s]|\n", text)
        size += len(text)
        if size >= TEXT_BYTES:
            break
    counts = collections.Counter(words).most_common(vocabulary - 1)
    numbers = {word: number for number, (word, _) in enumerate(counts, 1)}
    return torch.tensor([numbers.get(word, 0) for word in words])


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocabulary) of what follows each of ``tokens``."""
        states, _ = self.lstm(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(states))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    tokens = load_tokens(arguments.vocabulary)
    windows = tokens.unfold(0, arguments.context + 1, 1)
    model = LanguageModel(
        arguments.vocabulary, arguments.width, arguments.layers, arguments.dropout
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
    for step in range(arguments.steps):
        batch = windows[torch.randint(len(windows), (arguments.batch_size,), generator=generator)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
