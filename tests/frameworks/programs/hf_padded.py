"""Hugging Face Trainer with texts of many lengths: labels of padding do not count, in batches whose
gradients are accumulated; with an argument, labels are smoothed."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Printing(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        print("loss", repr(loss.item()))
        return loss


def pad(samples):
    padded = torch.nn.utils.rnn.pad_sequence
    tokens = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": padded(tokens, batch_first=True),
        "attention_mask": padded([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": padded(tokens, batch_first=True, padding_value=-100),
    }


set_seed(0)
text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
texts = torch.tensor(list(text[:1685])).clamp(max=127).split([5 + 7 * i % 60 for i in range(50)])
samples = [{"input_ids": row} for row in texts]

config = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2)
trainer = Printing(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        output_dir="out",
        num_train_epochs=1,
        per_device_train_batch_size=5,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=3,
        label_smoothing_factor=0.1 if sys.argv[1:] else 0.0,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=0,
    ),
    train_dataset=samples[:40],
    eval_dataset=samples[40:],
    data_collator=pad,
)
result = trainer.train()
print("mean", repr(result.training_loss))
