from collections.abc import Callable
from types import TracebackType
from typing import Any

class Log:
    awake: bool
    keeps_events: bool
    live: bool
    wraps_inference: bool
    read_period_ns: int
    reader: Callable[[], Any]
    check_root: Callable[[Any], bool | None]
    roots: dict[int, bool]
    is_grad_enabled: Callable[[], bool]
    is_traced: Callable[[], bool]
    tensor_type: type
    script_type: type
    disable_modes: Callable[[], Any]
    start_loss_copy: Callable[[Any], object]
    losses: list[object]
    wrap_forward: Callable[..., Any] | None
    strip_frames: Callable[[TracebackType | None], TracebackType | None]
    before_optimizer_step: Callable[[Any], None] | None
    after_optimizer_step: Callable[[Any], None] | None
    def take_events(self) -> list[tuple[int, int, int, int, int, int]]: ...
    def take_packed(self) -> bytes: ...
    def append(
        self, kind: int, phase: int, flags: int, first: int, second: int = 0, third: int = 0
    ) -> None: ...
    def set_exchange_api(self, exchange_api: object) -> bool: ...
    def reset(self) -> None: ...

class Watch:
    @property
    def original(self) -> Any: ...
    def __init__(
        self,
        log: Log,
        phase: int,
        original: Any,
        owner: type | None,
        name: str,
        before: Callable[[Any], None] | None,
    ) -> None: ...

class StepHook:
    def __init__(self, log: Log, end: bool) -> None: ...
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None: ...
