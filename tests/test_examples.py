"""The example programs: they train, repeat themselves bit for bit, and infer from a checkpoint."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import wave
from pathlib import Path
from types import ModuleType

import forking
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED = {
    "cnn": ("image", "--model", "cnn"),
    "vit": ("image", "--model", "vit"),
    "language": ("language",),
    "speech": ("speech",),
}


def run(
    example: str, program: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of an example in its folder, on one thread."""
    return forking.run(
        [sys.executable, program, *arguments],
        cwd=EXAMPLES / example,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout_s=1800,
    )


def output(example: str, program: str, *arguments: str | Path) -> str:
    finished = run(example, program, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The real recordings, fetched once into the example's own cache."""
    finished = run("speech", "train.py", "--epochs", "0")
    if "cannot fetch" in finished.stderr:
        pytest.skip(finished.stderr.strip().splitlines()[-1])
    assert finished.returncode == 0, finished.stderr
    return speech_data().FOLDER


def speech_data() -> ModuleType:
    """The module ``examples/speech/data.py``, under a name that no other example has."""
    path = EXAMPLES / "speech" / "data.py"
    specification = importlib.util.spec_from_file_location("speech_data", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_wave(path: Path, value: int, seconds: float = 1.5, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(value.to_bytes(2, "little") * int(seconds * rate))


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_same_seed_same_output(name: str, request: pytest.FixtureRequest) -> None:
    if name == "speech":
        request.getfixturevalue("recordings")
    example, *options = TRAINED[name]
    first, again, other = (
        output(example, "train.py", *options, "--steps", "3", "--seed", seed)
        for seed in ("5", "5", "6")
    )
    assert re.search(r"step 0 loss \d\.\d{6}\n", first)
    assert first == again
    assert first != other


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_image_optimizers_and_workers(optimizer: str) -> None:
    options = ("--optimizer", optimizer, "--steps", "2", "--batch-size", "8")
    assert "test accuracy" in output("image", "train.py", *options, "--workers", "1")


@pytest.mark.long
@pytest.mark.parametrize("model", ["cnn", "vit"])
def test_image_inference_finds_the_accuracy_of_training(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "digits.pt"
    trained = output("image", "train.py", "--model", model, "--steps", "20", "--save", saved)
    recognised = re.search(r"(\d+) of 1000 images", output("image", "infer.py", saved))
    assert recognised is not None
    assert f"test accuracy {int(recognised[1]) / 1000:.4f}" in trained


@pytest.mark.long
def test_language_inference_continues_the_prompt(tmp_path: Path) -> None:
    saved = tmp_path / "gpt.pt"
    output("language", "train.py", "--steps", "2", "--save", saved)
    texts = [
        output("language", "infer.py", saved, "--prompt", "import ", "--length", "80", "--seed", s)
        for s in ("1", "1", "2")
    ]
    assert texts[0].startswith("import ")
    assert len(texts[0]) == len("import ") + 80 + 1
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", ["", "caf\u00e9"])
def test_language_inference_refuses_a_prompt_it_cannot_read(prompt: str, tmp_path: Path) -> None:
    finished = run("language", "infer.py", tmp_path / "gpt.pt", "--prompt", prompt)
    assert finished.returncode == 2
    assert "must be ASCII" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_speech_inference_names_a_language(recordings: Path, tmp_path: Path) -> None:
    saved = tmp_path / "languages.pt"
    output("speech", "train.py", "--steps", "2", "--save", saved)
    files = [recordings / language / "vm-goodbye.wav" for language in ("en", "fr")]
    lines = output("speech", "infer.py", saved, *files).splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"vm-goodbye\.wav: (en|es|fr|it|ru) \(\d+%\)", line) for line in lines)


def test_recordings_are_named_by_prompt_alone(recordings: Path) -> None:
    """What keeps a prompt on one side of the split: its name is the same in every language."""
    names = [{path.name for path in folder.iterdir()} for folder in sorted(recordings.iterdir())]
    assert len(names) == 5
    assert len(set.intersection(*names)) > 400


def test_no_prompt_is_in_both_training_and_test(tmp_path: Path) -> None:
    data = speech_data()
    for language in data.LANGUAGES:
        for prompt in range(1, 41):  # the samples tell which prompt a clip is
            write_wave(tmp_path / language / f"prompt-{prompt}.wav", prompt)
        write_wave(tmp_path / language / "short.wav", 50, seconds=0.5)
    train, test = data.load_speech(tmp_path)
    prompts = [
        {round(clip[0].item() * 32768) for clip in side.tensors[0]} for side in (train, test)
    ]
    assert prompts[0].isdisjoint(prompts[1])
    assert prompts[0] | prompts[1] == set(range(1, 41))
    assert all(
        len(side) == 5 * len(seen) for side, seen in zip((train, test), prompts, strict=True)
    )


def test_unpack_reads_a_debian_package(tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", 7)
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:xz") as archive:
        for name in ("VOICE/a.wav", "VOICE/digits/1.wav", "README"):
            archive.add(tmp_path / "a.wav", f"./usr/share/asterisk/sounds/{name}")
    package = b"!<arch>\n"
    for name, member in ((b"debian-binary", b"2.0"), (b"data.tar.xz", files.getvalue())):
        package += name.ljust(48) + b"%-10d`\n" % len(member) + member + b"\n" * (len(member) % 2)
    target = tmp_path / "unpacked"
    target.mkdir()
    speech_data().unpack(package, target)
    assert sorted(path.name for path in target.iterdir()) == ["a.wav", "digits-1.wav"]
    assert (target / "a.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()


def test_unreachable_recordings_are_one_sentence(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    finished = run("speech", "train.py", "--data", tmp_path / "speech", **nowhere)
    assert finished.returncode == 1
    assert "cannot fetch the recordings" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "speech").exists()


def test_no_example_imports_flatout() -> None:
    for path in EXAMPLES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            assert not any(module.split(".")[0] == "flatout" for module in modules), path


@pytest.mark.measured
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "options", "accuracy"),
    [("cnn", (), 0.95), ("vit", ("--epochs", "15"), 0.92), ("speech", (), 0.90)],
)
def test_stated_accuracy(
    name: str, options: tuple[str, ...], accuracy: float, request: pytest.FixtureRequest
) -> None:
    if name == "speech":
        request.getfixturevalue("recordings")
    example, *model = TRAINED[name]
    trained = output(example, "train.py", *model, *options)
    assert float(re.findall(r"test accuracy (\S+)", trained)[-1]) > accuracy


@pytest.mark.measured
@pytest.mark.timeout(3600)
def test_stated_loss_of_the_language_example() -> None:
    trained = output("language", "train.py")
    assert float(re.findall(r"validation loss (\S+)", trained)[-1]) < 1.75
