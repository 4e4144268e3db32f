"""Facts that the agent collects about a program: its modules, optimizers, loaders, and switches of
torch.

``None`` means that a fact is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerFacts:
    """An optimizer of the program.

    Attributes:
        class_: the name of its class.
        tensors, elements: the number of tensors that it updates, and of their elements.
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
        roots: the class names of the outermost modules.
        kinds: a map from the name of a class to the number of modules of that class.
        convolutions_channels_last: the number of two-dimensional convolutions whose weights are in
            the memory format channels_last, and in no other format at the same time.
        convolutions_grouped: the number of two-dimensional convolutions with several groups.
    """

    roots: tuple[str, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    convolutions_channels_last: int | None = None
    convolutions_grouped: int | None = None


@dataclass(frozen=True)
class ParameterFacts:
    """The parameters of the outermost modules.

    Attributes:
        elements_by_dtype: a map from the name of a dtype to the number of elements of that dtype.
        elements_by_device: a map from a device type to the number of elements on it.
        denormal_share: the share of the float32 elements on the CPU that are smaller than the
            smallest normal number and not zero; ``None``: there are no such elements on the CPU.
        unoptimized_elements: the number of elements that have a gradient and belong to no
            optimizer.
    """

    elements_by_dtype: Mapping[str, int] = field(default_factory=dict)
    elements_by_device: Mapping[str, int] = field(default_factory=dict)
    denormal_share: float | None = None
    unoptimized_elements: int | None = None


@dataclass(frozen=True)
class LoaderFacts:
    """A data loader of the program.

    Attributes:
        workers: the number of its worker processes.
        batch_size: the number of samples in a batch; ``None`` also if a batch sampler is used.
        dataset: the class name of the dataset, after unwrapping ``Subset``.
        pin_memory, persistent_workers: the constructor's arguments of these names.
        settings: the settings of the knob ``loader`` that apply to this loader.
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
        anomaly_detection: whether autograd detects anomalies.
        cudnn_benchmark: whether cuDNN chooses its algorithms by benchmarks.
        float32_matmul_precision: ``highest``, ``high`` or ``medium``; ``None`` also if the program
            has set different precisions for single backends.
    """

    deterministic: bool | None = None
    anomaly_detection: bool | None = None
    cudnn_benchmark: bool | None = None
    float32_matmul_precision: str | None = None


@dataclass(frozen=True)
class ProgramFacts:
    """All facts about a program, collected after its timed steps.

    Attributes:
        optimizers: the optimizers that have parameter groups.
        modules: the outermost modules and all modules inside them.
        parameters: the parameters of the outermost modules.
        loaders: the data loaders that have been iterated over.
        opens_images: whether the main process has imported Pillow's JPEG plugin, as opening an
            image with Pillow does.
        switches: switches of torch.
        threads: the number of torch's intra-op threads.
        is_distributed: whether the program has initialized ``torch.distributed``.
        knobs: the names of the knobs that are applied, in alphabetical order.
    """

    optimizers: tuple[OptimizerFacts, ...] | None = None
    modules: ModuleFacts = ModuleFacts()
    parameters: ParameterFacts = ParameterFacts()
    loaders: tuple[LoaderFacts, ...] | None = None
    opens_images: bool | None = None
    switches: SwitchFacts = SwitchFacts()
    threads: int | None = None
    is_distributed: bool | None = None
    knobs: tuple[str, ...] = ()

    @property
    def loader_settings(self) -> tuple[str, ...] | None:
        """The settings of the knob ``loader`` that apply to at least one loader; ``None``:
        unknown."""
        settings: dict[str, None] = {}
        for loader in self.loaders or ():
            if loader.settings is None:
                return None
            settings |= dict.fromkeys(loader.settings)
        return tuple(settings) if self.loaders else None
