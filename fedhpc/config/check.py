"""What no single key of the configuration can tell: keys that do not go together, and keys that nobody reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from fedhpc import registry
from fedhpc.config.choices import build
from fedhpc.config.schema import LISTS, SECTIONS, Client, Config, Run
from fedhpc.errors import UserError
from fedhpc.registry import Section, flat_choices


def completed(section: Section) -> Section:
    """A section with the values that it has where a person leaves several keys out."""
    if isinstance(section, Run) and section.dir is None:
        return section.model_copy(update={"dir": f"runs/{section.name}"})
    if isinstance(section, Client) and section.epochs is None and section.steps is None:
        return section.model_copy(update={"epochs": 1})
    return section


def unread_of(config: Config, name: str) -> list[str]:
    """The keys of a section, as section.key, that the configuration's method does not read."""
    reads = type(config.method).reads
    if name == "trackers":  # the round loop reads them, whatever the method
        return []
    if name in LISTS:
        return [] if reads is None or name in reads else [name]
    return _unread(reads, name, dict(getattr(config, name)))


def _unread(reads: Collection[str] | None, section: str, values: Mapping[str, Any]) -> list[str]:
    """The keys of a section, as section.key, that nobody reads. reads: the sections and section.keys that are read.

    The options of a choice are read with the key that names it.
    """
    if reads is None or section in reads:
        return []
    model = SECTIONS[section]
    named_by: dict[str, str] = {}
    for choice, family in flat_choices(model).items():
        with suppress(UserError):  # a wrong name is told where the section is built
            name = values.get(choice, model.model_fields[choice].default)
            named_by |= dict.fromkeys(registry.options(family, name).model_fields, choice)
    return [f"{section}.{key}" for key in values if f"{section}.{_owner(key, model, named_by)}" not in reads]


def _owner(key: str, model: type[Section], named_by: Mapping[str, str]) -> str:
    return key if key in model.model_fields else named_by.get(key, key)


def refuse_unread(config: Config, given: Mapping[str, str]) -> None:
    """UserError for a key that a person gave, with another value than its default, and that nobody reads."""
    for name in SECTIONS:
        section: Any = getattr(config, name)
        choices = flat_choices(SECTIONS[name])
        # The choice of a section first: its options mean nothing without it.
        for key in sorted(unread_of(config, name), key=lambda key: key.partition(".")[2] not in choices):
            changed = bool(section) if name in LISTS else _changed(name, section, key.partition(".")[2])
            if key in given and changed:
                raise UserError(f"method.name {config.method.name} does not read it", key=key, remedy="take it out")
    asked = "attack.fraction" in given and "attack.name" not in given  # with the name it can be a run's config.yaml
    if config.attack.name == "none" and (asked or _changed("attack", config.attack, "fraction")):
        raise UserError(
            "a share of the clients attacks, and attack.name says not how",
            key="attack.fraction", remedy="name an attack, such as sign_flip, or take it out",
        )  # fmt: skip
    if config.data.chosen is not None and "data.target" in given and _changed("data", config.data, "target"):
        raise UserError("the answers are data.chosen and data.rejected", key="data.target", remedy="take it out")


def _changed(name: str, section: Section, key: str) -> bool:
    """Whether a key has another value than the one it has where only the choices of its section are given."""
    if key in flat_choices(type(section)):
        return bool(getattr(section, key) != SECTIONS[name].model_fields[key].default)
    names = {choice: getattr(section, choice) for choice in flat_choices(type(section))}
    return bool(getattr(section, key) != getattr(completed(build(SECTIONS[name], names, name)), key))


def without_unread(raw: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """A raw tree without the keys that the chosen method does not read, but for those that a person gave."""
    method = raw.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if name not in registry.names("methods"):
        return dict(raw)
    reads = registry.options("methods", str(name)).reads
    tree: dict[str, Any] = {}
    for section, value in raw.items():
        if section in SECTIONS and isinstance(value, Mapping):
            unused = set(_unread(reads, section, value)) - set(given)
            value = {key: of_key for key, of_key in value.items() if f"{section}.{key}" not in unused}
        tree[section] = value
    return tree


def conflicts(config: Config) -> None:
    """UserError for keys that do not go together, or lack another one."""
    for key in ("metrics", "test_metrics"):
        metrics = getattr(config.evaluation, key) or []
        if len({registry.short_name(name) for name in metrics}) < len(metrics):
            raise UserError(f"evaluation.{key} names a metric twice")
        of_labels = [name for name in metrics if registry.choice("metrics", name).needs == "labels"]
        if of_labels and config.data.label is None:
            raise UserError(f"evaluation.{key} has {of_labels[0]}, which needs data.label (a column)")
    _check_chats(config)
    if config.mode != "centralized":  # one owner of all data needs no partition
        partitioner = registry.choice("partitioners", config.partition.name)
        if partitioner.needs_owners and config.data.client is None:
            raise UserError(
                f"partition.name {config.partition.name} needs data.client (the column that names the owner)"
            )
        if partitioner.needs_labels and config.data.label is None:
            raise UserError(
                f"partition.name {config.partition.name} skews labels and needs data.label (a column); "
                "without labels set partition.name to iid or quantity_skew (dirichlet is the default)"
            )
    if config.data.client_from != "column" and config.data.client is None:
        raise UserError(
            f"data.client_from {config.data.client_from} makes a column of the clients' names: say with data.client "
            "what it is called"
        )
    _check_steps(config)
    aggregator, optimizer = config.server.aggregator, config.client.optimizer
    needs_movements = registry.choice("aggregators", aggregator).needs_movements
    if needs_movements and not registry.choice("client_optimizers", optimizer).sums_gradients:
        raise UserError(
            f"server.aggregator {aggregator} is defined for updates that are sums of gradients, which those "
            f"of client.optimizer {optimizer} are not: use sgd, or aggregator mean"
        )
    if config.attack.name != "none" and config.mode != "federated":
        raise UserError(
            f"attacks are on a federation, and with mode {config.mode} every client trains alone",
            key="attack.name", remedy="take it out",
        )  # fmt: skip
    if registry.choice("attacks", config.attack.name).changes_examples and config.data.label is None:
        raise UserError(f"attack.name {config.attack.name} changes classes and needs data.label (a column)")
    if registry.choice("aggregators", aggregator).needs_root:
        if config.mode != "federated":
            raise UserError(
                f"server.aggregator {aggregator} measures clients by the server, and mode {config.mode} has one owner",
                key="server.aggregator", remedy="use mean",
            )  # fmt: skip
        if config.data.chosen is not None:
            raise UserError(
                f"server.aggregator {aggregator} trains on validation examples, and those of preferences are pairs",
                key="server.aggregator", remedy="use another one, such as geometric_median",
            )  # fmt: skip
    if needs_movements and config.server.preaggregator.name != "none":
        raise UserError(
            f"server.aggregator {aggregator} weighs the local steps of each client, and mixed updates are of several",
            key="server.preaggregator", remedy="take it out",
        )  # fmt: skip
    if config.method.name == "fedkseed":
        # A pull along coordinates other than the step's own: each would be a draw of all weights in every step.
        names = ("momentum", "weight_decay", "proximal", "scaffold", "server_momentum")
        pulls = [key for key in names if getattr(config.client, key, 0)]
        if config.client.optimizer != "sgd" or pulls:
            raise UserError(
                f"method.name fedkseed moves one coordinate a step, which client."
                f"{pulls[0] if pulls else 'optimizer ' + config.client.optimizer} does not: use client.optimizer sgd "
                "without momentum, weight_decay, proximal, scaffold and server_momentum"
            )
    if config.method.goes_on_from is not None and registry.is_approach(config.method.name):
        raise UserError(
            f"method.name {config.method.name} has no adapter to go on from", key="method.from", remedy="take it out"
        )
    if config.runtime.worker_ranks not in (1, "auto") and config.runtime.transport == "mpi":
        raise UserError(
            "the ranks of a worker gather layers with torch.distributed, not over MPI",
            key="runtime.worker_ranks", remedy="use runtime.transport torch, or give 1",
        )  # fmt: skip
    if config.model.quantize != "none" and config.runtime.worker_ranks not in (1, "auto"):
        raise UserError(
            f"model.quantize {config.model.quantize} packs the numbers of a layer, which cannot be divided among "
            f"{config.runtime.worker_ranks} ranks", key="runtime.worker_ranks",
            remedy="give model.quantize none, or runtime.worker_ranks 1",
        )  # fmt: skip
    if config.model.quantize != "none" and config.model.offload != "none":
        raise UserError(
            f"model.offload {config.model.offload} is for layers that have all their bits, and model.quantize "
            f"{config.model.quantize} packs them", key="model.offload", remedy="give one of the two",
        )  # fmt: skip
    if config.model.quantize != "none" and config.model.dtype == "float64":
        raise UserError(f"model.quantize {config.model.quantize} cannot go with model.dtype float64")
    _quantization(config)
    if config.data.label_noise and config.data.label is None:
        raise UserError("data.label_noise changes classes and needs data.label (a column)")
    fewest, most = (getattr(config.partition, key, None) for key in ("min_examples", "max_examples"))
    if fewest is not None and most is not None and fewest > most:
        raise UserError(f"partition.min_examples {fewest} is more than partition.max_examples {most}")
    evaluation = config.evaluation
    if evaluation.ema is not None and evaluation.lawa is not None:
        raise UserError(
            "evaluation.ema is an average of states too", key="evaluation.lawa", remedy="give one of the two"
        )
    chosen = [f"evaluation.{key}" for key in ("ema", "lawa", "patience") if getattr(evaluation, key) is not None]
    if evaluation.keep != "last":
        chosen.insert(0, "evaluation.keep")
    if config.mode == "local" and chosen:
        raise UserError(
            "with mode local every client has a state of its own, and they are evaluated together",
            key=chosen[0],
            remedy="take it out",
        )
    if not evaluation.metrics and (evaluation.keep == "best" or evaluation.patience is not None):
        raise UserError(
            "evaluation.keep best and evaluation.patience go by the first of evaluation.metrics, and there is none",
            key="evaluation.metrics", remedy="name one, such as loss",
        )  # fmt: skip
    if config.personalization.parts and chosen and chosen != ["evaluation.patience"]:
        raise UserError(
            "personalization.parts stay on the clients, which have those of their last round alone",
            key=chosen[0], remedy="take it out",
        )  # fmt: skip
    _check_compression(config)
    if config.client.scaffold and config.client.proximal:
        raise UserError("client.scaffold and client.proximal both correct the clients' drift: give one")
    if config.client.moments != "fresh":
        _check_moments(config)
    if config.client.server_momentum:
        _check_server_momentum(config)
    if config.beside_updates and config.transforms:
        raise UserError(
            f"transforms would not reach what {config.beside_updates[0]} sends beside the update: give one of the two"
        )
    if config.masks_uploads:
        _check_secure(config)
    problem = config.method.conflict(config) or config.privacy.conflict(config)
    if problem:
        raise UserError(problem)
    choices = ("devices.name", config.devices), ("federation.schedule.name", config.federation.schedule)
    for key, choice in (*choices, ("server.optimizer", config.server)):
        problem = choice.conflict(config)
        if problem:
            raise UserError(problem, key=key)
    if config.personalization.parts or config.personalization.finetune_steps:
        _check_personalization(config)
    if config.runtime.precision != "float32" and config.model.dtype == "float64":
        raise UserError(f"runtime.precision {config.runtime.precision} cannot go with model.dtype float64")


def _check_steps(config: Config) -> None:
    client = config.client
    if client.proximal_metric == "relative":
        if not client.proximal:
            raise UserError(
                "client.proximal_metric is of a pull that is not there, for client.proximal is 0",
                key="client.proximal_metric", remedy="give client.proximal, or take it out",
            )  # fmt: skip
        name = config.server.aggregator
        if registry.choice("aggregators", name).needs_movements:
            raise UserError(
                f"server.aggregator {name} knows one client.proximal, and with client.proximal_metric relative each "
                "layer has its own", key="client.proximal_metric", remedy="use euclidean, or server.aggregator mean",
            )  # fmt: skip
    if client.layer_lr_decay != 1.0 and config.divides_by_rate:
        raise UserError(
            f"{config.divides_by_rate} divides by one learning rate, and with client.layer_lr_decay each layer has its "
            "own", key="client.layer_lr_decay", remedy="give one of the two",
        )  # fmt: skip
    for key, changed in (("lr_min", client.lr_min > 0), ("schedule_per", client.schedule_per != "step")):
        if changed and client.schedule == "constant":
            raise UserError(
                f"client.{key} is of a learning rate that goes down, and client.schedule is constant",
                key=f"client.{key}", remedy="choose linear or cosine, or take it out",
            )  # fmt: skip
    if client.lr_min > client.lr:
        raise UserError(f"client.lr_min {client.lr_min} is more than client.lr {client.lr}", key="client.lr_min")
    if client.schedule_per == "round" and client.warmup:
        raise UserError(
            "client.warmup begins with a rate of 0, at which the clients of round 1 would learn nothing",
            key="client.schedule_per", remedy="use step, or take client.warmup out",
        )  # fmt: skip
    if client.micro_batch is not None and client.micro_batch > client.batch_size:
        raise UserError(
            f"client.micro_batch {client.micro_batch} is more than client.batch_size {client.batch_size}, all examples "
            "of a client that are in one forward", key="client.micro_batch",
        )  # fmt: skip


def _check_chats(config: Config) -> None:
    data, defaults = config.data, type(config.data).model_fields
    if data.chosen is not None and data.train_on != defaults["train_on"].default:
        raise UserError("of pairs the loss is on the answers", key="data.train_on", remedy="take it out")
    if data.messages is None:
        for key in ("tools", "chat_template", "train_on"):
            if getattr(data, key) != defaults[key].default and data.chosen is None:
                raise UserError(f"data.{key} is of chats and needs data.messages (a column)")
        return
    for key in ("prompt", "target"):
        if getattr(data, key) != defaults[key].default:
            raise UserError(f"data.messages and data.{key} are two ways to write an example: give one")
    for name in {*config.evaluation.metrics, *config.evaluation.metrics_of_test}:
        if registry.choice("metrics", name).needs == "labels":
            raise UserError(
                f"evaluation.metrics: {name} chooses between labels, and the answers of chats (data.messages) are texts"
            )


def _check_moments(config: Config) -> None:
    name, server = config.client.optimizer, config.server
    if not registry.choice("client_optimizers", name)(config.client).moments:
        raise UserError(
            f"client.moments is of optimizers that keep means of the gradient, which client.optimizer {name} does not: "
            "use adamw, or take it out", key="client.moments",
        )  # fmt: skip
    mixing = server.preaggregator.name
    if server.aggregator not in ("mean", "fedexp") or mixing != "none":
        raise UserError(
            "client.moments takes the mean of what clients send, which "
            f"{f'server.aggregator {server.aggregator}' if mixing == 'none' else f'server.preaggregator {mixing}'} "
            "would not reach: use mean or fedexp, without a pre-aggregator, or take it out", key="client.moments",
        )  # fmt: skip


def _check_server_momentum(config: Config) -> None:
    name = config.server.aggregator
    aggregator = registry.choice("aggregators", name)
    if aggregator.needs_movements or aggregator.needs_root or name == "fedexp":
        raise UserError(
            f"client.server_momentum goes where the clients went, and server.aggregator {name} measures or stretches "
            "how far that was", key="client.server_momentum", remedy="use mean, or take it out",
        )  # fmt: skip
    if config.client.scaffold:
        raise UserError("client.scaffold and client.server_momentum both correct the clients' drift: give one")


def _check_secure(config: Config) -> None:
    name, cohort = config.secure.name, config.federation.cohort_size
    if config.mode != "federated":
        raise UserError(
            f"secure.name {name} masks what clients send, and with mode {config.mode} they send nothing",
            key="secure.name", remedy="take it out",
        )  # fmt: skip
    aggregator = config.server.aggregator
    if not registry.choice("aggregators", aggregator).sums_only:
        raise UserError(
            f"secure.name {name} gives the server weighted sums of the updates alone, and aggregator {aggregator} asks "
            "for more", key="server.aggregator", remedy="use mean or fednova, or take secure out",
        )  # fmt: skip
    if config.server.preaggregator.name != "none":
        raise UserError(
            f"secure.name {name} lets nobody mix single updates", key="server.preaggregator.name",
            remedy="give one of the two",
        )  # fmt: skip
    if registry.choice("attacks", config.attack.name).sees_others:
        raise UserError(
            f"secure.name {name} hides what honest clients send, which attack.name {config.attack.name} asks for",
            key="attack.name", remedy="give one of the two",
        )  # fmt: skip
    if config.beside_updates:
        raise UserError(
            f"secure.name {name} masks the updates, not what goes beside them",
            key=config.beside_updates[0], remedy="give one of the two",
        )  # fmt: skip
    if config.federation.schedule.name != "synchronous":
        raise UserError(
            f"secure.name {name} masks the updates of clients that begin a round together",
            key="federation.schedule.name", remedy="use synchronous",
        )  # fmt: skip
    for position, transform in enumerate(config.transforms):
        if registry.choice("transforms", transform.name).packs and getattr(transform, "direction", "up") != "down":
            raise UserError(
                f"transforms: {transform.name} packs an update in fewer bytes, and secure.name {name} sends masked "
                "integers of 8 bytes, which cannot be packed", key=f"transforms[{position}]",
                remedy="give one of the two",
            )  # fmt: skip
    if cohort is not None and config.federation.schedule.over_selection == 1:
        registry.choice("secure_protocols", name)(config.secure).require(cohort, cohort)


def _check_compression(config: Config) -> None:
    """What changes numbers comes first, then what chooses some of them, last what packs them; on each way by itself."""
    stages = {"coordinates": 1, "codes": 2, "factors": 2}
    for way in ("up", "down"):
        before: list[tuple[str, int]] = []
        for position, section in enumerate(config.transforms):
            if getattr(section, "direction", "up") not in (way, "both"):
                continue
            name, key, transform = section.name, f"transforms[{position}]", registry.choice("transforms", section.name)
            sends = getattr(transform, "sends", "")  # transforms of other people may pack in a way of their own
            stage = stages.get(sends, 2 if transform.packs else 0)
            for other, earlier in before:
                if stage < earlier:
                    raise UserError(
                        f"{name} comes after {other}, which has packed the update", key=key,
                        remedy=f"put {name} in front of {other}",
                    )  # fmt: skip
                if stage == earlier > 0:
                    raise UserError(f"{name} and {other} both pack the update", key=key, remedy="give one of the two")
                if sends == "factors" and earlier:
                    raise UserError(
                        f"{name} packs whole matrices, of which {other} sends some coordinates", key=key,
                        remedy="give one of the two",
                    )  # fmt: skip
            before.append((name, stage))
            schedule = config.federation.schedule.name
            if way == "down" and (config.mode != "federated" or schedule != "synchronous"):
                where = f"mode {config.mode}" if config.mode != "federated" else f"federation.schedule {schedule}"
                raise UserError(
                    f"the model goes down compressed in synchronous rounds of mode federated, not with {where}",
                    key=f"{key}.direction", remedy="use up",
                )  # fmt: skip


def _check_personalization(config: Config) -> None:
    if config.mode != "federated":
        raise UserError(
            f"personalization is a client's own part of a federated state, and mode {config.mode} has none: "
            "take its keys out"
        )
    if not config.evaluation.client_fraction:
        raise UserError(
            "personalization shows on each client's own data alone: give evaluation.client_fraction, the "
            "share of it that is held out"
        )
    if config.personalization.parts and config.beside_theta:
        raise UserError(
            f"{config.beside_theta[0]} is of what all clients share, and personalization.parts are meant to drift: "
            "give one of the two"
        )


def _quantization(config: Config) -> None:
    """UserError where a key says how to quantise what `model.quantize` does not."""
    model = config.model
    if model.quantization_library == "torchao" and model.quantize != "8bit":
        raise UserError(
            f"model.quantization_library torchao is for model.quantize 8bit, not {model.quantize}: its 4 bits compute "
            "on GPUs of some makes alone", key="model.quantization_library", remedy="use bitsandbytes, or 8bit",
        )  # fmt: skip
    for key in ("quantization_type", "double_quantization"):
        if model.quantize != "4bit" and getattr(model, key) != type(model).model_fields[key].default:
            raise UserError(
                f"model.{key} is of 4 bits, and model.quantize is {model.quantize}", key=f"model.{key}",
                remedy="take it out, or set model.quantize to 4bit",
            )  # fmt: skip
