"""A causal language model by Hugging Face's Trainer, which accumulates four batches to a step."""

# /// script
# dependencies = ["transformers", "accelerate", "datasets"]
#
# [tool.field]
# title = "Hugging Face Trainer, GPT-2, gradient accumulation"
# command = ["{python}", "{file}", "{seed}"]
# environment = { HF_HUB_OFFLINE = "1" }
# result = 'eval loss ([\d.]+), train loss ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import sys

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

VOCABULARY, LENGTH = 2_000, 128
TEXTS = {"train": 400, "eval": 64}


def make_texts(count: int, seed: int) -> Dataset:
    """Return sequences in which each token mostly follows from the one before."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=random)
    follows = torch.rand(count, LENGTH, generator=random) < 0.7
    for position in range(1, LENGTH):
        next_tokens = (tokens[:, position - 1] * 7 + 3) % VOCABULARY
        tokens[:, position] = torch.where(follows[:, position], next_tokens, tokens[:, position])
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")


def main() -> None:
    """Train, evaluate after each epoch, and save."""
    seed = int(sys.argv[1])
    set_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=192, n_layer=4, n_head=4)
    )
    arguments = TrainingArguments(
        output_dir="clm",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        warmup_steps=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to="none",
        seed=seed,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_texts(TEXTS["train"], 1),
        eval_dataset=make_texts(TEXTS["eval"], 2),
    )
    trained = trainer.train()
    print(f"trained for {trained.metrics['train_runtime']:.2f} s")
    loss = trainer.evaluate()["eval_loss"]
    print(f"eval loss {loss:.5f}, train loss {trained.training_loss:.5f}")


if __name__ == "__main__":
    main()
