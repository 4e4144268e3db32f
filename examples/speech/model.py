"""From a waveform to log-mel features to a small convolutional and recurrent network."""

from __future__ import annotations

import torch
from data import LANGUAGES, SAMPLE_RATE
from torch import nn
from torch.nn import functional as F

WINDOW = 200  # 25 ms
HOP = 80  # 10 ms
FFT = 256
MELS = 40


def mel_filters() -> torch.Tensor:
    """Triangular filters (``MELS``, FFT // 2 + 1), evenly spaced on the mel scale
    2595 log10(1 + f / 700) (O'Shaughnessy 1987)."""

    def to_mel(hertz: torch.Tensor) -> torch.Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    frequencies = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)
    top = to_mel(torch.tensor(SAMPLE_RATE / 2)).item()
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0)


class LanguageClassifier(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("filters", mel_filters())
        self.register_buffer("window", torch.hann_window(WINDOW))
        self.convolutions = nn.Sequential(
            *(nn.Conv1d(MELS, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.recurrent = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, len(LANGUAGES))

    def features(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Log-mel features (batch, MELS, frames), each clip normalised."""
        spectrum = torch.stft(
            waveforms, FFT, HOP, WINDOW, self.window, return_complex=True, pad_mode="constant"
        )
        mel = (self.filters @ spectrum.abs().square() + 1e-6).log()
        return F.layer_norm(mel, mel.shape[1:])

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Logits (batch, languages) of ``waveforms`` (batch, samples)."""
        frames = self.convolutions(self.features(waveforms)).transpose(1, 2)
        states, _ = self.recurrent(frames)
        return self.head(self.dropout(states.mean(1)))
