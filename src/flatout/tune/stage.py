"""The base class of the stages of a tune that follow its first run."""

from __future__ import annotations

from flatout.tune.bare import BareRun
from flatout.tune.ledger import Ledger, Options
from flatout.tune.trial import Trials


class TuneStage:
    """A stage of one tune.

    Args:
        trials: the runner of trials.
        ledger: the ledger of this tune, which holds what was tried (``ledger.py``).
        bare: the results of the first run, which ran the bare program.
        options: the options that the user gave.
    """

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        self._trials = trials
        self._ledger = ledger
        self._bare = bare
        self._options = options
