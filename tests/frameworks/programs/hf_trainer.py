"""Hugging Face Trainer: a tiny GPT-2 on a file of the standard library, evaluated and saved."""

import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Printing(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        print("loss", repr(loss.item()))
        return loss


set_seed(0)
text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()[: 64 * 65]
tokens = torch.tensor(list(text)).clamp(max=127).view(-1, 65)[:, :64]
samples = [{"input_ids": row, "labels": row} for row in tokens]

config = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2)
trainer = Printing(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        output_dir="out",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=0,
    ),
    train_dataset=samples[:48],
    eval_dataset=samples[48:],
)
result = trainer.train()
trainer.save_model("final")
print("mean", repr(result.training_loss))
