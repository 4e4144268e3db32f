"""One program on several ranks: processes that replicate it and share out its root calls."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flatout.intercept.identity import WeakIdentitySet
from flatout.parallel import summary
from flatout.parallel.ending import PartedError
from flatout.parallel.place import Place, launched_processes

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.parallel.kinds import Refusal, Rule
    from flatout.parallel.team import Team


class Parallel:
    """The ranks, as the session of one process has them.

    Args:
        host: of this process.
        place: of this process among the ranks.
        finish: writes the rest of the record, with a reason.
    """

    def __init__(self, host: Host, place: Place, finish: Callable[[str], None]) -> None:
        import torch

        from flatout.parallel import processors
        from flatout.parallel.averaging import Averaging, Leaves
        from flatout.parallel.ending import Ending, Interruption
        from flatout.parallel.loading import Loading
        from flatout.parallel.sharing import Sharing

        self._host = host
        self._place = place
        ranks = host.request.ranks
        self._goes_alone = ranks is not None and ranks.goes_alone
        self._ending = Ending(place, host.events, finish, self._goes_alone, self._state)
        self._interruption = Interruption() if place.rank == 0 else None
        self._stepped_optimizers: WeakIdentitySet[Any] = WeakIdentitySet()
        self._is_alone = False
        self._has_left_call = False
        self._is_forked = False
        is_set = "threads" in host.request.settings
        self._threads = None if is_set else torch.get_num_threads()
        self._leaves = leaves = Leaves()
        self._sharing = Sharing(
            host.events,
            leaves,
            self._form_team,
            _find_rule,
            lambda: (host.roots, self._take_stepped()),
        )
        self._team: Team | None = None
        self._averaging = Averaging(leaves, lambda: self._sharing.team, self._is_in_shard)
        self._loading = Loading(
            host.events,
            self._find_team,
            self.leave,
            self._ending,
            functools.partial(processors.lend, host.request.ranks, place, self._threads),
            fetches_rows="loader" not in host.request.settings,
        )
        self._undo = [
            self._loading.install(self._ending.failed),
            host.forward_wrappers.append(self._forward, self._ending.failed),
            host.backward_wrappers.append(self._backward, self._ending.failed),
            host.before_optimizer_step.append(self._include, self._ending.failed),
            host.after_optimizer_step.append(self._stepped, self._ending.failed),
        ]
        host.hooks.root_search.keeps_watches = True

    def close(self) -> None:
        """Leave the other ranks, at the end of the process."""
        self._remove()
        if self._is_alone:
            return
        if self._team is not None:
            self._host.record.write(
                summary.work_of(self._sharing, self._team, self._host.record.started_ns)
            )
        if self._ending.is_stopping:
            return
        what = "noticed" if self._sharing.has_shared else "unused"
        self._host.events.add(what, "ranks", summary.describe(self._sharing, self._is_forked))
        if self._team is None:
            return
        self._host.events.add("noticed", "ranks", self._team.balance.describe())
        self._ending.note_end()
        self._team.close(is_together=True)
        self._team = None

    def forget(self) -> None:
        """Compute everything whole from now on: this is the child of a fork."""
        global _installed
        _installed = None
        self._is_forked = self._loading.is_over = True
        self._remove()
        if self._interruption is not None:
            self._interruption.forget()
        if self._team is not None:
            self._team.forget()
            self._team = None

    def dismiss(self) -> None:
        """Let the other ranks end: this process stops before the program does."""
        self._ending.note_alone("it stops before the program does")

    def leave(self, why: str) -> None:
        """Do without the other ranks from now on, between two calls: rank 0 computes everything by
        itself, and another rank ends.

        Args:
            why: the reason, a clause for the user; empty: it is recorded elsewhere.
        """
        if self._place.rank:
            self._ending.leave()
        said = [f"rank 0 goes on alone: {why}"] * bool(why) + summary.count_calls(self._sharing)
        if said:
            self._host.events.add("noticed", "ranks", "; ".join(said))
        self._is_alone = self._loading.is_over = True
        if why and self._ending.ticket is None:
            from flatout.parallel import joining

            self._ending.ticket = joining.take_ticket(self._place)  # the others have theirs
        self._ending.note_alone(why)
        if self._team is not None:
            self._host.record.write(
                summary.work_of(self._sharing, self._team, self._host.record.started_ns)
            )
            self._team.close(is_together=False)
            self._team = None
        if self._host.request.ranks is not None:
            from flatout.parallel import processors

            processors.use_all(self._host.request.ranks, self._threads)

    def _remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _forward(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a root call."""
        if self._is_in_meeting():
            return call(module, *args, **kwargs)
        if self._is_alone or self._has_been_interrupted() or self._has_cost_too_much():
            return call(module, *args, **kwargs)
        if self._goes_alone and self._sharing.is_useless:
            self.leave("nothing could be shared out so far")
            return call(module, *args, **kwargs)
        try:
            with self._noting_interrupted_calls():
                return self._sharing(call, module, args, kwargs)
        except PartedError as parted:
            self.leave(str(parted))
        return call(module, *args, **kwargs)

    def _backward(self, call: Callable[..., Any], outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a backward call."""
        from flatout.parallel.crossing import reaches_shards

        if self._is_in_meeting():
            if reaches_shards(outputs):
                self._ending.stop(
                    "--ranks does not support a signal handler that makes a backward call through "
                    "what the ranks have computed together"
                )
            return call(outputs, *args, **kwargs)
        if not (self._is_alone or (self._has_left_call and self._has_been_interrupted())):
            with self._noting_interrupted_calls():
                return self._averaging(call, outputs, *args, **kwargs)
        if reaches_shards(outputs):
            self._ending.stop(
                "rank 0 goes on alone and then makes a backward call through what the ranks have "
                "computed together before, which --ranks does not support"
            )
        return call(outputs, *args, **kwargs)

    @contextlib.contextmanager
    def _noting_interrupted_calls(self) -> Iterator[None]:
        """A context around what ranks do together. The others still wait where it was left."""
        try:
            yield
        except KeyboardInterrupt:
            self._has_left_call = True
            raise

    def _has_been_interrupted(self) -> bool:
        """Whether this is rank 0 and a signal has interrupted the program. From then on it computes
        everything by itself, and the others end."""
        if self._interruption is None or self._is_nested() or not self._interruption.has_come():
            return False
        self.leave("the program was interrupted")
        return True

    def _has_cost_too_much(self) -> bool:
        """Whether this is rank 0 and it goes on alone because that is faster."""
        team, ranks = self._team, self._host.request.ranks
        if team is None or self._place.rank or self._is_nested():
            return False
        if ranks is None or not ranks.gives_up or team.thread != threading.get_ident():
            return False
        if not team.balance.has_lost() or team.graphs.are_open():
            return False
        balance = team.balance
        self.leave(
            f"in {team.step} steps the ranks have cost {balance.cost_s:.1f} s and saved at most "
            f"{balance.saving_s:.1f} s"
        )
        return True

    def _is_in_meeting(self) -> bool:
        """Whether a signal handler of the program runs while this rank does something for the
        others, which have not called it: what it computes is this rank's alone."""
        team = self._team
        is_watched = team is not None and team.thread == threading.get_ident()
        return team is not None and is_watched and team.balance.is_for_ranks

    def _is_nested(self) -> bool:
        return self._sharing.is_in_shard or self._averaging.is_active

    def _is_in_shard(self) -> bool:
        """Whether this thread computes a shard, or looks for a rule."""
        is_watched = self._team is not None and self._team.thread == threading.get_ident()
        return self._sharing.is_in_shard and is_watched

    def _find_team(self, may_form: bool) -> Team | None:
        """Return the ranks if this process may meet them now outside of a call, ``None`` if not.

        Args:
            may_form: whether they may meet for the first time.
        """
        team = self._team
        if team is None:
            is_here = may_form and threading.current_thread() is threading.main_thread()
        else:
            is_here = team.thread == threading.get_ident() and team.balance.is_programs
        if not is_here or self._is_alone or self._has_been_interrupted():
            return None
        return self._sharing.meet_ranks()

    def _form_team(self) -> Team:
        from flatout.parallel import interior, joining, sameness
        from flatout.parallel.team import Team

        with self._ending.between_calls():
            processes = _count_processes_of_program()
            if processes > 1:
                self._ending.stop(
                    f"--ranks is for programs of one process, and this one trains in {processes} "
                    "that share out its batches already: leave --ranks out"
                )
            try:
                connection = joining.join(self._place, self._ending)
            except (AttributeError, ImportError, RuntimeError) as error:
                self._ending.failed(error)
            channel = connection.channel
            self._team = team = Team(channel, self._ending, connection.connect)
            texts = channel.exchange(json.dumps(sys.argv).encode())
            messages = list(map(json.loads, texts))
            if any(message != messages[0] for message in messages):
                self._ending.stop(
                    f"the ranks run different programs: {messages[0]} and {messages[-1]}; programs "
                    "that train at the same time in one job are not supported"
                )
        sameness.agree_on_kernel(channel.exchange)
        self._undo.append(interior.install())
        return team

    def _include(self, optimizer: Any) -> None:
        if not self._is_alone:
            self._averaging.include(optimizer)

    def _take_stepped(self) -> list[Any]:
        """Return the optimizers that have stepped since the last time, in the order in which they
        did first."""
        found = list(self._stepped_optimizers)
        self._stepped_optimizers = WeakIdentitySet()
        return found

    def _stepped(self, optimizer: Any) -> None:
        from flatout.parallel.sharing import COMPARED_STEPS

        if self._team is not None:
            self._stepped_optimizers.add(optimizer)
            self._team.step += 1
            self._team.balance.end_lap()
            self._sharing.compares_state = self._team.step in COMPARED_STEPS

    def _state(self) -> str:
        """Return a digest of what the ranks have computed together and the program keeps."""
        from flatout.parallel import sameness

        if not self._sharing.has_shared:
            return ""
        modules = sameness.state_digest(self._host.roots, self._host.optimizers)
        return f"{modules} {sameness.content_digest(self._leaves.numbered().values())}"


def _count_processes_of_program() -> int:
    """Return how many processes the program itself has made one of, 1 if it has not."""
    from torch import distributed

    connected = 1
    if distributed.is_available() and distributed.is_initialized():
        connected = distributed.get_world_size()
    return max(connected, launched_processes())


def install(host: Host, place: Place, finish: Callable[[str], None]) -> Parallel:
    """Share out the root calls of this process from now on.

    Args:
        host: of this process.
        place: of this process among the ranks.
        finish: writes the rest of the record, with a reason, when the ranks have parted.
    """
    global _installed
    _installed = Parallel(host, place, finish)
    return _installed


def leave() -> None:
    """Do without the other ranks from now on, if this process has any."""
    if _installed is not None:
        _installed.leave("")


_installed: Parallel | None = None
"""What shares out the root calls of this process."""


def _find_rule(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, known: Rule | None
) -> Rule | Refusal:
    from flatout.parallel import checking

    return checking.find_rule(module, args, kwargs, size, known)
