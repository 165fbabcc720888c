"""What every rank knows before the first round, whatever is exchanged: base model, data, population, devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedhpc import objectives, registry
from fedhpc.approaches.memory import require_room
from fedhpc.config import Config
from fedhpc.config.schema import Client
from fedhpc.data import Data, divided_again
from fedhpc.data.encoding import encode
from fedhpc.data.load import template
from fedhpc.errors import UserError
from fedhpc.models.base import Base
from fedhpc.models.footprint import Footprint
from fedhpc.models.load import check_length, check_tokens, load_base, load_tokenizer, model_class
from fedhpc.objectives.base import Objective
from fedhpc.participation.sampling import cohort_size, num_rounds
from fedhpc.ranks.devices import device_of, peak_memory
from fedhpc.ranks.group import Group
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.topology import Topology
from fedhpc.training.schedule import num_steps


@dataclass(frozen=True)
class Inputs:
    """What every rank knows before the first round."""

    config: Config
    base: Base
    objective: Objective
    data: Data
    rounds: int
    topology: Topology
    label_targets: list[str] | None  # the target of each label, where a metric needs them
    placement: Placement  # where the ranks work
    weights: Footprint
    program_bytes: int  # what this process had taken of the device's memory before it loaded the base
    #: What rank 0 has found for all ranks (`Approach.decisions`); nothing on rank 0.
    decided: Mapping[str, float] = field(default_factory=dict)
    #: What is to be said of the ranks of each worker, a line each.
    of_workers: Sequence[str] = ()
    #: Which worker gets the first block of a round: of several runs in a process each begins with another one.
    first_worker: int = 0

    def has_base_for(self, labels: Sequence[str], seed: int) -> bool:
        """Whether another run with the same section `model` would load the same base: its head can have been drawn."""
        drawn_alike = not self.base.drawn or seed == self.config.run.seed
        return drawn_alike and list(labels) == list(self.data.train.label_names)


def load_inputs(
    config: Config,
    launch: Launch,
    topology: Topology,
    write_cache: bool,
    read: Callable[[Config, Any, type[Base], bool], Data],
    group: Group | None = None,
    beside: Sequence[Inputs] = (),
) -> Inputs:
    """Load and check the model and the data, which `read` reads. UserError where one of them is wrong.

    group: the ranks that hold the base between them. beside: of runs that go on in this process, and whose
    `shared_settings` are those of this one: base, objective and splits of theirs serve it too, as far as these do not
    hang on the run.
    """
    model = model_class(config.model)
    objective = objectives.of_config(config, model)
    if objective.needs_full_steps:
        _refuse_split_steps(config.client)
    data = divided_again(beside[0].data, beside[0].config, config) if beside else None
    if data is None:
        data = read(config, load_tokenizer(config.model), model, write_cache)
    device = device_of(launch)
    weights = require_room(config, device, topology.group_size)
    program = peak_memory(device)
    labels, seed = data.train.label_names, config.run.seed
    if sharing := next((one for one in beside if one.has_base_for(labels, seed)), None):
        base, objective = sharing.base, sharing.objective
    else:
        base = load_base(config.model, device, labels, seed, group)
    check_length(base, config.data.max_length, virtual=0)
    for split, examples in data.splits.items():
        check_tokens(base, examples, split)
    size = cohort_size(config, data.population)
    if config.federation.min_cohort > size:
        raise UserError(f"federation.min_cohort is {config.federation.min_cohort}, but only {size} are sampled")
    if config.mode == "centralized" and num_steps(data.population.num_examples(0), config.client) == 0:
        raise UserError("data.train: there is no training example left")
    return Inputs(
        config=config,
        base=base,
        objective=objective,
        data=data,
        rounds=num_rounds(config, data.population),
        topology=topology,
        label_targets=label_targets(config, model, data, base.tokenizer),
        placement=launch.placement,
        weights=weights,
        program_bytes=program,
    )


def check_inputs(
    config: Config,
    launch: Launch,
    topology: Topology,
    write_cache: bool,
    read: Callable[[Config, Any, type[Base], bool], Data],
) -> None:
    """UserError where `load_inputs` would find the data wrong, which it then reads from the cache, or memory short."""
    read(config, load_tokenizer(config.model), model_class(config.model), write_cache)
    require_room(config, device_of(launch), topology.group_size)


def _refuse_split_steps(client: Client) -> None:
    """UserError where a step would be cut into several forwards, for an objective that compares all its examples."""
    keys = {"micro_batch": client.micro_batch, "gradient_accumulation_steps": client.gradient_accumulation_steps > 1}
    for key, cut in keys.items():
        if cut:
            raise UserError(
                f"client.{key} cuts a step into several forwards, and this objective compares all examples of a step "
                "with each other", key=f"client.{key}", remedy="take it out",
            )  # fmt: skip


def label_targets(config: Config, model: type[Base], data: Data, tokenizer: Any) -> list[str] | None:
    """The rendered target of every label, between which accuracy decides; a head has the labels themselves."""
    evaluation = config.evaluation
    metrics = {*evaluation.metrics, *evaluation.metrics_of_test}
    of_labels = sorted(name for name in metrics if registry.choice("metrics", name).needs == "labels")
    key = "evaluation.metrics"
    if not of_labels and registry.choice("attacks", config.attack.name).changes_examples:
        of_labels, key = [config.attack.name], "attack.name"
    if not of_labels:
        return None
    if not model.has_target:
        return data.train.label_names
    target = template(config.data.target, "data.target", tokenizer)
    if list(target.columns) != [config.data.label]:
        raise UserError(
            f"{key}: {of_labels[0]} is of choices between labels, so data.target must be made of the "
            f"label alone, like ' {{{config.data.label}}}'"
        )
    targets = [target.render({str(config.data.label): name}) for name in data.train.label_names]
    first: dict[tuple[int, ...], str] = {}
    for name, ids in zip(data.train.label_names, encode(tokenizer, targets)[0], strict=True):
        other = first.setdefault(tuple(ids), name)
        if other != name:
            raise UserError(
                f"data.label: the tokenizer of '{config.model.name}' has the same tokens for '{other}' and '{name}', "
                f"so {of_labels[0]} cannot tell them apart; give the classes other names, in a column of their own"
            )
    return targets
