"""``flatout run``: runs a command to its end, with a plan or only watched."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flatout import paths
from flatout.cli import options
from flatout.cli.streams import say
from flatout.errors import UserError
from flatout.launch import companion_stage, companions, environment, hosts, launcher, nodes, process
from flatout.launch.runs import new_run_directory
from flatout.plan import PLAN_FILE
from flatout.wire.record import RecordError, read_step_times
from flatout.wire.request import GuardRequest, ProvenConditions, ProvenLoss, Request
from flatout.wire.writer import reason_record_incomplete

if TYPE_CHECKING:
    from flatout.cli.watching import Watcher
    from flatout.plan import Plan

SUMMARY = "run a command, with a plan or only watched"
EXAMPLES = (
    "flatout run --plan flatout.toml python train.py",
    "flatout run --set optimizer=onepass --set gc=seldom python train.py",
    "flatout run --tune python train.py",
)
TAKES_JOB = True
ARGUMENT = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout run``."""
    options.add_plan(
        parser,
        f"apply this plan; with --tune, write what was learned to it (then default: {PLAN_FILE})",
        has_default=False,
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="learn while training: compare settings that leave the arithmetic as it is during the "
        "first steps, keep the faster ones, and write them as an unproven plan",
    )
    options.add_set(parser, "apply this setting by hand, on top of the plan")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="apply the whole plan even if machine, torch, program, arguments or inputs have "
        "changed since its proof",
    )
    parser.add_argument(
        "--ranks",
        type=_ranks_option,
        metavar="N",
        help="(new, see docs/ranks.md) run the command as N processes, each on its share of the "
        "cores, which share out the batches; rank 0 is the program, and what the other ranks "
        "write is discarded; env: this process is one rank that torchrun, srun or a PyTorchJob has "
        "started (default: as the plan says, or 1)",
    )
    parser.add_argument(
        "--nodes",
        type=options.positive,
        metavar="M",
        help="run N ranks on each of M hosts: give the same command on each (needs --rendezvous)",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="where the hosts find each other: one of them, and a free port there",
    )
    parser.add_argument(
        "--restarts",
        type=options.positive,
        metavar="K",
        help="if a rank dies or the command fails, run it again, up to K times: it goes on from "
        "its own checkpoint, if it reads one (needs --ranks; with --nodes, torchrun does it)",
    )


def _ranks_option(text: str) -> int | Literal["env"]:
    return "env" if text == "env" else options.positive(text)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its own exit status."""
    if arguments.restarts is not None and arguments.ranks is None:
        raise UserError("--restarts needs --ranks")
    if arguments.nodes is not None or arguments.rendezvous is not None:
        return _execute_on_nodes(arguments)
    if arguments.ranks == "env":
        return _execute_as_rank(arguments)
    for restart in range(1, (arguments.restarts or 0) + 1):
        exited = _run(arguments)
        if exited.returncode == 0 or exited.was_interrupted:
            return process.exit_like(exited.returncode)
        how = companion_stage.ending(exited.returncode)
        say(f"it has failed ({how}): restart {restart} of {arguments.restarts}")
    return process.exit_like(_run(arguments).returncode)


def _run(arguments: argparse.Namespace) -> process.Exit:
    """Run the command on this host, and say what is known of its run."""
    if arguments.tune:
        from flatout.tune import learning
    request = learning.make_request(arguments) if arguments.tune else _request(arguments)
    request = _with_ranks(arguments, request)
    run_directory, variables = None, {}
    if not environment.is_disabled():
        run_directory = _prepare(request)
    if run_directory is not None and (request.settings or request.comparison is not None):
        from flatout import knobs

        variables = knobs.prepare(request, os.environ)
    job_environment = environment.job_environment(run_directory, variables)
    watcher = None if run_directory is None else _watcher(arguments, request, run_directory)
    tick = None if watcher is None else watcher.tick
    if run_directory is None or request.ranks is None:
        exited, failure = process.run(arguments.command, job_environment, tick=tick), None
    else:
        exited, failure = companions.run(
            arguments.command, job_environment, run_directory, request.ranks, tick=tick
        )
    if watcher is not None:
        watcher.finish()
    if failure is not None and not _has_said_why(run_directory):
        say(failure)
    if run_directory is not None:
        for line in _summary(run_directory, request):
            say(line)
        if arguments.tune:
            for line in learning.conclude(arguments, run_directory):
                say(line)
    return exited


def _watcher(
    arguments: argparse.Namespace, request: Request, run_directory: Path
) -> Watcher | None:
    """Return what compares a run with what its plan promises; ``None``: it runs without a plan, or
    not as the plan says."""
    if arguments.plan is None or arguments.tune or arguments.set or arguments.ranks is not None:
        return None
    from flatout.cli import watching

    return watching.watch(
        arguments.plan, arguments.command, request.settings.keys(), run_directory, say
    )


def _execute_as_rank(arguments: argparse.Namespace) -> int:
    """Run the command as one rank that a launcher has started."""
    launched = launcher.read(os.environ)
    node = nodes.enter()
    if launched.size > 1 and not environment.is_disabled():
        returncode, was_interrupted = _run_as_rank(arguments, launched)
    elif launched.rank == 0:
        launcher.forget()
        arguments.ranks = 1
        exited = _run(arguments)
        returncode, was_interrupted = exited.returncode, exited.was_interrupted
    else:
        returncode, was_interrupted = (
            0,
            False,
        )  # the agent is disabled, so rank 0 runs bare and alone
    if node is not None:
        nodes.leave(node, returncode)
        has_failed = returncode != 0 and not was_interrupted
        return int(has_failed and launched.restarts < (arguments.restarts or 0))
    if launched.rank and returncode < 0:
        return 128 - returncode
    return process.exit_like(returncode)


def _run_as_rank(arguments: argparse.Namespace, launched: launcher.Launched) -> tuple[int, bool]:
    """Run the command as one of several ranks.

    Returns the exit status of rank 0, or its negative signal, and whether a signal that asks for an
    end has come.
    """
    if launched.rank:
        ended = hosts.run_other(arguments.command, launched, say)
        if ended.sentence is not None:
            say(ended.sentence)
        return ended.returncode, ended.was_interrupted

    def make_request() -> Request:
        request = _request(arguments)
        _check_ranks(arguments, request)
        others = {name: s for name, s in request.settings.items() if name != "ranks"}
        return replace(request, settings=others)

    ended = hosts.run_rank_0(arguments.command, make_request, launched, say)
    if ended.sentence is not None and not _has_said_why(ended.run_directory):
        say(ended.sentence)
    for line in _summary(ended.run_directory, Request.read(ended.run_directory)):
        say(line)
    return ended.returncode, ended.was_interrupted


def _execute_on_nodes(arguments: argparse.Namespace) -> int:
    """Run the command on several hosts, of which this is one."""
    if arguments.nodes is None or arguments.rendezvous is None or arguments.ranks == "env":
        raise UserError(
            "--nodes M and --rendezvous HOST:PORT belong together, and --ranks N says how many "
            "ranks each host has"
        )
    words = [f"--set={word}" for word in arguments.set] + ["--trust"] * arguments.trust
    if arguments.plan is not None:
        words.append(f"--plan={arguments.plan}")
    if arguments.tune:
        words.append("--tune")
    if arguments.restarts is not None:
        words.append(f"--restarts={arguments.restarts}")
    as_rank = ["run", "--ranks", "env", *words, "--", *arguments.command]
    process.check_program(arguments.command[0])
    python = launcher.interpreter(arguments.command)
    return process.exit_like(
        nodes.run(
            as_rank,
            python,
            arguments.nodes,
            arguments.rendezvous,
            arguments.ranks or 1,
            arguments.restarts or 0,
        )
    )


def _request(arguments: argparse.Namespace) -> Request:
    settings: dict[str, str] = {}
    proof = guard = None
    if arguments.plan is not None:
        from flatout import plan

        applied = plan.read(arguments.plan)
        settings, proof = _proven_here(applied, arguments)
        guard = _guard(applied, settings, arguments.command)
    if arguments.set:
        from flatout import knobs

        by_hand = knobs.parse_settings(arguments.set)
        settings |= by_hand
        if proof is not None:
            proof = replace(proof, knobs=tuple(k for k in proof.knobs if k not in by_hand))
    return Request(settings=settings, proof=proof, guard=guard)


def _check_ranks(arguments: argparse.Namespace, request: Request) -> None:
    """Check that several ranks can be combined with the other options.

    Raises:
        UserError: they cannot.
    """
    from flatout import knobs

    if arguments.tune:
        raise UserError(
            "--ranks and --tune cannot be combined: each rank would choose settings by its own "
            "times"
        )
    knobs.check_claims(["ranks", *(name for name in request.settings if name != "ranks")])


def _with_ranks(arguments: argparse.Namespace, request: Request) -> Request:
    """Add the ranks that the user asks for, or else those of the settings, if they can be had."""
    setting = request.settings.get("ranks")
    others = {name: s for name, s in request.settings.items() if name != "ranks"}
    if arguments.ranks is not None:
        request = replace(request, settings=others)
        if arguments.ranks == 1:
            return request
        _check_ranks(arguments, request)
        ranks = companions.make_ranks(arguments.ranks)
        return replace(request, ranks=replace(ranks, gives_up=True))
    try:
        return companions.add_ranks(request, goes_alone=True)
    except UserError as refusal:
        say(f"ranks={setting} not applied: {refusal}")
        return replace(request, settings=others)


def _guard(plan: Plan, settings: Mapping[str, str], command: Sequence[str]) -> GuardRequest | None:
    """What the guard must know; ``None`` if no setting can change results.

    The losses of the proof hold for its arguments only: another learning rate, or another number of
    steps over which it decays, gives other losses.
    """
    from flatout import knobs
    from flatout.plan.program import ArgumentChanges

    if all(knobs.is_bitwise(name, setting) for name, setting in settings.items()):
        return None
    is_same = plan.argument_changes(command) == ArgumentChanges()
    if plan.evidence is None or not plan.proven or not is_same:
        return GuardRequest()
    losses = tuple(
        ProvenLoss(max(loss.bare_final, loss.plan_final), loss.margin)
        for loss in plan.evidence.losses
    )
    return GuardRequest(plan.evidence.steps, losses)


def _proven_here(
    plan: Plan, arguments: argparse.Namespace
) -> tuple[dict[str, str], ProvenConditions | None]:
    """The settings that may be applied, and what the agent must still check."""
    settings = dict(plan.settings)
    if (plan.evidence is None and plan.learned is None) or arguments.trust:
        return settings, None
    from flatout import knobs, machine
    from flatout.plan.program import summarize

    if plan.learned is not None:
        say(f"{arguments.plan} was learned while training and is not proven")
    elif not plan.proven:
        say(f"[plan] in {arguments.plan} differs from its proof; it is applied as it is")
        return settings, None
    sensitive = tuple(name for name, s in settings.items() if not knobs.is_bitwise(name, s))
    if not sensitive:
        return settings, None
    differences = plan.differences(arguments.command, machine.fingerprint())
    how = "proven" if plan.proven else "learned"
    if not differences:
        covered = plan.argument_changes(arguments.command).covered
        if covered:
            say(f"{', '.join(sensitive)} {how} with another length or seed: {summarize(covered)}")
        files = None if plan.program is None else tuple(plan.program.paths(arguments.command))
        return settings, ProvenConditions(sensitive, plan.torch, plan.inputs, files)
    say(
        f"{', '.join(sensitive)} left out, {how} under other conditions: {summarize(differences)}. "
        "'flatout verify' proves the plan again, 'flatout tune' finds another, and --trust applies "
        "it as it is"
    )
    return {name: s for name, s in settings.items() if name not in sensitive}, None


def _prepare(request: Request) -> Path | None:
    try:
        run_directory = new_run_directory()
        request.write(run_directory)
    except OSError as error:
        say(
            f"nothing is recorded, the command runs bare: {paths.runs_directory()}: "
            f"{error.strerror}"
        )
        return None
    return run_directory


def _summary(run_directory: Path, request: Request) -> list[str]:
    where = paths.shown(run_directory)
    failure = reason_record_incomplete(run_directory)
    if failure is not None:
        return [f"the record could not be written to its end in {where}: {failure}"]
    try:
        times = read_step_times(run_directory)
    except RecordError as error:
        return [f"the record cannot be read: {error}"]
    if times is None:
        if any(run_directory.glob("started-*")):
            return [f"torch was never imported, so there was nothing to watch; record in {where}"]
        return [f"{environment.NOT_ATTACHED}; record in {where}"]
    lines = [
        f"{event.subject}={request.settings[event.subject]} {_OUTCOMES[event.what]}: {event.why}"
        for event in times.events
        if event.what in _OUTCOMES and event.subject in request.settings
    ]
    told = {"noticed"} if "ranks" in request.settings else {"noticed", "unused"}
    lines += [
        f"{event.subject}: {event.why}"
        for event in times.events
        if event.subject == "guard" or (event.subject == "ranks" and event.what in told)
    ]
    if not times.loop_steps:
        return [*lines, f"flatout saw no training or inference step; record in {where}"]
    median_ms = statistics.median(times.loop_steps)
    kind = "steps" if times.trains else "inference steps"
    failures = sum(event.what == "failed" for event in times.events)
    trouble = f"; {failures} parts of flatout failed, which the record explains" * bool(failures)
    return [
        *lines,
        f"{len(times.loop_steps)} {kind}, median {median_ms:.4g} ms; record in {where}{trouble}",
    ]


def _has_said_why(run_directory: Path | None) -> bool:
    """Whether rank 0 has told its user why the ranks have stopped."""
    try:
        times = None if run_directory is None else read_step_times(run_directory)
    except RecordError:
        return False
    return times is not None and any(
        (event.subject, event.what) == ("ranks", "stopped") for event in times.events
    )


_OUTCOMES = {"skipped": "not applied", "failed": "failed", "unused": "had no effect"}
"""What became of a knob, by the kind of its event."""
