"""Adapters of low rank (LoRA) by PEFT on a frozen decoder, in a plain loop with a schedule."""

# /// script
# dependencies = ["peft", "transformers"]
#
# [tool.field]
# title = "PEFT, LoRA on a Llama"
# command = ["{python}", "{file}", "--seed", "{seed}"]
# environment = { HF_HUB_OFFLINE = "1" }
# result = 'eval loss ([\d.]+), train loss ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import argparse
import time

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

VOCABULARY, LENGTH = 4_000, 96


def make_texts(count: int, seed: int) -> TensorDataset:
    """Return sequences that repeat their first half."""
    random = torch.Generator().manual_seed(seed)
    half = torch.randint(VOCABULARY // 40, (count, LENGTH // 2), generator=random)
    return TensorDataset(torch.cat([half, half], dim=1))


def main() -> None:
    """Train the adapters, evaluate after each epoch, and save them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
        )
    )
    adapters = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],  # the base is random
    )
    model = get_peft_model(base, adapters)
    model.print_trainable_parameters()
    train = DataLoader(make_texts(320, 1), batch_size=8, shuffle=True)
    evaluation = DataLoader(make_texts(64, 2), batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, args.epochs * len(train))
    start_s = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for (tokens,) in train:
            loss = model(input_ids=tokens, labels=tokens).loss
            total += loss.detach().float()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        eval_loss = 0.0
        for (tokens,) in evaluation:
            with torch.no_grad():
                eval_loss += model(input_ids=tokens, labels=tokens).loss.float()
        train_loss, eval_loss = total / len(train), eval_loss / len(evaluation)
        print(f"{epoch=}: {train_loss=:.4f} {eval_loss=:.4f}", flush=True)
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    model.save_pretrained("adapters")
    print(f"eval loss {eval_loss:.5f}, train loss {train_loss:.5f}")


if __name__ == "__main__":
    main()
