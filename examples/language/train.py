"""Train a small GPT on the sources of Python's standard library.

    python train.py                        # 1,500 steps: validation loss under 1.75 nats a byte
    python train.py --steps 100 --seed 3

On two CPU cores that takes some minutes.
"""

from __future__ import annotations

import argparse
import math

import torch
from data import VOCABULARY, get_batch, load_corpus
from model import GPT, Config
from torch.nn import functional as F


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=64, help="bytes that it looks back over")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the trained model here")
    return parser.parse_args()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: GPT, text: torch.Tensor, batches: int = 8) -> float:
    """Mean loss in nats a byte over a fixed sample of ``text``."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(batches):
        inputs, targets = get_batch(text, 16, model.config.context, generator)
        losses.append(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item())
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    train_text, validation_text = load_corpus()
    model = GPT(Config(VOCABULARY, arguments.context))
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters, {len(train_text):,} bytes of text")

    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": arguments.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=arguments.lr,
        betas=(0.9, 0.95),
    )
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        inputs, targets = get_batch(
            train_text, arguments.batch_size, model.config.context, generator
        )
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % arguments.log_every == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)
        if (step + 1) % arguments.evaluate_every == 0 or step + 1 == arguments.steps:
            print(f"step {step + 1} validation loss {evaluate(model, validation_text):.6f}")
    if arguments.save:
        torch.save({"config": vars(model.config), "model": model.state_dict()}, arguments.save)


if __name__ == "__main__":
    main()
