"""An LSTM language model on the standard library's sources, updated without an optimizer object.

    python lstm_by_hand.py --steps 500 --seed 1

Truncated backpropagation through time: the text is cut into parallel streams, the state goes on
from step to step, and the update is the plain one of gradient descent, with clipped gradients.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 128  # ASCII
TEXT_BYTES = 2_000_000

State = tuple[torch.Tensor, torch.Tensor]


class LanguageModel(nn.Module):
    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, text: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Logits (time, batch, vocabulary) of the byte that follows each of ``text``, and state."""
        outputs, state = self.lstm(self.dropout(self.embedding(text)), state)
        return self.head(self.dropout(outputs)), state

    def first_state(self, batch_size: int) -> State:
        zeros = torch.zeros(self.lstm.num_layers, batch_size, self.lstm.hidden_size)
        return zeros, zeros.clone()


def load_streams(batch_size: int) -> torch.Tensor:
    """The text as (time, batch size): each column is a part of it."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_bytes()
        if source.isascii():
            text += source
        if len(text) >= TEXT_BYTES:
            break
    length = len(text) // batch_size
    flat = torch.frombuffer(text, dtype=torch.uint8)[: length * batch_size].long()
    return flat.view(batch_size, length).t().contiguous()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--context", type=int, default=35)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=5.0)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    streams = load_streams(arguments.batch_size)
    model = LanguageModel(arguments.width, arguments.layers, arguments.dropout)
    parameters = list(model.parameters())
    state = model.first_state(arguments.batch_size)
    at = 0
    for step in range(arguments.steps):
        if at + arguments.context >= len(streams):
            at = 0
            state = model.first_state(arguments.batch_size)
        inputs = streams[at : at + arguments.context]
        targets = streams[at + 1 : at + 1 + arguments.context]
        at += arguments.context
        hidden, cell = state
        model.zero_grad()
        logits, state = model(inputs, (hidden.detach(), cell.detach()))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, arguments.clip)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= arguments.lr * parameter.grad
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
