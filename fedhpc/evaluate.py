"""Test without training: a finished run, what it exported, or an untouched base, on the data of any configuration.

    python -m fedhpc.evaluate MODEL [CONFIG.yaml] [section.key=value ...] [--per-client] [--base BASE] [--out FILE.json]
    torchrun --nproc_per_node=8 -m fedhpc.evaluate ...       on several GPUs; srun and mpiexec likewise

MODEL is a run directory, an `adapter/` or a model folder that a run exported, `builtin`, the folder of a base or a hub
id. Of CONFIG the sections data, evaluation and runtime count, with --per-client also partition; of a run it is the
run's own by default. What is printed is what a run prints at its end: the metrics of the test with their intervals and,
with --per-client, those of each client on its share `evaluation.client_fraction` of the training split, on all of it
where that is 0. Nothing is held out of the data: a single file is the test as a whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedhpc import config as configuration
from fedhpc.config import QUANTIZATION, Config
from fedhpc.errors import UserError
from fedhpc.ranks import process
from fedhpc.ranks.launch import Launch, detect
from fedhpc.ranks.process import Rank

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fedhpc.data import Data
    from fedhpc.evaluation.evaluate import Evaluator, Outcome
    from fedhpc.methods.base import Method
    from fedhpc.ranks.transport.base import Transport


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see python -m fedhpc.evaluate --help")


#: Keys of the section model that MODEL settles, and others that it settles where it is an export.
_OF_BASE, _OF_EXPORT = ("name", "revision"), ("task", "dtype", *QUANTIZATION)
#: The sections and keys that are read where nothing is trained.
_READ = frozenset({"data", "evaluation", "runtime", "model", "objective", "run.seed"})


@dataclass(frozen=True)
class Subject:
    """The model that is tested."""

    export: Path | None  # the folder of a run's export; None: an untouched base
    base: str | None  # the base instead of the one that the export names; of an untouched base its name
    config: Path | None  # the configuration of the run that it is from


@dataclass(frozen=True)
class Loaded:
    """The model and the data on one rank."""

    evaluator: Evaluator
    data: Data
    method: Method | None  # None: the weights of the base are the ones that are tested
    payloads: torch.Tensor  # (1, P)
    of_workers: Sequence[str]  # what is to be said of the ranks of each worker, a line each


@dataclass(frozen=True)
class Measured:
    """What rank 0 knows at the end."""

    outcome: Outcome
    clients: dict[str, np.ndarray] | None  # columns, a row for each client; as in /client_eval


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank, from the command line to its exit code."""
    launch = Launch()
    try:
        launch = detect(os.environ)
        options = parse(sys.argv[1:] if arguments is None else arguments)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in fedhpc.main
        subject = subject_of(options.model, options.base)
        # Who owns what does not matter where clients are not evaluated, nor then whether it can be told.
        undivided = [] if options.per_client else ["partition.name=iid"]
        refuse_unread(options.overrides, subject, options.per_client)
        config = configuration.load(options.config or subject.config, [*options.overrides, *undivided])
        process.set_environment(config)
        config = with_model_of(config, subject)
    except UserError as error:
        return process.refuse(error, launch)
    return process.run([config], launch, _imports, partial(_work, options, subject))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """MODEL, CONFIG and overrides; what has an '=' is an override."""
    parser = _Parser(
        prog="fedhpc evaluate",
        description="Test a finished run, an export or a base on the data of a configuration, without training.",
        usage="%(prog)s MODEL [CONFIG.yaml] [section.key=value ...] [--per-client] [--base BASE] [--out FILE.json]",
    )
    parser.add_argument("model", metavar="MODEL", help="run directory, export of a run, folder of a base or hub id")
    parser.add_argument("words", nargs="*", metavar="CONFIG | section.key=value", help="configuration and overrides")
    parser.add_argument("--per-client", action="store_true", help="also on the examples of each client")
    parser.add_argument("--base", metavar="BASE", help="where the base of an adapter is, if not where the run had it")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all numbers and the sample texts there")
    options = parser.parse_intermixed_args(list(arguments))
    files = [word for word in options.words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"command line: more than one configuration file: {', '.join(files)}")
    options.config = files[0] if files else None
    options.overrides = [word for word in options.words if "=" in word]
    return options


def subject_of(word: str, base: str | None = None) -> Subject:
    """What MODEL is. UserError for a run without an export."""
    folder = Path(word)
    config = folder / "config.yaml"
    if (folder / "adapter").is_dir():
        return Subject(folder / "adapter", base, config if config.is_file() else None)
    if (folder / "status.json").is_file():
        raise UserError(f"'{word}' has no adapter/, which a run writes at its end: run it to the end first")
    if (folder / "fedhpc.json").is_file() or (folder / "adapter_config.json").is_file():
        return Subject(folder, base, None)
    if base is not None:
        raise UserError(f"command line: --base is for an adapter, which '{word}' is not")
    return Subject(None, word, None)


def with_model_of(config: Config, subject: Subject) -> Config:
    """The configuration with the section `model` of what is tested."""
    if subject.export is None:
        if subject.base == config.model.name:
            return config
        return configuration.changed(config, [("model.name", subject.base), ("model.revision", None)], "MODEL")
    from fedhpc.customized import model_of

    model = model_of(subject.export, subject.base)
    changes = [(f"model.{key}", getattr(model, key)) for key in (*_OF_BASE, *_OF_EXPORT)]
    return configuration.changed(config, changes, "MODEL")


def refuse_unread(overrides: Sequence[str], subject: Subject, per_client: bool) -> None:
    """UserError for a key on the command line that MODEL settles or that only training reads: it changes nothing."""
    settled = _OF_BASE if subject.export is None else (*_OF_BASE, *_OF_EXPORT)
    read = _READ | {"partition"} if per_client else _READ
    for key in (word.partition("=")[0] for word in overrides):
        section = key.partition(".")[0]
        if key.removeprefix("model.") in settled and section == "model":
            raise UserError(f"command line: {key} is that of MODEL, which is tested", remedy="take it out")
        if section in configuration.KEYS and not {section, key} & read:
            only = "with --per-client" if section == "partition" else "by training"
            raise UserError(f"command line: {key} is read {only} alone", remedy="take it out")


def _imports() -> None:
    from fedhpc import customized  # noqa: F401
    from fedhpc.approaches import prepare  # noqa: F401


def _work(options: argparse.Namespace, subject: Subject, rank: Rank) -> None:
    """What the ranks do together: load, evaluate, print."""
    from fedhpc.approaches.averaging.evaluation import client_lines, turn_lines
    from fedhpc.evaluation.evaluate import over_clients
    from fedhpc.results.progress import lines_of_test

    loaded = load_on_all(rank.config, subject, options.per_client, rank)
    measured = measure(rank.config, loaded, options.per_client)
    if measured is None:
        return
    lines = [*loaded.evaluator.base.messages, *loaded.data.messages, *loaded.of_workers]
    if options.config is None and subject.config is None and rank.config.data.source.startswith("builtin:"):
        lines.append(f"data: no CONFIG was given, so the test is of the demo's data, {rank.config.data.source}")
    lines += lines_of_test(measured.outcome.metrics, measured.outcome.sampling, base={})
    lines += turn_lines(measured.outcome.turns)
    if measured.clients is not None:
        lines += client_lines(over_clients(measured.clients, rank.config.evaluation.metrics_of_test))
    print("\n".join(lines))
    if options.out is not None:
        write(options.out, options.model, measured, loaded.data.population.names)


def load_on_all(config: Config, subject: Subject, per_client: bool, rank: Rank) -> Loaded:
    """`load` on every rank, on rank 0 first: a mistake is said once, and the others find the tokens cached."""
    from fedhpc.approaches.prepare import assign_devices, load_together, worker_ranks
    from fedhpc.ranks.devices import device_of
    from fedhpc.ranks.topology import Topology
    from fedhpc.ranks.verdict import on_server

    transport = rank.transport
    launch = assign_devices(config, transport, rank.launch, rank.gpus)
    size, of_workers = worker_ranks(config, transport, launch, spreads=True)
    on_server(transport, lambda: Topology.of(transport.world_size, size).group_size)  # or why that cannot be
    transport.form_groups(Topology.of(transport.world_size, size, transport.nodes))
    made: list[Loaded] = []
    make = partial(load, config, subject, per_client, transport, device_of(launch), of_workers)
    if size > 1:
        on_server(transport, lambda: len(_read(config, subject, per_client).test))
        return load_together(transport, make)
    on_server(transport, lambda: made.append(make()))
    return made[0] if made else make()


def _read(config: Config, subject: Subject, per_client: bool) -> Data:
    """The data as the model of `subject` reads them. UserError where they are wrong."""
    from fedhpc import customized
    from fedhpc.data import load_data
    from fedhpc.models.load import load_tokenizer, model_class, stored_classes

    head = customized.classes_of(subject.export) if subject.export is not None else stored_classes(config.model)
    tokenizer, model = load_tokenizer(config.model), model_class(config.model)
    return load_data(config, tokenizer, model, head=head, purpose="clients" if per_client else "test")


def load(
    config: Config,
    subject: Subject,
    per_client: bool,
    transport: Transport,
    device: torch.device,
    of_workers: Sequence[str] = (),
) -> Loaded:
    """The model on `device` and the data. UserError where one of them is wrong, or they do not go together.

    Collective where the ranks of a worker hold the model between them.
    """
    import torch

    from fedhpc import customized, objectives, registry
    from fedhpc.approaches.inputs import label_targets
    from fedhpc.data.labels import in_head
    from fedhpc.evaluation.evaluate import Evaluator
    from fedhpc.models.load import check_length, check_tokens, load_base, model_class, stored_classes
    from fedhpc.objectives._preference import Preference

    model, export = model_class(config.model), subject.export
    objective = objectives.of_config(config, model)
    head = customized.classes_of(export) if export is not None else stored_classes(config.model)
    data = _read(config, subject, per_client)
    names = data.train.label_names
    method, payloads = None, torch.empty(1, 0)
    if export is None:
        base = load_base(config.model, device, names, config.run.seed, transport.group)
    else:
        if not model.has_target and head and in_head(names, head) is None:
            others = [name for name in names if name not in head]
            raise UserError(
                f"data.label: the classifier in '{export}' has not the class '{others[0]}' of the data, but "
                f"{', '.join(head)}"
            )
        customized_base = customized.load(export, subject.base, str(device), config.model.offload, transport.group)
        base, method = customized_base.base, customized_base.method
        if method is None and isinstance(objective, Preference) and objective.has_reference:
            raise UserError(
                f"objective.name {config.objective.name} compares with the base, and of '{export}' only what training "
                "made of it is loaded", key="objective.name",
                remedy="test it with objective.name=auto on a data.target; lora, ia3, prefix and prompt leave the base",
            )  # fmt: skip
        if method is not None:
            payloads = method.payload.flatten(customized_base.payload).unsqueeze(0)
    for name in config.evaluation.metrics_of_test:
        if (needed := registry.choice("metrics", name).needs) not in base.answers | objective.answers:
            raise UserError(f"evaluation.metrics: {name} is of {needed}, which '{base.name}' does not give")
    check_length(base, config.data.max_length, 0 if method is None else method.virtual_tokens)
    for split, examples in data.splits.items():
        check_tokens(base, examples, split)
    targets = label_targets(config, model, data, base.tokenizer)
    precision = config.runtime.precision
    evaluator = Evaluator(base, objective, config.evaluation, precision, transport, targets)
    return Loaded(evaluator, data, method, payloads, of_workers)


def measure(config: Config, loaded: Loaded, per_client: bool) -> Measured | None:
    """The test and, with `per_client`, the clients; on rank 0, None elsewhere. Collective."""
    from fedhpc.evaluation.evaluate import subset

    examples, wanted = loaded.data.test, config.evaluation
    indices = subset(len(examples), wanted.test_max_examples)
    outcome = loaded.evaluator.evaluate(
        loaded.method, loaded.payloads, examples, indices, wanted.metrics_of_test, wanted.samples, intervals=True
    )
    clients = _of_clients(config, loaded) if per_client else None
    return None if outcome is None else Measured(outcome, clients)


def _of_clients(config: Config, loaded: Loaded) -> dict[str, np.ndarray] | None:
    """The columns of the clients on rank 0, None elsewhere. Collective."""
    from fedhpc.approaches.averaging.evaluation import evaluated_clients

    population = loaded.data.population
    examples_of = population.held_out if config.evaluation.client_fraction else population.indices
    clients = evaluated_clients(config, population)
    return loaded.evaluator.by_client(
        loaded.method,
        loaded.payloads,
        loaded.data.train,
        clients,
        [examples_of(client) for client in clients],
        config.evaluation.metrics_of_test,
    )


def write(file: Path, model: str, measured: Measured, names: Sequence[str] | None) -> None:
    """Write all that is known to a JSON file. UserError where that is impossible. names: of the clients."""
    outcome, columns = measured.outcome, measured.clients
    test = {
        name: {"value": value, **outcome.sampling[name]._asdict()} for name, value in outcome.metrics.items()
    }  # fmt: skip
    tree: dict[str, Any] = {"model": model, "test": test, "samples": outcome.samples}
    if outcome.turns is not None:
        tree["turns"] = {name: column.tolist() for name, column in outcome.turns.items()}
    if columns is not None:
        clients = columns["client_id"].tolist()
        tree["clients"] = {
            **({"name": [names[client] for client in clients]} if names else {}),
            **{name: column.tolist() for name, column in columns.items()},
        }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_finite(tree), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}; choose another --out") from None


def _finite(value: Any) -> Any:
    """A tree with null where a number is not known, which JSON has no other word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    process.leave(main())
