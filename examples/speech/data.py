"""Recorded speech: the voice prompts of the Asterisk telephone system in five languages.

They are the Debian packages asterisk-core-sounds-LANGUAGE-wav (16-bit samples at 8 kHz; CC BY-SA
3.0, the Russian ones CC BY 3.0), 98 MB in all. ``apt-get download`` fetches them, which needs
no root and installs nothing; where there is no apt, put the files into the data folder yourself.

Each language has one speaker. English and Spanish have the same one, so these two cannot be told
apart by the voice; the others can.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import wave
import zlib
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

LANGUAGES = ("en", "es", "fr", "it", "ru")
SAMPLE_RATE = 8000
SECONDS = 2.0
TEST_SHARE = 0.2
FOLDER = Path.home() / ".cache" / "flatout-examples" / "speech"


def download(language: str) -> bytes:
    """The Debian package of ``language``, as apt fetches and verifies it.

    Raises:
        OSError: there is no apt, or it does not find the package.
    """
    # As root apt would drop to a user of its own, who may not write into the scratch folder.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download"]
    with tempfile.TemporaryDirectory() as scratch:
        fetched = subprocess.run(
            [*command, f"asterisk-core-sounds-{language}-wav"],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = list(Path(scratch).glob("*.deb"))
        if fetched.returncode != 0 or not archives:
            reason = fetched.stderr.strip().splitlines()[-1:] or ["apt-get fetched nothing"]
            raise OSError(reason[0])
        return archives[0].read_bytes()


def unpack(package: bytes, target: Path) -> None:
    """Write the WAV files of a Debian package into ``target``.

    A package is an ``ar`` archive: 8 bytes of magic, then members with a header of 60 bytes, name
    first and size at 48 (man 5 deb). The files are in the member ``data.tar.xz``.
    """
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].strip(), int(package[at + 48 : at + 58])
        member = package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
        if name == b"data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(member)) as files:
                for entry in files:
                    if entry.isfile() and entry.name.endswith(".wav"):
                        # usr/share/asterisk/sounds/VOICE/PROMPT.wav, VOICE/digits/PROMPT.wav
                        parts = Path(entry.name).parts
                        prompt = "-".join(parts[parts.index("sounds") + 2 :])
                        (target / prompt).write_bytes(files.extractfile(entry).read())


def fetch(folder: Path) -> None:
    """Fetch what is missing of the recordings into ``folder``/LANGUAGE/."""
    for language in LANGUAGES:
        target = folder / language
        if target.is_dir():
            continue
        print(f"fetching recordings: {language}", file=sys.stderr)
        try:
            package = download(language)
        except OSError as error:
            sys.exit(
                f"cannot fetch the recordings ({error}); put WAV files of speech (8 kHz, 16 bit, "
                f"mono) into {target}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        # Complete or not there: an interrupted run leaves no half of a language behind.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch, language)
            partial.mkdir()
            unpack(package, partial)
            partial.rename(target)


def read_wave(path: Path) -> torch.Tensor:
    """Samples in [-1, 1] of a mono 16-bit file at ``SAMPLE_RATE``."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (SAMPLE_RATE, 2, 1):
            raise ValueError(f"{path} is not mono 16-bit audio at {SAMPLE_RATE} Hz")
        samples = bytearray(file.readframes(file.getnframes()))
    if not samples:
        return torch.zeros(0)
    return torch.frombuffer(samples, dtype=torch.int16).float() / 32768


def first_seconds(samples: torch.Tensor) -> torch.Tensor:
    """The first ``SECONDS`` of ``samples``, filled up with zeros."""
    clip = torch.zeros(int(SECONDS * SAMPLE_RATE))
    clip[: len(samples)] = samples[: len(clip)]
    return clip


def load_speech(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and test clips: waveforms (samples,) of ``SECONDS``, and the language's number.

    A prompt is on the same side in every language, so that no sentence of the test was heard in
    training, in whatever language. Clips under a second are left out.
    """
    fetch(folder)
    clips: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for number, language in enumerate(LANGUAGES):
        for path in sorted((folder / language).glob("*.wav")):
            samples = read_wave(path)
            if "silence" in path.name or len(samples) < SAMPLE_RATE:
                continue
            side = zlib.crc32(path.name.encode()) % 100 < 100 * TEST_SHARE
            clips[side].append(first_seconds(samples))
            labels[side].append(number)
    train, test = (
        TensorDataset(torch.stack(clips[side]), torch.tensor(labels[side])) for side in (0, 1)
    )
    return train, test
