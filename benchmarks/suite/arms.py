"""The arms: what is written into a plain program, by hand or with the help of a peer.

Each is what the peer's documentation asks for, no more: the program's data, seeds, loop and what it
prints stay. All edits are made in a copy.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.suite.cases import Case, Places


class NotApplicableError(Exception):
    """An arm that a program cannot have; its text is the reason."""


class Source:
    """The source of a program, to be edited at its statements.

    Args:
        text: of the file.
        places: where in it what is.
    """

    def __init__(self, text: str, places: Places) -> None:
        self.text = text
        self.places = places

    def add(self, lines: str) -> None:
        """Add lines where models and optimizers have been built, before those added earlier."""
        self._replace(self.places.built, lambda statement: f"{statement}\n{lines}")

    def forward_under(self, context: str) -> None:
        """Put outputs and losses under a context manager."""
        for beginning in self.places.forward:
            self._replace(beginning, lambda s: f"with {context}:\n{textwrap.indent(s, '    ')}")

    def before_forward(self, lines: str) -> None:
        """Add lines before the first statement that computes outputs."""
        self._replace(self.places.forward[0], lambda statement: f"{lines}\n{statement}")

    def backward_by(self, owner: str) -> None:
        """Have ``owner.backward(loss)`` where ``loss.backward()`` stands."""
        for loss in self.places.losses:
            self._replace(f"{loss}.backward()", lambda _, loss=loss: f"{owner}.backward({loss})")

    def fuse_optimizers(self) -> None:
        """Pass ``fused=True`` to all of torch's optimizers."""
        ends = []
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                if of == "torch.optim" and node.func.attr in ("Adam", "AdamW", "SGD"):
                    last = node.keywords[-1].value if node.keywords else node.args[-1]
                    ends.append((last.end_lineno, last.end_col_offset))
        if not ends:
            raise NotApplicableError("it has none of torch's optimizers")
        lines = self.text.splitlines(keepends=True)
        for row, column in sorted(ends, reverse=True):
            line = lines[row - 1]
            lines[row - 1] = f"{line[:column]}, fused=True{line[column:]}"
        self.text = "".join(lines)

    def _replace(self, beginning: str, change: Callable[[str], str]) -> None:
        """Change the statement that begins so; more than one, or none, is a mistake here."""
        lines = self.text.splitlines()
        found = {
            (node.lineno, node.end_lineno, node.col_offset)
            for node in ast.walk(ast.parse(self.text))
            if isinstance(node, ast.stmt)
            and lines[node.lineno - 1][node.col_offset :].startswith(beginning)
        }
        assert len(found) == 1, f"{len(found)} statements begin with {beginning!r}"
        ((first, last, indentation),) = found
        assert last is not None
        statement = textwrap.dedent("\n".join(lines[first - 1 : last]))
        changed = textwrap.indent(change(statement), " " * indentation)
        self.text = "\n".join([*lines[: first - 1], changed, *lines[last:]]) + "\n"


# What the arms do to a program


def _compiled(source: Source) -> None:
    source.add("\n".join(f"{model}.compile()" for model in source.places.models))


def _autocast(source: Source) -> None:
    source.forward_under('torch.autocast("cpu", torch.bfloat16)')


def _channels_last(source: Source) -> None:
    if source.places.images is None:
        raise NotApplicableError("it has no images")
    source.before_forward(
        f"{source.places.images} = {source.places.images}.contiguous("
        "memory_format=torch.channels_last)"
    )
    source.add(
        "\n".join(f"{m}.to(memory_format=torch.channels_last)" for m in source.places.models)
    )


def _trains(source: Source) -> None:
    if not source.places.optimizers:
        raise NotApplicableError("it has no optimizer")


def _fused(source: Source) -> None:
    if source.places.optimizers:
        source.fuse_optimizers()


def _accelerate(source: Source) -> None:
    names = ", ".join((*source.places.models, *source.places.optimizers))
    source.add(
        "from accelerate import Accelerator\n"
        'accelerator = Accelerator(mixed_precision="bf16", cpu=True)\n'
        f"{names} = accelerator.prepare({names})"
    )
    source.backward_by("accelerator")


def _fabric(source: Source) -> None:
    places = source.places
    lines = [
        "from lightning.fabric import Fabric",
        'fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")',
    ]
    if places.optimizers:
        for names in zip(places.models, places.optimizers, strict=True):
            lines.append(f"{', '.join(names)} = fabric.setup({', '.join(names)})")
    else:
        lines += [f"{model} = fabric.setup({model})" for model in places.models]
    source.add("\n".join(lines))
    source.backward_by("fabric")


def _onnx_runtime(source: Source) -> None:
    if not source.places.example:
        raise NotApplicableError("ONNX Runtime is for inference")
    (model,) = source.places.models
    source.add(
        "import onnxruntime\n"
        f'torch.onnx.export({model}, {source.places.example}, "model.onnx", dynamo=True, '
        f"dynamic_shapes={source.places.varying}, verbose=False)\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        "names = [node.name for node in session.get_inputs()]\n"
        "def by_onnx_runtime(*inputs):\n"
        "    arrays = (tensor.numpy() for tensor in inputs)\n"
        "    return torch.from_numpy(session.run(None, dict(zip(names, arrays)))[0])\n"
        f"{model} = by_onnx_runtime"
    )


def _openvino(precision: str) -> Callable[[Source], None]:
    def edit(source: Source) -> None:
        if not source.places.example:
            raise NotApplicableError("OpenVINO is for inference")
        (model,) = source.places.models
        source.add(
            "import openvino\n"
            f"exported = torch.export.export({model}, {source.places.example}, "
            f"dynamic_shapes={source.places.varying})\n"
            "converted = openvino.convert_model(exported)\n"
            f'compiled = openvino.compile_model(converted, "CPU", '
            f'{{"INFERENCE_PRECISION_HINT": "{precision}", "PERFORMANCE_HINT": "LATENCY"}})\n'
            "def by_openvino(*inputs):\n"
            "    arrays = [tensor.numpy() for tensor in inputs]\n"
            "    return torch.from_numpy(compiled(arrays)[0])\n"
            f"{model} = by_openvino"
        )

    return edit


class Arm(NamedTuple):
    """A way to make a program faster.

    Attributes:
        what: it is, in words.
        edits: done to the source, in this order.
        by_trainer: what the same is for a program of Hugging Face's Trainer: source of more of its
            ``TrainingArguments``; ``None``: there is none, for the reason in ``no_trainer``.
        no_trainer: that reason.
        is_reduced: it computes with less than 32 bits.
    """

    what: str
    edits: Sequence[Callable[[Source], None]] = ()
    by_trainer: str | None = None
    no_trainer: str = "a Trainer has a switch for this only together with bf16"
    is_reduced: bool = False


_OTHERS_LOOP = "the loop is the Trainer's, not the program's"

ARMS = {
    "bare": Arm("as it is", by_trainer=""),
    "compile": Arm("torch.compile", [_compiled], by_trainer="torch_compile=True,"),
    "autocast": Arm(
        "bf16 autocast",
        [_autocast],
        no_trainer="the Trainer's bf16 is Accelerate's",
        is_reduced=True,
    ),
    "fused": Arm(
        "bf16 autocast, fused optimizer",
        [_trains, _autocast, _fused],
        no_trainer="the Trainer's optimizer is fused already",
        is_reduced=True,
    ),
    "fused_channels_last": Arm(
        "bf16 autocast, fused optimizer, channels_last",
        [_channels_last, _autocast, _fused],
        no_trainer="it has no images",
        is_reduced=True,
    ),
    "fused_compile": Arm(
        "bf16 autocast, fused optimizer, torch.compile",
        [_autocast, _fused, _compiled],
        by_trainer="bf16=True,torch_compile=True,",
        is_reduced=True,
    ),
    "all": Arm(
        "bf16 autocast, fused optimizer, channels_last, torch.compile",
        [_channels_last, _autocast, _fused, _compiled],
        no_trainer="it has no images",
        is_reduced=True,
    ),
    "accelerate": Arm(
        'Accelerate, mixed_precision="bf16"',
        [_accelerate],
        by_trainer="bf16=True,",
        is_reduced=True,
    ),
    "fabric": Arm(
        'Lightning Fabric, precision="bf16-mixed"',
        [_fabric],
        no_trainer=_OTHERS_LOOP,
        is_reduced=True,
    ),
    "onnxruntime": Arm("ONNX Runtime", [_onnx_runtime], no_trainer="it trains"),
    "openvino": Arm("OpenVINO, f32", [_openvino("f32")], no_trainer="it trains"),
    "openvino_bf16": Arm(
        "OpenVINO, bf16", [_openvino("bf16")], no_trainer="it trains", is_reduced=True
    ),
}
"""By name; flatout is none of them: it edits nothing."""

LEFT_OUT = {
    "pytorch-autotune 2.0": "its tuner needs a CUDA GPU; on a CPU its optimize() calls "
    "torch.compile and nothing else, which is the arm compile",
}
"""Peers without an arm, and why."""


def edited(case: Case, name: str) -> str:
    """The source of a program under an arm.

    Raises:
        NotApplicableError: the program cannot have it.
    """
    text = case.script.read_text("utf-8")
    arm = ARMS[name]
    if case.places is None:
        if arm.by_trainer is None:
            raise NotApplicableError(arm.no_trainer)
        return text.replace("use_cpu=True,", f"use_cpu=True,{arm.by_trainer}")
    source = Source(text, case.places)
    for edit in arm.edits:
        edit(source)
    return source.text
