"""The word-level language model of pytorch/examples: an LSTM whose update is written by hand.

Run by itself, this file makes the text: sentences of a random grammar.
"""

# /// script
# dependencies = []
#
# [tool.field]
# title = "pytorch/examples, `word_language_model`"
# command = [
#     "{python}", "{source}/word_language_model/main.py", "--data", "{data}", "--epochs", "2",
#     "--log-interval", "50", "--tied", "--seed", "{seed}",
# ]
# prepares = true
# result = 'End of training \| test loss +([\d.]+)'
#
# [tool.field.source]
# repository = "https://github.com/pytorch/examples"
# commit = "77f55b9"
# paths = ["word_language_model/*.py"]
# ///

from pathlib import Path

import numpy as np

WORDS = {"train": 100_000, "valid": 10_000, "test": 10_000}
VOCABULARY, FOLLOWERS = 4_000, 8


def main() -> None:
    """Write the text: each word has few followers, and few words are common."""
    random = np.random.default_rng(0)
    share = 1 / np.arange(1, VOCABULARY + 1)
    common = random.choice(VOCABULARY, size=(VOCABULARY, FOLLOWERS), p=share / share.sum())
    for part, count in WORDS.items():
        word, lines, line = 0, [], []
        for _ in range(count):
            follows = random.random() < 0.8
            follower, other = common[word, random.integers(FOLLOWERS)], random.integers(VOCABULARY)
            word = int(follower if follows else other)
            line.append(f"word{word}")
            if random.random() < 0.05:
                lines.append(" ".join(line))
                line = []
        Path(f"{part}.txt").write_text("\n".join([*lines, " ".join(line)]) + "\n")


if __name__ == "__main__":
    main()
