"""What is exported of a run: the adapter that it ended with, or one written from its checkpoint.

A run keeps its last round and, with `evaluation.keep: best`, the best one; late clients (`schedule: buffered`) also
need a few before the last. What single clients have of their own is kept as they last left it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedhpc import config as configuration
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.export import CARD, is_path, with_base
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.errors import UserError, nearest
from fedhpc.methods._peft import read_json
from fedhpc.privacy.base import promise_of
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.report.runs import LoadedRun
from fedhpc.results.checkpoint import load_checkpoint
from fedhpc.results.resume import where_it_began
from fedhpc.server.state import ParameterState

_SHOWN = 6  # names of clients in a message


@dataclass(frozen=True)
class Source:
    """An export of a run, as `fedhpc.load` takes it."""

    folder: Path
    round: int  # after which it is
    of: str  # what it is, in a few words, such as "round 7 of 20"
    promise: str  # of its privacy, in a sentence; empty where there is none
    is_tested: bool  # whether the test of the run is of it
    is_on_given: bool = False  # whether it was made on the base that was given, and names that


def of_run(
    run: LoadedRun, config: Config, folder: Path, client: str | None, round_: int | None, base: str | None
) -> Source:
    """What the run has of `client`, or after a round, or at its end; written to `folder` where it is not there already.

    Of an unfinished run the last round that is kept. base: a folder that has the run's base now, or what an adapter is
    to name as its base. UserError, with what there is, where that is nothing.
    """
    number = None if client is None else _client(run, config, client)
    adapter = run.directory / "adapter"
    if config.mode == "local" and number is None:
        raise UserError(f"'{run.directory}' is of mode local, where each client has a model", remedy="give --client")
    if run.results.complete:
        attributes = run.results.attributes
        ended = int(attributes.get("best_round", run.results.num_rounds))
        what = _rounds(ended, run)
        if config.mode == "local" and (adapter / str(number)).is_dir():
            return Source(
                adapter / str(number), ended, f"client {client}, {what}", promise_of(attributes, config), False
            )
        if number is None and round_ in (None, ended):
            if not adapter.is_dir():
                raise UserError(f"'{run.directory}' has no adapter/: method.name {config.method.name} trains nothing")
            return Source(adapter, ended, what, promise_of(attributes, config), True)
    return _from_checkpoint(run, config, folder, number, client, round_, base)


def require_public(source: Source, base: str | None) -> None:
    """UserError where an adapter that is to be published names its base by a path, which is of use to nobody else."""
    named = base or read_json(source.folder / "adapter_config.json", missing_ok=True).get("base_model_name_or_path")
    if named is not None and is_path(named):
        raise UserError(
            f"--push: the adapter would name its base by a folder of this machine, '{named}'",
            remedy="give the base's hub id with --base, or --merge DIR",
        )


def take_over(source: Source, folder: Path, base: str | None, more: str) -> None:
    """Copy an export to `folder`. base: what it names as its base, where that is another; more: for its card."""
    shutil.copytree(source.folder, folder)
    file = folder / "adapter_config.json"
    if base is not None and file.is_file():
        named = {**read_json(file), "base_model_name_or_path": base, "revision": None}
        file.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    card = (folder / CARD).read_text(encoding="utf-8")
    (folder / CARD).write_text(f"{with_base(card, base)}\n{more}", encoding="utf-8")


def _from_checkpoint(
    run: LoadedRun,
    config: Config,
    folder: Path,
    number: int | None,
    client: str | None,
    round_: int | None,
    base: str | None,
) -> Source:
    """An export from the checkpoint."""
    saved = load_checkpoint(run.directory)
    if saved is None:
        raise UserError(f"'{run.directory}' has no checkpoint, and so nothing but its adapter/ to export")
    tensors, meta = saved
    config = configuration.changed(where_it_began(config, meta), [("run.dir", str(run.directory))], "RUN")
    is_on_given = base is not None and Path(base).is_dir()
    if is_on_given:
        config = configuration.changed(config, [("model.name", base), ("model.revision", None)], "--base")
    approach = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    if not isinstance(approach, Averaging):
        raise UserError(
            f"method.name {config.method.name} keeps no rounds and no clients that could be exported",
            remedy="run it to its end and export it without --round and --client",
        )
    if meta["fingerprint_model"] != approach.fingerprint:
        raise UserError(
            f"the weights of '{config.model.name}' are not those that the run began with",
            remedy="put them back, or give with --base the folder that has them",
        )
    state = approach.initial_state()
    state.load(tensors)
    last = int(meta["round"])
    if number is not None:
        if not approach.has_models_of_clients:
            raise UserError("clients of this run have no models of their own, all have the one that the run trained",
                            remedy="leave --client out")  # fmt: skip
        if config.mode == "local" and number not in state.versions:
            raise UserError(f"client {client} has not trained yet", remedy="choose another")
        promise = approach.export_client(state, number, folder)
        ended = _chosen(state, last)
        is_as_at_start = bool(config.personalization.parts) and number not in state.versions
        trained = ", which has not trained: its own part is as at the start" if is_as_at_start else ""
        return Source(folder, ended, f"client {client}{trained}, {_rounds(ended, run)}", promise, False, is_on_given)
    thetas = _thetas(state, last)
    round_ = _chosen(state, last) if round_ is None else round_
    if round_ not in thetas:
        there = ", ".join(map(str, sorted(thetas)))
        raise UserError(f"round {round_} is not kept", remedy=f"give one of: {there}")
    promise = approach.export_round(state, thetas[round_], folder)
    return Source(folder, round_, _rounds(round_, run), promise, False, is_on_given)


def _thetas(state: ParameterState, last: int) -> dict[int, Tensor]:
    """What the run would have evaluated after each round (S,), as far as the state of the last one has it."""
    best = {} if state.best is None else {state.selection.round: state.best}
    past = state.past if state.average is None else {}
    return {**past, **best, last: state.evaluated}


def _chosen(state: ParameterState, last: int) -> int:
    """The round that the run ends with, or would end with if it ended now."""
    return last if state.best is None else state.selection.round


def _rounds(round_: int, run: LoadedRun) -> str:
    return f"round {round_} of {run.planned}" + ("" if run.results.complete else " (the run is unfinished)")


def _client(run: LoadedRun, config: Config, name: str) -> int:
    """The number of a client by its name or number. UserError where there is none."""
    partition = run.results.groups["partition"]
    names = [str(one) for one in partition.get("client_names", ())]
    if name in names:
        return names.index(name)
    count = len(partition.get("num_examples", ())) or int(getattr(config.partition, "num_clients", 0) or 0)
    if name.isascii() and name.isdigit() and int(name) < count:
        return int(name)
    if names:
        raise UserError(f"there is no client '{name}': {nearest(name, names, _SHOWN)}")
    raise UserError(f"there is no client '{name}': they are numbered 0 to {count - 1}")
