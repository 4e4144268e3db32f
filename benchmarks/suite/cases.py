"""The programs of the suite, as their users run them, and where in their sources a peer's lines go.

Frozen before anything was measured; a program that changes starts with new results. The
recommender was held out until its profile led to the knob ``embedding``; ``diffusion``, frozen and
measured after that, has its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PROGRAMS = ROOT / "benchmarks" / "programs"


class Places(NamedTuple):
    """Where the lines of a peer go. A statement is named by its beginning.

    Attributes:
        built: the statement after which models, optimizers and what hangs on them are there.
        models: their names.
        forward: the statements that compute outputs and losses.
        optimizers: their names, in the order of the models; none for inference.
        losses: whose ``backward`` is called.
        images: name of the batch of images, for ``channels_last``; what sees none has none.
        example: source of a batch as the model gets it, for what compiles a graph beforehand.
        varying: source of ``torch.onnx.export``'s ``dynamic_shapes`` of that batch.
    """

    built: str
    models: tuple[str, ...]
    forward: tuple[str, ...]
    optimizers: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    images: str | None = None
    example: str = ""
    varying: str = "None"


class Case(NamedTuple):
    """A program.

    Attributes:
        script: its file.
        places: where a peer's lines go; ``None``: it is one of Hugging Face's Trainer.
        options: of the program, always.
        steps: of a run that is timed; some six seconds bare.
        kind: what it does.
        is_compute_bound: of the bare step at least half was matrix products and convolutions.
        is_held_out: no work on flatout was guided by its time.
        prepare: options with which it is run once, beforehand.
    """

    script: Path
    places: Places | None
    options: tuple[str, ...] = ()
    steps: int = 100
    kind: Literal["training", "inference"] = "training"
    is_compute_bound: bool = False
    is_held_out: bool = False
    prepare: tuple[str, ...] = ()


_LOADER = Places(
    built="schedule = ",
    models=("model",),
    forward=("loss = ",),
    optimizers=("optimizer",),
    losses=("loss",),
)
"""Of a usual loop with a loader and a schedule."""

_PLAIN = _LOADER._replace(built="optimizer = ")

CASES = {
    "cnn": Case(
        EXAMPLES / "image" / "train.py",
        _LOADER._replace(images="images"),
        ("--epochs", "60"),
        steps=200,
        is_compute_bound=True,
    ),
    "vit": Case(
        EXAMPLES / "image" / "train.py",
        _LOADER,
        ("--model", "vit", "--epochs", "60"),
        steps=400,
    ),
    "gpt": Case(
        EXAMPLES / "language" / "train.py",
        _PLAIN,
        steps=100,
        is_compute_bound=True,
    ),
    "hf_encoder": Case(PROGRAMS / "hf_encoder.py", None, steps=80, is_compute_bound=True),
    "lstm_language": Case(
        PROGRAMS / "lstm_language.py",
        _PLAIN._replace(forward=("logits = ", "loss = ")),
        steps=60,
        is_compute_bound=True,
    ),
    "dcgan": Case(
        PROGRAMS / "dcgan.py",
        Places(
            built="optimizer_g = ",
            models=("net_g", "net_d"),
            forward=("fake = ", "loss_d = ", "loss_g = "),
            optimizers=("optimizer_g", "optimizer_d"),
            losses=("loss_d", "loss_g"),
            images="real",
        ),
        steps=50,
        is_compute_bound=True,
    ),
    "vae": Case(
        PROGRAMS / "vae.py",
        _PLAIN._replace(forward=("logits, mean, log_variance = ", "loss = "), images="images"),
        steps=900,
        is_compute_bound=True,
        is_held_out=True,
    ),
    "diffusion": Case(
        PROGRAMS / "diffusion.py",
        _PLAIN._replace(forward=("predicted = ", "loss = "), images="noisy"),
        steps=60,
        is_compute_bound=True,
        is_held_out=True,
    ),
    "speech": Case(
        EXAMPLES / "speech" / "train.py",
        _LOADER,
        ("--epochs", "60"),
        steps=150,
    ),
    "mlp": Case(
        PROGRAMS / "mlp.py",
        _PLAIN._replace(models=("net",)),
        steps=14_000,
    ),
    "recommender": Case(
        PROGRAMS / "recommender.py",
        _PLAIN._replace(forward=("logits = ", "loss = ")),
        steps=600,
    ),
    "jpeg": Case(
        PROGRAMS / "jpeg.py",
        _PLAIN._replace(images="images"),
        steps=330,
    ),
    "classify_folder": Case(
        PROGRAMS / "classify_folder.py",
        Places(
            built="model.eval()",
            models=("model",),
            forward=("counts += ",),
            images="images",
            example="(torch.zeros(batch_size, 3, PIXELS, PIXELS),)",
        ),
        ("images",),
        steps=100,
        kind="inference",
        is_held_out=True,
        prepare=("--prepare",),
    ),
    "embed_text": Case(
        PROGRAMS / "embed_text.py",
        Places(
            built="model = ",
            models=("model",),
            forward=("found = ",),
            example="(torch.ones(arguments.batch_size, 200, dtype=torch.long), "
            "torch.full((arguments.batch_size,), 200))",
            varying="({1: torch.export.Dim.DYNAMIC}, None)",
        ),
        steps=20,
        kind="inference",
        is_compute_bound=True,
    ),
}
