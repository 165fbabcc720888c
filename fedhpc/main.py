"""Run a federation.

    python -m fedhpc.main [CONFIG.yaml] [section.key=value ...] [--ranks N | --ranks-per-node N] [--check]
        [--where] [--fresh]
    python -m fedhpc.main ... --check ranks=8,64,512     a forecast for these numbers of ranks
    python -m fedhpc.main ...                  one process
    python -m fedhpc.main ... --ranks 3        3 processes of this machine, without a launcher
    python -m fedhpc.main ... --until 5        pause after round 5; the same command without it goes on
    python -m fedhpc.main A.yaml B.yaml ...    several runs side by side, as `fedhpc sweep` starts them
    torchrun --nproc_per_node=8 -m fedhpc.main ...       torchrun, also on several machines
    mpiexec -n 4 python -m fedhpc.main ...     MPI
    srun python -m fedhpc.main ...             Slurm
    srun --ntasks-per-node=1 python -m fedhpc.main ... --ranks-per-node 16     one import on each node, for 16 ranks

Exit codes: 0 done (with --until: that round is); 1 failed while running; 2 bad command, configuration or data (nothing
was written); 75 preempted, checkpointed, run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from fedhpc import config as configuration
from fedhpc.config import Config
from fedhpc.config.together import shared_settings
from fedhpc.errors import UserError
from fedhpc.ranks import process
from fedhpc.ranks.launch import Launch, detect
from fedhpc.ranks.process import Rank
from fedhpc.ranks.startup import DONE
from fedhpc.ranks.topology import Topology

if TYPE_CHECKING:
    from fedhpc.approaches.base import AnyApproach


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see python -m fedhpc.main --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """CONFIG and overrides come in any order: what has an '=' is an override."""
    parser = _Parser(
        prog="fedhpc run",
        description="Federated customization of large models. Without CONFIG: the embedded demo.",
        usage="%(prog)s [CONFIG.yaml ...] [section.key=value ...] [--ranks N | --ranks-per-node N] [--until N] "
        "[--check] [--where] [--fresh]",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG | section.key=value", help="configuration and overrides")
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate everything, print the plan, write nothing; with ranks=8,64 a forecast from the run in run.dir",
    )
    parser.add_argument(
        "--ranks", type=int, dest="forks", metavar="N", help="start N ranks on this machine, which share its memory"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="start N ranks from each process of a launcher that starts one on every node",
    )
    parser.add_argument(
        "--until", type=int, metavar="N", help="pause after round N; the command without it goes on from there"
    )
    parser.add_argument("--where", action="store_true", help="print the run directory and leave")
    parser.add_argument("--fresh", action="store_true", help="start over in a directory that holds a run")
    options = parser.parse_intermixed_args(list(arguments))
    files = [word for word in options.words if "=" not in word]
    for word in files:
        if not os.path.exists(word) and word.split(".")[0] in configuration.KEYS:
            raise UserError(f"command line: '{word}' is neither a file nor of the form section.key=value")
    options.configs = files or [None]
    options.overrides = [word for word in options.words if "=" in word and not word.startswith("ranks=")]
    counts = ",".join(word.removeprefix("ranks=") for word in options.words if word.startswith("ranks="))
    if counts and not options.check:
        raise UserError("command line: ranks= is for --check; a launcher starts ranks (torchrun --nproc_per_node=N)")
    if not all(count.isascii() and count.isdigit() and int(count) for count in counts.split(",") if counts):
        raise UserError(f"command line: ranks={counts} is not a list of numbers like 8,64,512")
    options.ranks = [int(count) for count in counts.split(",") if counts]
    if options.forks is not None and options.ranks_per_node is not None:
        raise UserError("command line: --ranks is for this machine alone, --ranks-per-node for every node: give one")
    for name, count in (("--ranks", options.forks), ("--ranks-per-node", options.ranks_per_node)):
        if count is not None and count < 1:
            raise UserError(f"command line: {name} {count}: at least one is needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank, from the command line to its exit code."""
    launch = Launch()
    try:
        # All ranks read the same files and find the same mistake; one of each host says it.
        launch = detect(os.environ)
        options = parse(sys.argv[1:] if arguments is None else arguments)
        # The configuration imports numpy, whose OpenBLAS would start a thread per core in every rank.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        configs = [configuration.load(path, options.overrides) for path in options.configs]
        _check_together(options, configs)
        config = configs[0]
        _check_forks(options, config, launch)
        for one in configs:
            _check_until(options, one)
        _check_groups(options, config, launch)
        _check_trackers(config)
    except UserError as error:
        return process.refuse(error, launch)
    if options.where:
        print("\n".join(str(one.run_dir) for one in configs))
        return DONE
    work = partial(_work, options)
    imports = partial(_imports, config, not options.check)
    if forks := options.ranks_per_node or (options.forks if options.forks != 1 else None):
        return process.fork(forks, configs, launch, partial(imports, for_ranks=True), work)
    return process.run(configs, launch, imports, work)


def _check_together(options: argparse.Namespace, configs: Sequence[Config]) -> None:
    """UserError where several configurations are not those of runs that can go on together in one process."""
    if len(configs) == 1:
        return
    if options.overrides or options.check:
        raise UserError(
            f"command line: {'--check is' if options.check else 'section.key=value is'} for one configuration, and "
            f"there are {len(configs)}: {', '.join(options.configs)}"
        )
    shared: list[str] = []
    for path, config in zip(options.configs, configs, strict=True):
        one = shared_settings(config)
        if one is None:
            raise UserError(
                f"command line: {path} can only train alone, by its mode, method, client, privacy, attack, "
                "data.label_noise, runtime.worker_ranks or trackers: give it by itself"
            )
        shared.append(one)
        if one != shared[0]:
            raise UserError(
                f"command line: {path} cannot train together with {options.configs[0]}: they differ in "
                f"{_differing(shared[0], one)}; run it alone"
            )
    for key, of_runs in (("run.dir", [c.run_dir for c in configs]), ("run.name", [c.run.name for c in configs])):
        if len(set(of_runs)) < len(configs):
            raise UserError(f"command line: two configurations have the same {key}: each run needs one of its own")


def _differing(one: str, other: str) -> str:
    """The first four of the keys in which two runs differ, of those that they must have alike, as JSON texts."""
    from fedhpc.results.resume import by_key

    before, after = by_key(json.loads(one)), by_key(json.loads(other))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys.sort(key=lambda key: not key.endswith(".name"))  # a choice says more than its options
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _check_forks(options: argparse.Namespace, config: Config, launch: Launch) -> None:
    """UserError where --ranks does not go with the launcher, or ranks that are forked with the transport."""
    if options.forks is not None and launch.launcher != "single":
        raise UserError(
            f"command line: --ranks starts ranks of its own, but {launch.launcher} has started this one; where it "
            "starts one process on each node, give --ranks-per-node"
        )
    if (options.ranks_per_node or options.forks or 1) > 1 and config.runtime.transport == "mpi":
        raise UserError("runtime.transport: mpi: ranks that are forked have no MPI between them; use auto, or mpiexec")


def _check_until(options: argparse.Namespace, config: Config) -> None:
    """UserError where --until names no round of the run, or there is no run."""
    rounds = config.federation.rounds
    if options.until is not None and not 1 <= options.until <= rounds:
        raise UserError(f"command line: --until {options.until}: the run has rounds 1 to {rounds} (federation.rounds)")
    if options.until is not None and options.check:
        raise UserError("command line: --until is of a run, and --check runs nothing; give one of them")


def _check_groups(options: argparse.Namespace, config: Config, launch: Launch) -> None:
    """UserError where the ranks, if their number is known, do not divide into workers of runtime.worker_ranks."""
    ranks = options.forks or launch.world_size * (options.ranks_per_node or 1)
    group_size = config.runtime.worker_ranks
    if ranks and not (ranks == 1 and options.check) and group_size != "auto":
        Topology.of(ranks, group_size)


def _check_trackers(config: Config) -> None:
    """UserError where a tracker lacks its package."""
    if config.trackers:
        from fedhpc.results.trackers.base import check_packages

        check_packages(config.trackers)


def _imports(config: Config, write_cache: bool, for_ranks: bool = False) -> None:
    """Import the heavy modules of a run, and for ranks that are forked what each would import by itself."""
    from fedhpc.models.imports import transformers_for_a_run
    from fedhpc.models.load import import_classes

    transformers_for_a_run(spread=config.runtime.worker_ranks != 1, write_cache=write_cache)
    from fedhpc import federation  # noqa: F401

    if for_ranks:
        import numpy.random  # noqa: F401

        from fedhpc import registry
        from fedhpc.approaches import prepare  # noqa: F401
        from fedhpc.ranks import liveness  # noqa: F401
        from fedhpc.ranks.transport import torch_dist  # noqa: F401

        registry.approach(config.method.name)
        import_classes(config.model)


def _work(options: argparse.Namespace, rank: Rank) -> None:
    """What the ranks do together: check, or run to the end."""
    from fedhpc import federation
    from fedhpc.approaches.describe import describe, forecast_lines
    from fedhpc.approaches.prepare import assign_devices, is_finished, prepare, refuse_another_run
    from fedhpc.ranks.verdict import errors_of, on_server

    transport = rank.transport
    if options.check:
        refuse_another_run(rank.config, transport, options.fresh)
    runs = [
        (config, saved)
        for config, saved in zip(rank.configs, rank.saved, strict=True)
        if options.check or not is_finished(config, transport, options.fresh)
    ]
    if not runs:
        return
    launch = assign_devices(rank.config, transport, rank.launch, rank.gpus)
    approaches: list[AnyApproach] = []
    for config, _ in runs:
        with errors_of(config.run.name if len(runs) > 1 else ""):
            approaches.append(prepare(config, transport, launch, not options.check, approaches))
    if not options.check:
        together = [
            federation.Run(approach, saved.reached, saved.writing, saved.end)
            for approach, (_, saved) in zip(approaches, runs, strict=True)
        ]
        federation.run_together(together, transport, options.fresh, options.until)
        return
    (approach,) = approaches
    lines = describe(approach, transport)
    if options.ranks:
        lines += on_server(transport, lambda: forecast_lines(approach, options.ranks))
    if transport.rank == 0:
        print("\n".join(lines))


if __name__ == "__main__":
    process.leave(main())
