"""Tell the language of recordings with a network that train.py has saved.

python train.py --save languages.pt
python infer.py languages.pt FILE.wav ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import LANGUAGES, first_seconds, read_wave
from model import LanguageClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()

    model = LanguageClassifier()
    model.load_state_dict(torch.load(arguments.checkpoint))
    model.eval()
    for path in arguments.files:
        clip = first_seconds(read_wave(path))[None]
        with torch.inference_mode():
            probabilities = model(clip).softmax(1)[0]
        best = int(probabilities.argmax())
        print(f"{path.name}: {LANGUAGES[best]} ({probabilities[best]:.0%})")


if __name__ == "__main__":
    main()
