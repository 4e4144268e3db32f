from collections.abc import Callable
from types import TracebackType
from typing import Any

class Log:
    awake: bool
    told: bool
    live: bool
    patience_ns: int
    reader: Callable[[], Any]
    new_root: Callable[[Any], bool | None]
    roots: dict[int, bool]
    is_grad_enabled: Callable[[], bool]
    tensor_type: type
    script_type: type
    aside: Callable[[], Any]
    read_loss: Callable[[Any], object]
    losses: list[object]
    wrap_forward: Callable[..., Any] | None
    strip: Callable[[TracebackType | None], TracebackType | None]
    before_update: Callable[[Any], None] | None
    after_update: Callable[[Any], None] | None
    def take(self) -> list[tuple[int, int, int, int, int, int]]: ...
    def pack(self) -> bytes: ...
    def note(
        self, what: int, phase: int, flags: int, first: int, second: int = 0, third: int = 0
    ) -> None: ...
    def look_by(self, exchange_api: object) -> bool: ...
    def reset(self) -> None: ...

class Watch:
    @property
    def own(self) -> Any: ...
    def __init__(
        self,
        log: Log,
        phase: int,
        own: Any,
        owner: type | None,
        name: str,
        before: Callable[[Any], None] | None,
    ) -> None: ...

class Mark:
    def __init__(self, log: Log, end: bool) -> None: ...
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None: ...
