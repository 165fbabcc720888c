"""The life of one process of a run: what it imports, how it talks to the others, who watches it, how it ends.

    run: environment, imports -> transport -> liveness -> `work`, which is the caller's -> exit code
    fork: the imports once, then `run` in a child for each rank

Light until `run` imports torch. From then on an error of `work` ends every rank (fedhpc.ranks.liveness), each with the
same exit code; liveness's thread may end the process at any moment, and `SavedRounds` is what it must know by then.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from fedhpc import config as configuration
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.ranks import memory, network, startup
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.startup import DONE, FAILED, PREEMPTED, REFUSED

if TYPE_CHECKING:
    from fedhpc.ranks.liveness import Liveness
    from fedhpc.ranks.transport.base import Transport

_SPEAKER_FIRST_S = 5.0  # a launcher that sees one rank leave ends the others: the one that says why goes first
_WRITER_LIMIT_S = 1.0  # a hanging file system must not keep the ranks


class SavedRounds:
    """How far the run on disk has come, shared between the main thread and liveness's."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.writing = threading.Lock()  # held while files of the run directory are written
        self.last: int | None = None  # the last round on disk; None while nothing was written
        self.ended = False  # complete, or paused, while other runs of this process may go on

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.run_dir

    def reached(self, round_: int) -> None:
        """Round `round_` is safely on disk."""
        self.last = round_

    def end(self) -> None:
        """The run is complete, or pauses: what happens to this process from now on is not its end."""
        self.ended = True

    def freeze(self) -> None:
        """Leave the run directory as it is: the lock is never given back, since the process is about to end."""
        self.writing.acquire(timeout=_WRITER_LIMIT_S)

    def reread(self) -> None:
        """Take the last round from status.json: a rank that speaks for a lost rank 0 knows only where that began."""
        from fedhpc.results.status import read_status

        if self.last is not None:
            with contextlib.suppress(UserError):
                status = read_status(self.directory)
                self.last = status.round if status else self.last

    def record_end(self, code: int, reason: str) -> None:
        """Write to status.json why the run ended, where it was under way."""
        from fedhpc.results.status import read_status, write_status

        if self.last is not None and not self.ended:
            with contextlib.suppress(UserError):  # on a full disk the line on the screen, which says so, is all
                status = read_status(self.directory)
                if status is not None and status.state != "running":  # it ended just now
                    return
                ending: Literal["preempted", "failed"] = "preempted" if code == PREEMPTED else "failed"
                write_status(self.directory, ending, self.last, reason)


@dataclass(frozen=True)
class Rank:
    """What the work of a rank is given: the configuration that all agree on, and the way to the others."""

    configs: Sequence[Config]  # of all runs that go on together: as a rule one
    launch: Launch
    transport: Transport
    gpus: list[str]  # unique ids of the GPUs that this process may use
    saved: Sequence[SavedRounds]  # of each run

    @property
    def config(self) -> Config:
        """The configuration, where there is one; of several the first, whose model, data and runtime all have."""
        return self.configs[0]


Work = Callable[[Rank], None]


def run(configs: Sequence[Config], launch: Launch, imports: Callable[[], object], work: Work) -> int:
    """Be one rank of a run, or of several with the same section `runtime`, from its imports to its exit code.

    imports: the heavy modules that `work` needs. What `work` raises becomes an exit code and one line.
    """
    config = configs[0]
    set_environment(config)
    if config.runtime.worker_ranks == 1:
        memory.keep_freed_memory()
    else:
        memory.return_freed_memory()
    with startup.guarded(launch):
        try:
            launch = network.locate(launch)
            imports()
            gpus, transport = _connect(config, launch)
        except UserError as error:
            return refuse(error, launch)
    saved = [SavedRounds(one) for one in configs]
    liveness = _watch(config, launch, transport, saved)
    code = _work(Rank(configs, launch, transport, gpus, saved), liveness, work)
    liveness.stop()
    transport.close()
    return code


def fork(ranks: int, configs: Sequence[Config], launch: Launch, imports: Callable[[], object], work: Work) -> int:
    """Run `ranks` ranks as children of this process, forked once everything is imported; the exit code of them all.

    launch: of this process, which may be one of several, each on a node of its own.
    """
    from fedhpc.ranks import fork as forked

    launcher = None if launch.launcher == "single" else os.getppid()
    set_environment(configs[0])
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a CUDA that has begun cannot be forked
    try:
        launches = forked.launches(ranks, launch)
        gc.disable()  # half a million objects that stay: looking for garbage takes a tenth of the time
        with startup.guarded(launch):
            imports()
        return forked.run(launches, lambda one: leave(run(configs, one, lambda: None, work)), launcher)
    except UserError as error:
        return refuse(error, launch)


def refuse(error: UserError, launch: Launch) -> int:
    """Say a mistake that every rank meets by itself, once for each host; the exit code."""
    if launch.local_rank == 0:
        print(
            f"fedhpc: error: {error}" if launch.rank == 0 else f"fedhpc: rank {launch.rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
    if launch.rank != 0:
        time.sleep(_SPEAKER_FIRST_S)
    return REFUSED


def set_environment(config: Config) -> None:
    """Set the variables that libraries read when they are imported."""
    threads = 1 if config.runtime.threads == "auto" else config.runtime.threads
    if config.runtime.threads == "auto":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the library tokenizers
    # torch's store warns of an address that has no name; what fails is an error, and said in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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


def _connect(config: Config, launch: Launch) -> tuple[list[str], Transport]:
    """Set torch up, and open the way to the other ranks; the GPUs of this process, and the transport."""
    import torch

    from fedhpc.ranks.devices import visible_gpus
    from fedhpc.ranks.transport import open_transport

    torch.set_num_threads(1 if config.runtime.threads == "auto" else config.runtime.threads)
    if config.runtime.deterministic:
        torch.use_deterministic_algorithms(True)
    gpus = visible_gpus(config)
    return gpus, open_transport(launch, config.runtime.transport, config.runtime.timeout_s)


def _watch(config: Config, launch: Launch, transport: Transport, saved: Sequence[SavedRounds]) -> Liveness:
    """Start liveness's thread; it calls `_announce` before it ends the ranks."""
    from fedhpc.ranks.liveness import Liveness
    from fedhpc.ranks.transport import TransportError

    def on_exit(code: int, reason: str, run: str) -> None:
        _announce(saved, transport.rank == 0, code, reason, run)

    liveness = Liveness(transport, launch, config.runtime.timeout_s, on_exit)
    try:
        liveness.start()
    except (UserError, TransportError) as error:  # nobody watches yet: this rank leaves, the others lose it
        print(f"fedhpc: error: {error}", file=sys.stderr, flush=True)
        transport.abort(FAILED)
    return liveness


def _announce(saved: Sequence[SavedRounds], is_server: bool, code: int, reason: str, run: str) -> None:
    """Say once for all ranks why they end, on the screen and in status.json.

    run: whose failure it is, where it is that of one of several; the others can go on without it.
    """
    from fedhpc.results.status import BESIDE

    for one in saved:
        one.freeze()
        if not is_server:
            one.reread()
    begun = [one for one in saved if one.last is not None]
    rounds = [f"{one.last} rounds are kept in {one.directory}" for one in begun if not one.ended]
    progress = f"{', '.join(rounds)}, the same command goes on from there" if rounds else "nothing was changed"
    if begun and not rounds:
        progress = "no run was under way any more"
    named = f"{run}: {reason}" if run else reason
    line = f"{reason}; {progress}{startup.traceback_follows()}" if code == PREEMPTED else f"error: {named}"
    print(f"fedhpc: {line}", file=sys.stderr, flush=True)
    for one in sorted(saved, key=lambda one: one.config.run.name != run):  # whose failure it is first, for want of time
        if run and one.config.run.name != run:
            one.record_end(PREEMPTED, f"{BESIDE} {named}")
        else:
            one.record_end(code, reason)


def _work(rank: Rank, liveness: Liveness, work: Work) -> int:
    """Do `work` with the configuration of rank 0; the exit code, or the end of all ranks where it fails."""
    from fedhpc.ranks.transport import TransportError
    from fedhpc.ranks.verdict import RefusedError, RunError

    transport, saved = rank.transport, rank.saved
    # Whose failure it is; ranks above 0 are named by liveness.
    here = "rank 0: " if transport.rank == 0 and transport.world_size > 1 else ""
    try:
        # Rank 0's file counts, should another host see another one.
        stated = transport.broadcast_json([configuration.stated(config) for config in rank.configs])
        configs = [configuration.restore_stated(one) for one in stated]
        for one, config in zip(saved, configs, strict=True):
            one.config = config
        work(replace(rank, configs=configs))
        return DONE
    except RefusedError as error:
        if transport.rank == 0:
            print(f"fedhpc: error: {error}", file=sys.stderr)
        return REFUSED
    except TransportError as error:
        liveness.fail(FAILED, f"{here}{error}", symptom=True)
    except UserError as error:
        run = error.run if isinstance(error, RunError) else ""
        reason = error.message if run else str(error)  # the run is told beside it
        liveness.fail(REFUSED if all(one.last is None for one in saved) else FAILED, reason, run=run)
    except (Exception, SystemExit) as error:  # told to every rank, with its cause; none may wait for this one
        import traceback

        traceback.print_exc()
        liveness.fail(FAILED, f"{here}{type(error).__name__}: {error}")
