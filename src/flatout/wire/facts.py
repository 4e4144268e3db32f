"""What the agent has seen of a program: its models, optimizers, loaders and torch's switches.

``None`` means that a fact is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerFacts:
    """An optimizer of the program.

    Attributes:
        class_: name of its class.
        tensors, elements: how many tensors it updates, and how many elements these have.
        fused: whether a parameter group asks for torch's fused step.
        can_fuse: whether the constructor of its class takes the argument ``fused``.
    """

    class_: str
    tensors: int
    elements: int
    fused: bool
    can_fuse: bool


@dataclass(frozen=True)
class ModuleFacts:
    """The outermost modules, and all modules inside them.

    Attributes:
        roots: names of the classes of the outermost modules.
        kinds: name of a class -> how many modules are of it.
        convolutions_channels_last: how many two-dimensional convolutions have their weights in
            channels_last, and only in that format.
        convolutions_grouped: how many two-dimensional convolutions have groups.
    """

    roots: tuple[str, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    convolutions_channels_last: int | None = None
    convolutions_grouped: int | None = None


@dataclass(frozen=True)
class ParameterFacts:
    """The parameters of the outermost modules.

    Attributes:
        elements_by_dtype: name of a dtype -> elements of that dtype.
        elements_by_device: type of a device -> elements on it.
        denormal_share: share of the float32 elements on the CPU that are smaller than the smallest
            normal number and not zero; ``None``: there are none on the CPU.
        unoptimized_elements: elements that have a gradient and belong to no optimizer.
    """

    elements_by_dtype: Mapping[str, int] = field(default_factory=dict)
    elements_by_device: Mapping[str, int] = field(default_factory=dict)
    denormal_share: float | None = None
    unoptimized_elements: int | None = None


@dataclass(frozen=True)
class LoaderFacts:
    """A data loader of the program.

    Attributes:
        workers: how many worker processes it has.
        batch_size: samples of a batch; ``None`` also where a sampler makes the batches.
        dataset: name of the class of its dataset, beneath subsets.
        pin_memory, persistent_workers: its options of these names.
        settings: settings of the knob ``loader`` that it can take.
    """

    workers: int | None = None
    batch_size: int | None = None
    dataset: str = ""
    pin_memory: bool = False
    persistent_workers: bool = False
    settings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SwitchFacts:
    """Switches of torch.

    Attributes:
        deterministic: whether only deterministic algorithms are allowed.
        anomaly_detection: whether autograd looks for anomalies.
        cudnn_benchmark: whether cuDNN tries its algorithms.
        float32_matmul_precision: ``highest``, ``high`` or ``medium``; ``None`` also where the
            program has set it for single backends.
    """

    deterministic: bool | None = None
    anomaly_detection: bool | None = None
    cudnn_benchmark: bool | None = None
    float32_matmul_precision: str | None = None


@dataclass(frozen=True)
class ProgramFacts:
    """All facts about a program, as they are after its timed steps.

    Attributes:
        optimizers: those that have parameter groups.
        loaders: those that have been iterated over.
        opens_images: whether the program has imported Pillow's reader of JPEG files.
        threads: torch's intra-op threads.
        knobs: names of the knobs that are applied, in alphabetical order.
    """

    optimizers: tuple[OptimizerFacts, ...] | None = None
    modules: ModuleFacts = ModuleFacts()
    parameters: ParameterFacts = ParameterFacts()
    loaders: tuple[LoaderFacts, ...] | None = None
    opens_images: bool | None = None
    switches: SwitchFacts = SwitchFacts()
    threads: int | None = None
    knobs: tuple[str, ...] = ()

    @property
    def loader_settings(self) -> tuple[str, ...] | None:
        """Settings of the knob ``loader`` that at least one loader can take; ``None``: unknown."""
        settings: dict[str, None] = {}
        for loader in self.loaders or ():
            if loader.settings is None:
                return None
            settings |= dict.fromkeys(loader.settings)
        return tuple(settings) if self.loaders else None
