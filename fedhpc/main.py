"""Run a federation.

    torchrun --nproc_per_node=8 -m fedhpc.main [CONFIG.yaml] [section.key=value ...] [--check] [--where] [--fresh]
    python -m fedhpc.main ... --check ranks=8,64,512     a forecast for so many ranks (fedhpc.planning)
    python -m fedhpc.main ...                  one process
    python -m fedhpc.main ... --ranks 3        so many processes of this machine, without a launcher
    mpiexec -n 4 python -m fedhpc.main ...     MPI
    srun python -m fedhpc.main ...             Slurm

Exit codes: 0 done; 1 failed while running; 2 bad command, configuration or data (nothing was written); 75 preempted,
checkpointed, run again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Literal, NoReturn

from fedhpc import config as configuration
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.ranks import startup
from fedhpc.ranks.launch import Launch, detect

DONE, FAILED, REFUSED = 0, 1, 2
_SPEAKER_FIRST_S = 5.0  # a launcher that sees one rank leave ends the others: the one that says why goes first


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see python -m fedhpc.main --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """CONFIG and overrides come in any order: what has an '=' is an override."""
    parser = _Parser(
        prog="python -m fedhpc.main",
        description="Federated customization of large models. Without CONFIG: the embedded demo.",
        usage="%(prog)s [CONFIG.yaml] [section.key=value ...] [--ranks N] [--check] [--where] [--fresh]",
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
    parser.add_argument("--where", action="store_true", help="print the run directory and leave")
    parser.add_argument("--fresh", action="store_true", help="start over in a directory that holds a run")
    options = parser.parse_intermixed_args(list(arguments))
    files = [word for word in options.words if "=" not in word]
    for word in files:
        if not os.path.exists(word) and word.split(".")[0] in configuration.SECTIONS:
            raise UserError(f"command line: '{word}' is neither a file nor of the form section.key=value")
    if len(files) > 1:
        raise UserError(f"command line: more than one configuration file: {', '.join(files)}")
    options.config = files[0] if files else None
    options.overrides = [word for word in options.words if "=" in word and not word.startswith("ranks=")]
    counts = ",".join(word.removeprefix("ranks=") for word in options.words if word.startswith("ranks="))
    if counts and not options.check:
        raise UserError("command line: ranks= is for --check; a launcher starts ranks (torchrun --nproc_per_node=N)")
    if not all(count.isascii() and count.isdigit() and int(count) for count in counts.split(",") if counts):
        raise UserError(f"command line: ranks={counts} is not a list of numbers like 8,64,512")
    options.ranks = [int(count) for count in counts.split(",") if counts]
    if options.forks is not None and options.forks < 1:
        raise UserError(f"command line: --ranks {options.forks}: at least one is needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank, from the command line to its exit code."""
    rank, speaks = 0, True
    try:
        launch = detect(os.environ)
        rank = launch.rank
        # All ranks read the same files and find the same mistake; one of each host says it.
        speaks = launch.local_rank == 0
        options = parse(sys.argv[1:] if arguments is None else arguments)
        # The configuration imports numpy, whose OpenBLAS would start a thread per core in every rank.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        config = configuration.load(options.config, options.overrides)
        if options.forks is not None and launch.launcher != "single":
            raise UserError(
                f"command line: --ranks starts ranks of its own, but {launch.launcher} has started this one"
            )
        if options.forks is not None and options.forks > 1 and config.runtime.transport == "mpi":
            raise UserError("runtime.transport: mpi: --ranks has no MPI between its ranks; use auto, or mpiexec")
    except UserError as error:
        if speaks:
            print(f"fedhpc: error: {error}" if rank == 0 else f"fedhpc: rank {rank}: {error}", file=sys.stderr)
        else:
            time.sleep(_SPEAKER_FIRST_S)
        return REFUSED
    if options.where:
        print(config.run_dir)
        return DONE
    if options.forks is not None and options.forks > 1:
        return _fork(config, launch, options)
    return _run(config, launch, options)


def _fork(config: Config, launch: Launch, options: argparse.Namespace) -> int:
    """The ranks of `--ranks`, forked once everything is imported."""
    from fedhpc.ranks import fork

    _environment(config)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a CUDA that has begun cannot be forked
    try:
        gc.disable()  # half a million objects that stay: looking for garbage takes a tenth of the time
        with startup.guarded(launch):
            from fedhpc import federation, models  # noqa: F401

            models.import_classes(config.model)
        return fork.run(options.forks, lambda launch: leave(_run(config, launch, options)))
    except UserError as error:
        print(f"fedhpc: error: {error}", file=sys.stderr)
        return REFUSED


def _run(config: Config, launch: Launch, options: argparse.Namespace) -> int:
    _environment(config)
    startup.keep_freed_memory()
    reached: list[int] = []  # the last round on disk; empty while nothing was written
    with startup.guarded(launch):
        import torch

        from fedhpc import federation
        from fedhpc.ranks.liveness import Liveness
        from fedhpc.ranks.transport import TransportError, open_transport
        from fedhpc.results import run_directory
        from fedhpc.task import visible_gpus

        torch.set_num_threads(1 if config.runtime.threads == "auto" else config.runtime.threads)
        if config.runtime.deterministic:
            torch.use_deterministic_algorithms(True)
        try:
            gpus = visible_gpus(config)
            transport = open_transport(launch, config.runtime.transport, config.runtime.timeout_s)
        except UserError as error:
            if launch.local_rank == 0:
                print(f"fedhpc: error: {error}", file=sys.stderr)
            else:
                time.sleep(_SPEAKER_FIRST_S)
            return REFUSED

    writing = threading.Lock()

    def on_exit(code: int, reason: str) -> None:
        writing.acquire(timeout=1)  # and never released: what it says of the run directory stays true
        if reached and transport.rank > 0:  # it speaks for a lost rank 0, and knows only where that began
            with contextlib.suppress(UserError):
                status = run_directory.read_status(config.run_dir)
                reached.extend([status.round] if status else [])
        kept = f"; {reached[-1]} rounds are kept, the same command goes on from there" if reached else ""
        say = f"{reason}{kept}" if code == startup.PREEMPTED else f"error: {reason}"
        print(f"fedhpc: {say}", file=sys.stderr, flush=True)
        if reached:
            # On a full disk the line above, which says so, is all there can be.
            with contextlib.suppress(UserError):
                state: Literal["preempted", "failed"] = "preempted" if code == startup.PREEMPTED else "failed"
                run_directory.write_status(config.run_dir, state, reached[-1], reason)

    # Whose failure it is; ranks above 0 are named by liveness.
    here = "rank 0: " if transport.rank == 0 and transport.world_size > 1 else ""
    liveness = Liveness(transport, launch, config.runtime.timeout_s, on_exit)
    try:
        liveness.start()
    except (UserError, TransportError) as error:  # nobody watches yet: this rank leaves, the others lose it
        print(f"fedhpc: error: {error}", file=sys.stderr, flush=True)
        transport.abort(FAILED)
    try:
        # Rank 0's file counts, should another host see another one.
        config = configuration.resolve(transport.broadcast_json(config.model_dump(mode="json")))
        if not options.check and federation.is_finished(config, transport, options.fresh):
            liveness.stop()
            transport.close()
            return DONE
        launch = federation.place_ranks(config, transport, launch, gpus)
        approach = federation.prepare(config, transport, launch, write_cache=not options.check)
        if options.check:
            said = approach.describe(transport.world_size, transport.name)
            if options.ranks:
                said += federation.on_server(transport, lambda: federation.forecast(approach, options.ranks))
            if transport.rank == 0:
                print("\n".join(said))
        else:
            federation.run(approach, transport, options.fresh, reached.append, writing)
    except federation.RefusedError as error:
        if transport.rank == 0:
            print(f"fedhpc: error: {error}", file=sys.stderr)
        liveness.stop()
        transport.close()
        return REFUSED
    except TransportError as error:
        liveness.fail(FAILED, f"{here}{error}", symptom=True)
    except UserError as error:
        liveness.fail(FAILED if reached else REFUSED, str(error))
    except Exception as error:  # told to every rank, with its cause; none may wait for this one
        import traceback

        traceback.print_exc()
        liveness.fail(FAILED, f"{here}{type(error).__name__}: {error}")
    liveness.stop()
    transport.close()
    return DONE


def _environment(config: Config) -> None:
    """Settings that libraries read when they are imported."""
    if config.runtime.threads == "auto":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def leave(code: int) -> NoReturn:
    """End this process without the clean-up of Python and its libraries.

    All that matters is on disk by now. Gloo's threads may still let go of tensors, which aborts the process while
    Python is finalising (pytorch issue 190489): a run that is complete would look failed.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads what was printed, or the disk that it goes to is full
        code = code or FAILED
    os._exit(code)


if __name__ == "__main__":
    leave(main())
