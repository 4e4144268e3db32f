"""The programs, and what each arm edits in them.

Frozen before anything was tuned; a program that changes starts with new results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROGRAMS = Path(__file__).resolve().parent / "programs"
JAX_PROGRAMS = Path(__file__).resolve().parent / "jax"

Edit = tuple[str, str]
"""Text that occurs once in a program, and what stands in its place. ``{options}`` are the options
of ``torch.compile``."""

ONE_THREAD = ("    parser = argparse", "    torch.set_num_threads(1)\n    parser = argparse")
IMPORT_TORCH = ("import argparse\n", "import argparse\n\nimport torch\n")


class Case(NamedTuple):
    """A program.

    Attributes:
        steps: of a run that is timed.
        fused: the edits that choose the fused optimizer; none for inference.
        compiled: the edits that compile its modules.
        by_hand: the edits that an expert makes, who knows what costs time in small steps.
        is_inference: whether it does not train; its outputs are then held to bare's.
    """

    steps: int
    fused: Sequence[Edit]
    compiled: Sequence[Edit]
    by_hand: Sequence[Edit]
    is_inference: bool = False


_ADAM = ("lr=1e-3)\n", "lr=1e-3, fused=True)\n")
_NO_ARGUMENT_CHECKS = (
    "    parser = argparse",
    "    torch.set_num_threads(1)\n"
    "    torch.distributions.Distribution.set_default_validate_args(False)\n"
    "    parser = argparse",
)
_PPO_FUSED = (
    'device="cpu")',
    'device="cpu", policy_kwargs={"optimizer_kwargs": {"eps": 1e-5, "fused": True}})',
)
_SAC_FUSED = (
    'device="cpu")',
    'device="cpu", policy_kwargs={"optimizer_kwargs": {"fused": True}})',
)
_TABNET_FUSED = (
    'device_name="cpu")',
    'device_name="cpu", optimizer_params={"lr": 0.02, "fused": True})',
)
_NHITS_FUSED = (
    "callbacks=[Report()],",
    "callbacks=[Report()],\n        optimizer=torch.optim.Adam,\n        "
    'optimizer_kwargs={"fused": True},',
)
_GAT_FUSED = ("weight_decay=5e-4)", "weight_decay=5e-4, fused=True)")

CASES = {
    "tabular": Case(
        steps=5000,
        fused=[_ADAM],
        compiled=[("    criterion = ", "    model.compile({options})\n    criterion = ")],
        by_hand=[
            ONE_THREAD,
            _ADAM,
            (
                "        for x, y in loader:\n",
                "        for rows in torch.randperm(len(dataset)).split(64):\n"
                "            x, y = (tensor[rows] for tensor in dataset.tensors)\n",
            ),
        ],
    ),
    "kfold": Case(
        steps=6000,
        fused=[_ADAM],
        compiled=[
            ("        model = Net()\n", "        model = Net()\n        model.compile({options})\n")
        ],
        by_hand=[ONE_THREAD, _ADAM],
    ),
    "gru": Case(
        steps=1200,
        fused=[("lr=2e-3)", "lr=2e-3, fused=True)")],
        compiled=[("    optimizer = ", "    model.compile({options})\n    optimizer = ")],
        by_hand=[
            ONE_THREAD,
            ("lr=2e-3)", "lr=2e-3, fused=True)"),
            (
                "        for x, y in loader:\n",
                "        windows = dataset.series.unfold(0, WINDOW, 1).transpose(1, 2)\n"
                "        for rows in torch.randperm(len(dataset)).split(32):\n"
                "            x, y = windows[rows], dataset.series[rows + WINDOW]\n",
            ),
        ],
    ),
    "pinn": Case(
        steps=900,
        fused=[_ADAM],
        compiled=[("    x_start = ", "    model.compile({options})\n    x_start = ")],
        by_hand=[ONE_THREAD, _ADAM],
    ),
    "rows": Case(
        steps=30_000,
        fused=[],
        compiled=[("    total = 0.0\n", "    model.compile({options})\n    total = 0.0\n")],
        by_hand=[
            ONE_THREAD,
            (
                "    total = 0.0\n",
                "    total = 0.0\n"
                "    model = torch.jit.optimize_for_inference("
                "torch.jit.trace(model, requests[0]))\n",
            ),
        ],
        is_inference=True,
    ),
    "gat": Case(
        steps=250,
        fused=[_GAT_FUSED],
        compiled=[("    optimizer = ", "    model.compile({options})\n    optimizer = ")],
        by_hand=[ONE_THREAD, _GAT_FUSED],
    ),
    "ppo": Case(
        steps=16,
        fused=[_PPO_FUSED],
        compiled=[
            IMPORT_TORCH,
            (
                "    model.learn(",
                "    for name in ('forward', 'evaluate_actions', 'predict_values'):\n"
                "        compiled = torch.compile(getattr(model.policy, name), {options})\n"
                "        setattr(model.policy, name, compiled)\n"
                "    model.learn(",
            ),
        ],
        by_hand=[IMPORT_TORCH, _NO_ARGUMENT_CHECKS, _PPO_FUSED],
    ),
    "sac": Case(
        steps=500,
        fused=[_SAC_FUSED],
        compiled=[
            IMPORT_TORCH,
            (
                "    model.learn(",
                "    for module in (model.critic, model.critic_target, model.actor):\n"
                "        module.compile({options})\n"
                "    compiled = torch.compile(model.actor.action_log_prob, {options})\n"
                "    model.actor.action_log_prob = compiled\n"
                "    model.learn(",
            ),
        ],
        by_hand=[IMPORT_TORCH, _NO_ARGUMENT_CHECKS, _SAC_FUSED],
    ),
    "tabnet": Case(
        steps=25,
        fused=[_TABNET_FUSED],
        compiled=[
            IMPORT_TORCH,
            (
                "    classifier.fit(",
                "    TabNet = pytorch_tabnet.tab_network.TabNet\n"
                "    build = TabNet.__init__\n"
                "    def build_compiled(self, *args, **kwargs):\n"
                "        build(self, *args, **kwargs)\n"
                "        self.compile({options})\n"
                "    TabNet.__init__ = build_compiled\n"
                "    classifier.fit(",
            ),
            ("import numpy as np\n", "import numpy as np\nimport pytorch_tabnet.tab_network\n"),
        ],
        by_hand=[IMPORT_TORCH, ONE_THREAD, _TABNET_FUSED],
    ),
    "nhits": Case(
        steps=300,
        fused=[IMPORT_TORCH, _NHITS_FUSED],
        compiled=[("    NeuralForecast(", "    model.compile({options})\n    NeuralForecast(")],
        by_hand=[IMPORT_TORCH, ONE_THREAD, _NHITS_FUSED],
    ),
}


class Arm(NamedTuple):
    """What users do to make such a program faster.

    Attributes:
        what: it is, in words.
        edits: the name of the edits of a case; ``None``: the program stays as it is.
        options: of ``torch.compile``, as source.
        variables: of its environment.
    """

    what: str
    edits: str | None = None
    options: str = ""
    variables: dict[str, str] = {}


ARMS = {
    "bare": Arm("as it is"),
    "fused": Arm("the fused optimizer", "fused"),
    "compile": Arm("torch.compile", "compiled"),
    "compile_max": Arm(
        'torch.compile, mode="max-autotune-no-cudagraphs"',
        "compiled",
        'mode="max-autotune-no-cudagraphs"',
    ),
    "compile_cpp": Arm(
        "torch.compile with cpp_wrapper", "compiled", variables={"TORCHINDUCTOR_CPP_WRAPPER": "1"}
    ),
    "by_hand": Arm("what an expert would do by hand", "by_hand"),
}
"""By name. flatout and JAX are none of them: they edit nothing."""


def edited(name: str, arm: Arm) -> str | None:
    """The source of a program under an arm; ``None``: the program has nothing to edit for it.

    Raises:
        ValueError: a text to be edited does not occur exactly once.
    """
    text = (PROGRAMS / f"{name}.py").read_text("utf-8")
    if arm.edits is None:
        return text
    edits: Sequence[Edit] = getattr(CASES[name], arm.edits)
    if not edits:
        return None
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} occurs {text.count(old)} times")
        text = text.replace(old, new.replace("{options}", arm.options))
    return text
