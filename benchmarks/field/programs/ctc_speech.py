"""Speech by CTC: torchaudio's features and Conformer, on spoken letters made of tones."""

# /// script
# dependencies = ["torchaudio"]
#
# [tool.field]
# title = "torchaudio, Conformer with CTC"
# command = ["{python}", "{file}", "--seed", "{seed}"]
# result = 'letter error rate ([\d.]+), validation loss ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import argparse
import time

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchaudio.functional import edit_distance
from torchaudio.models import Conformer
from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

RATE, LETTERS, MELS = 8_000, 12, 40


class Letters(Dataset):
    """Waves in which each letter is a chord of some length; a sample depends on its index only."""

    def __init__(self, count: int, first: int) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(self.first + index)
        count = int(torch.randint(4, 9, (), generator=random))
        letters = torch.randint(1, LETTERS + 1, (count,), generator=random)
        parts = []
        for letter in letters:
            length = int(torch.randint(RATE // 8, RATE // 4, (), generator=random))
            at_s = torch.arange(length) / RATE
            tone = torch.sin(2 * torch.pi * (200 + 120 * letter) * at_s)
            tone += torch.sin(2 * torch.pi * (350 + 170 * (letter * 5 % LETTERS)) * at_s)
            parts += [tone, torch.zeros(RATE // 20)]
        wave = torch.cat(parts)
        return wave + 0.3 * torch.randn(len(wave), generator=random), letters


class Recognizer(nn.Module):
    """Log-mel features, a convolution that halves their rate, a Conformer and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = MelSpectrogram(RATE, n_fft=256, hop_length=80, n_mels=MELS)
        self.masks = nn.Sequential(FrequencyMasking(8), TimeMasking(20))
        self.halve = nn.Conv1d(MELS, 144, 3, stride=2, padding=1)
        self.conformer = Conformer(144, 4, 288, 4, 15, dropout=0.1)
        self.scores = nn.Linear(144, LETTERS + 1)

    def forward(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log probabilities (time, batch, letters) and their lengths."""
        found = (self.features(waves) + 1e-6).log()
        if self.training:
            found = self.masks(found)
        frames = self.halve(found).transpose(1, 2)
        lengths = ((lengths // 80 + 1 + 1) // 2).clamp(max=frames.shape[1])
        frames, lengths = self.conformer(frames, lengths)
        return self.scores(frames).log_softmax(-1).transpose(0, 1), lengths


def collate(batch):
    """Pad waves and letters."""
    waves, letters = zip(*batch, strict=True)
    return (
        pad_sequence(waves, batch_first=True),
        torch.tensor([len(w) for w in waves]),
        pad_sequence(letters, batch_first=True),
        torch.tensor([len(part) for part in letters]),
    )


def main() -> None:
    """Train, with validation after each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Recognizer()
    loss_of = nn.CTCLoss(zero_infinity=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"batch_size": 16, "collate_fn": collate}
    train = DataLoader(Letters(512, 0), shuffle=True, num_workers=1, **options)
    valid = DataLoader(Letters(64, 10_000), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.epochs * len(train))
    start_s = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for waves, lengths, letters, counts in train:
            optimizer.zero_grad()
            found, frames = model(waves, lengths)
            loss = loss_of(found, letters, frames, counts)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        model.eval()
        errors = total = 0
        losses = []
        with torch.no_grad():
            for waves, lengths, letters, counts in valid:
                found, frames = model(waves, lengths)
                losses.append(loss_of(found, letters, frames, counts).item())
                for number, best in enumerate(found.argmax(-1).T):
                    heard = torch.unique_consecutive(best[: frames[number]])
                    heard = heard[heard != 0].tolist()
                    errors += edit_distance(heard, letters[number, : counts[number]].tolist())
                    total += int(counts[number])
        valid_loss = sum(losses) / len(losses)
        print(f"epoch {epoch}: loss {loss.item():.4f}, validation {valid_loss:.4f}", flush=True)
        torch.save(model.state_dict(), "last.pt")
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    print(f"letter error rate {errors / total:.4f}, validation loss {valid_loss:.4f}")


if __name__ == "__main__":
    main()
