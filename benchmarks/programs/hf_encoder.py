"""Hugging Face Trainer: an encoder learns which package of the standard library a text is from.

    python hf_encoder.py --steps 300 --seed 1

A BERT from its configuration, nothing is downloaded; the tokens are the bytes of the sources.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

PACKAGES = ("asyncio", "ctypes", "email", "http", "json", "multiprocessing", "unittest", "xml")
PACKAGE_BYTES = 60_000
VOCABULARY = 128  # ASCII


class Snippets(Dataset):
    """Overlapping pieces of each package's sources, and the package's number."""

    def __init__(self, context: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        self.samples = []
        for label, package in enumerate(PACKAGES):
            sources = (path.read_bytes() for path in sorted((folder / package).rglob("*.py")))
            text = b"\n".join(source for source in sources if source.isascii())[:PACKAGE_BYTES]
            tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
            for piece in tokens.unfold(0, context, context // 2):
                self.samples.append({"input_ids": piece, "labels": label})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return self.samples[index]


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step} loss {float(logs['loss']):.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            intermediate_size=4 * arguments.width,
            max_position_embeddings=arguments.context,
            num_labels=len(PACKAGES),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.lr,
                logging_steps=10,
                logging_first_step=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=arguments.seed,
            ),
            train_dataset=Snippets(arguments.context),
            callbacks=[PrintLoss()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
