"""What the stages of a tune after its first run have in common."""

from __future__ import annotations

from flatout.tune.bare import BareRun
from flatout.tune.ledger import Ledger, Options
from flatout.tune.trial import Trials


class TuneStage:
    """A stage of one tune.

    Args:
        trials: runs the program.
        ledger: the ledger of this tune.
        bare: the first run.
        options: what the user asks for.
    """

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        self._trials = trials
        self._ledger = ledger
        self._bare = bare
        self._options = options
