"""Continue a text with a GPT that train.py has saved.

python train.py --save gpt.pt
python infer.py gpt.pt --prompt "def main(" --length 200
"""

from __future__ import annotations

import argparse

import torch
from model import GPT, Config


@torch.inference_mode()
def generate(
    model: GPT, text: torch.Tensor, length: int, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """``text`` (1, time) with ``length`` more bytes, each drawn from the model's prediction."""
    for _ in range(length):
        logits = model(text[:, -model.config.context :])[:, -1] / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        text = torch.cat([text, drawn], dim=1)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.prompt or not arguments.prompt.isascii():
        parser.error("the prompt must be ASCII text, at least one character")

    checkpoint = torch.load(arguments.checkpoint)
    model = GPT(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    prompt = torch.tensor([list(arguments.prompt.encode("ascii"))])
    generator = torch.Generator().manual_seed(arguments.seed)
    text = generate(model, prompt, arguments.length, arguments.temperature, generator)
    print(bytes(text[0].tolist()).decode("ascii"))


if __name__ == "__main__":
    main()
