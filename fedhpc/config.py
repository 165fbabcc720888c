"""The configuration: one YAML file, typed, strict, resolved once and never edited.

Every key has a default and a one-line description here or in the `Options` class of the chosen file
(`method: {name: prefix}` -> methods/prefix.py). Unknown keys and values are errors that name the nearest valid one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, create_model

from fedhpc import registry
from fedhpc.errors import UserError, nearest
from fedhpc.registry import Choice, Section

EMBEDDED = Path(__file__).parent / "default.yaml"

# Section -> the keys whose value is the name of a file, with its family.
CHOICES: dict[str, dict[str, str]] = {
    "partition": {"name": "partitioners"},
    "method": {"name": "methods"},
    "client": {"optimizer": "client_optimizers"},
    "server": {"aggregator": "aggregators", "optimizer": "server_optimizers"},
    "transforms": {"name": "transforms"},
}
# Keys of which at most one can be given: one replaces the other.
ALTERNATIVES = {"client": ("epochs", "steps"), "federation": ("cohort_size", "cohort_fraction")}


class Run(Section):
    name: str = Field(
        "demo", pattern=r"^\w[\w .,+=-]*$", description="name of the run and of its directory under runs/"
    )
    dir: str | None = Field(None, description="run directory; default runs/<name>")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")


class Model(Section):
    name: str = Field("builtin", min_length=1, description="builtin, a hub id or a local folder")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    task: Literal["auto", "causal_lm", "classification", "embedding", "seq2seq"] = Field(
        "auto", description="what the model is trained for; auto: what it was made for"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="dtype of the frozen base"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none", description="weights of the frozen base in fewer bits, by bitsandbytes on a CUDA GPU"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each layer again in the backward pass instead of keeping what is inside it"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with a hub model; off unless asked for")


class Join(Section):
    file: str = Field(min_length=1, description="split or file of data.source with more columns for each row")
    column: str = Field(min_length=1, description="column of the rows that names one of its rows")
    key: str = Field(min_length=1, description="column of that file with those names")


class Data(Section):
    source: str = Field("builtin:dining", min_length=1, description="builtin:<task>, hub id, folder or file")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    train: str = Field("train", min_length=1, description="split or file of the clients' data")
    validation: str = Field("validation", min_length=1, description="split evaluated during the run")
    test: str = Field("test", min_length=1, description="split evaluated once, at the end")
    join: Join | None = Field(None, description="{file, column, key}: columns of another file, for each row of these")
    where: dict[str, list[str | int | float | bool]] = Field({}, description="keep rows with one of these values")
    where_not: dict[str, list[str | int | float | bool]] = Field({}, description="drop rows with one of these")
    prompt: str = Field("{mr} :", description="template over columns; no loss on it")
    target: str = Field(
        " {ref}", min_length=1, description="template over columns; the loss is on it (a classifier has none)"
    )
    label: str | None = Field(None, description="column with the class of an example")
    label_noise: float = Field(
        0.0, ge=0, le=1, description="probability that a training example has another class, drawn uniformly"
    )
    client: str | None = Field(None, description="column with the owner of an example, for natural partitions")
    max_length: int = Field(256, ge=4, description="tokens; a longer prompt loses its front (encoders: its end)")


class Federation(Section):
    rounds: int = Field(20, ge=1, description="number of rounds")
    cohort_size: int | None = Field(None, ge=1, description="clients sampled per round; default 10")
    cohort_fraction: float | None = Field(None, gt=0, le=1, description="the same as a share of the population")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a sampled client does not report back")
    min_cohort: int = Field(1, ge=1, description="with fewer completed clients the round changes nothing")


class Client(Section):
    optimizer: str = Field("adamw", description="rule of the local steps (training/optimizers/)")
    lr: float = Field(0.01, ge=0, description="learning rate of the clients")
    batch_size: int = Field(8, ge=1, description="examples per local step")
    epochs: int | None = Field(None, ge=1, description="passes over the client's data per round; default 1")
    steps: int | None = Field(None, ge=1, description="local steps per round, instead of epochs")
    weight_decay: float = Field(0.0, ge=0, description="L2 (sgd) or decoupled (adamw) weight decay")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of a client's gradient in a step")
    proximal: float = Field(0.0, ge=0, description="mu of FedProx: pull towards the state the round began with")
    scaffold: bool = Field(False, description="correct the clients' drift by control variates (federated, plain sgd)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the learning rate over the whole run, down to 0"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the run in which the learning rate rises from 0")


class Server(Section):
    aggregator: str = Field("mean", description="how updates combine (server/aggregators/)")
    optimizer: str = Field("sgd", description="how the server steps (server/optimizers/); sgd, lr 1.0: FedAvg")
    lr: float = Field(1.0, ge=0, description="learning rate of the server")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weight of a client in the mean")


class Evaluation(Section):
    every: int = Field(5, ge=1, description="rounds between evaluations; first and last are always evaluated")
    metrics: list[str] = Field(["loss"], description="names of files in evaluation/metrics/, such as loss, f1, recall")
    test_metrics: list[str] | None = Field(None, description="metrics of the test at the end; default metrics")
    max_examples: int = Field(256, ge=1, description="size of the fixed validation subset")
    test_max_examples: int | None = Field(None, ge=1, description="size of the test subset; default max_examples")
    batch_size: int = Field(32, ge=1, description="examples per evaluation batch")
    max_new_tokens: int = Field(64, ge=1, description="length limit of generated text")
    samples: int = Field(8, ge=0, description="generated texts kept in /samples")
    max_clients: int = Field(100, ge=1, description="clients of the per-client evaluation, a seeded sample")
    client_fraction: float = Field(0.0, ge=0, lt=1, description="share of each client's data held out of training")

    @property
    def metrics_of_test(self) -> list[str]:
        return self.metrics if self.test_metrics is None else self.test_metrics


_Positive = Annotated[int, Field(ge=1)]


class Personalization(Section):
    parts: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="patterns (* ? [...]) of names of payload tensors that stay on the client"
    )
    finetune_steps: int = Field(
        0, ge=0, description="local steps of every evaluated client from the final state, at the rate client.lr"
    )


class Runtime(Section):
    transport: Literal["auto", "torch", "mpi"] = Field("auto", description="how ranks talk")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where clients train")
    server: Literal["auto", "own", "shared", "cpu"] = Field(
        "auto",
        description="rank 0 beside workers on GPUs: its own GPU, a worker's or the CPU; auto: own if one is left",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="autocast of the forward")
    block_size: _Positive | Literal["auto"] = Field("auto", description="clients that train in one forward (K)")
    threads: _Positive | Literal["auto"] = Field("auto", description="CPU threads per rank; auto is 1")
    timeout_s: float = Field(60.0, ge=1, description="silence after which a rank counts as lost")
    deterministic: bool = Field(False, description="bit-identical results on CUDA, at a cost")


class Checkpoint(Section):
    every: int = Field(1, ge=1, description="rounds between checkpoints")


class Local(Section):
    max_clients: int = Field(100, ge=1, description="with mode local: at most so many clients, a seeded sample")


class Config(Section):
    """The resolved configuration. `partition`, `method`, `client`, `server` and each transform carry the
    options of the file they name."""

    mode: Literal["federated", "centralized", "local"] = "federated"
    run: Run
    model: Model
    data: Data
    partition: Any
    method: Any
    federation: Federation
    client: Any
    server: Any
    transforms: tuple[Any, ...]
    evaluation: Evaluation
    personalization: Personalization
    runtime: Runtime
    checkpoint: Checkpoint
    local: Local

    @property
    def run_dir(self) -> Path:
        return Path(str(self.run.dir))

    @property
    def corrects_drift(self) -> bool:
        """Whether control variates are kept: a client alone has no drift, c_i is c."""
        return bool(self.client.scaffold) and self.mode == "federated"

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; loading it gives an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


_PLAIN: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "data": Data,
    "federation": Federation,
    "evaluation": Evaluation,
    "personalization": Personalization,
    "runtime": Runtime,
    "checkpoint": Checkpoint,
    "local": Local,
}


class _Named(Section):
    name: str


_BASES: dict[str, type[Section]] = {
    "partition": _Named,
    "method": _Named,
    "client": Client,
    "server": Server,
    "transforms": _Named,
}
_DEFAULT_NAMES = {"partition": "dirichlet", "method": "prefix"}
SECTIONS = ["mode", *_PLAIN, *_BASES]


def load(path: str | None, overrides: list[str]) -> Config:
    """The configuration in the file `path` (None: the embedded default) with `section.key=value` overrides."""
    source = Path(path) if path is not None else EMBEDDED
    where = (str(path) if path else "embedded default") + (" and command line" if overrides else "")
    return resolve(override(read_yaml(source), parse_overrides(overrides)), where)


def resolve(raw: Mapping[str, Any], where: str = "configuration") -> Config:
    """Validate a raw tree. UserError with one line that names the key."""
    for key in raw:
        if key not in SECTIONS:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(str(key), SECTIONS)}")
    values: dict[str, Any] = {}
    for name, model in _PLAIN.items():
        values[name] = build(model, _mapping(raw, name, where), name, where)
    for name in ("partition", "method", "client", "server"):
        values[name] = _chosen(name, _mapping(raw, name, where), name, where)
    transforms = [] if raw.get("transforms") is None else raw["transforms"]
    if not isinstance(transforms, list):
        raise UserError(f"{where}: transforms must be a list of {{name: ...}}, got {transforms!r}")
    values["transforms"] = tuple(
        _chosen("transforms", item, f"transforms[{i}]", where) for i, item in enumerate(transforms)
    )
    values["mode"] = raw.get("mode", "federated")
    modes = list(get_args(Config.model_fields["mode"].annotation))
    if values["mode"] not in modes:
        raise UserError(f"{where}: mode: unknown value '{values['mode']}'; {nearest(str(values['mode']), modes)}")
    values["run"] = values["run"].model_copy(
        update={"dir": values["run"].dir or f"runs/{values['run'].name}"},
    )
    if values["federation"].cohort_size is None and values["federation"].cohort_fraction is None:
        values["federation"] = values["federation"].model_copy(update={"cohort_size": 10})
    if values["client"].epochs is None and values["client"].steps is None:
        values["client"] = values["client"].model_copy(update={"epochs": 1})
    for key in ("metrics", "test_metrics"):
        for name in getattr(values["evaluation"], key) or []:
            registry.choice("metrics", name, f"{where}: evaluation.{key}")
    config = Config.model_construct(**values)
    _cross_check(config, where)
    return config


def _cross_check(config: Config, where: str) -> None:
    """What no single key can tell."""
    for key in ("metrics", "test_metrics"):
        metrics = getattr(config.evaluation, key) or []
        if len({registry.short_name(name) for name in metrics}) < len(metrics):
            raise UserError(f"{where}: evaluation.{key} names a metric twice")
        of_labels = [name for name in metrics if registry.choice("metrics", name).needs == "labels"]
        if of_labels and config.data.label is None:
            raise UserError(f"{where}: evaluation.{key} has {of_labels[0]}, which needs data.label (a column)")
    if config.mode != "centralized":  # one owner of all data needs no partition
        partitioner = registry.choice("partitioners", config.partition.name)
        if partitioner.needs_owners and config.data.client is None:
            raise UserError(
                f"{where}: partition.name {config.partition.name} needs data.client (the column that names the owner)"
            )
        if partitioner.needs_labels and config.data.label is None:
            raise UserError(
                f"{where}: partition.name {config.partition.name} skews labels and needs data.label (a column); "
                "without labels use iid or quantity_skew"
            )
    aggregator, optimizer = config.server.aggregator, config.client.optimizer
    needs_movements = registry.choice("aggregators", aggregator).needs_movements
    if needs_movements and not registry.choice("client_optimizers", optimizer).sums_gradients:
        raise UserError(
            f"{where}: server.aggregator {aggregator} is defined for updates that are sums of gradients, which those "
            f"of client.optimizer {optimizer} are not: use sgd, or aggregator mean"
        )
    if config.method.name == "fedkseed":
        # A pull along coordinates other than the step's own: each would be a draw of all weights in every step.
        pulls = [key for key in ("momentum", "weight_decay", "proximal", "scaffold") if getattr(config.client, key, 0)]
        if config.client.optimizer != "sgd" or pulls:
            raise UserError(
                f"{where}: method.name fedkseed moves one coordinate a step, which client."
                f"{pulls[0] if pulls else 'optimizer ' + config.client.optimizer} does not: use client.optimizer sgd "
                "without momentum, weight_decay, proximal and scaffold"
            )
    if config.model.quantize != "none" and config.model.dtype == "float64":
        raise UserError(f"{where}: model.quantize {config.model.quantize} cannot go with model.dtype float64")
    if config.data.label_noise and config.data.label is None:
        raise UserError(f"{where}: data.label_noise changes classes and needs data.label (a column)")
    fewest, most = (getattr(config.partition, key, None) for key in ("min_examples", "max_examples"))
    if fewest is not None and most is not None and fewest > most:
        raise UserError(f"{where}: partition.min_examples {fewest} is more than partition.max_examples {most}")
    if config.client.scaffold:
        _check_scaffold(config, where)
    problem = config.method.conflict(config)
    if problem:
        raise UserError(f"{where}: {problem}")
    if config.personalization.parts or config.personalization.finetune_steps:
        _check_personalization(config, where)
    if config.runtime.precision != "float32" and config.model.dtype == "float64":
        raise UserError(f"{where}: runtime.precision {config.runtime.precision} cannot go with model.dtype float64")


def _check_scaffold(config: Config, where: str) -> None:
    if config.client.optimizer != "sgd" or config.client.momentum:
        raise UserError(
            f"{where}: client.scaffold is defined for plain SGD steps (arXiv 1910.06378, algorithm 1): use "
            "client.optimizer sgd without momentum"
        )
    if config.client.proximal:
        raise UserError(f"{where}: client.scaffold and client.proximal both correct the clients' drift: give one")
    if config.transforms:
        raise UserError(
            f"{where}: transforms would not reach the control variates that client.scaffold sends beside the "
            "update: give one of the two"
        )


def _check_personalization(config: Config, where: str) -> None:
    if config.mode != "federated":
        raise UserError(
            f"{where}: personalization is a client's own part of a federated state, and mode {config.mode} has none: "
            "take its keys out"
        )
    if not config.evaluation.client_fraction:
        raise UserError(
            f"{where}: personalization shows on each client's own data alone: give evaluation.client_fraction, the "
            "share of it that is held out"
        )
    if config.personalization.parts and config.client.scaffold:
        raise UserError(
            f"{where}: client.scaffold corrects the drift of what all clients share, and personalization.parts are "
            "meant to drift: give one of the two"
        )


def _chosen(section: str, raw: Any, label: str, where: str) -> Any:
    """A section whose options depend on the file it names: its own keys and those of the choice, flat."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: {label} must be a mapping, got {raw!r}")
    base = _BASES[section]
    names: dict[str, str] = {}
    for key, family in CHOICES[section].items():
        field = base.model_fields[key]
        name = raw.get(key, _DEFAULT_NAMES.get(section) if field.is_required() else field.default)
        if name is None:
            raise UserError(f"{where}: {label}.{key} is missing; valid: {', '.join(registry.names(family))}")
        registry.load(family, name, f"{where}: {label}.{key}")
        names[key] = name
    model = _model(section, tuple(names.values()))
    return build(model, {**raw, **names}, label, where)


@cache
def _model(section: str, names: tuple[str, ...]) -> type[Section]:
    """The keys of a section and of its choices; one class for each, so that equal configurations are equal."""
    options = [registry.options(f, n) for f, n in zip(CHOICES[section].values(), names, strict=True)]
    given = [cls for cls in options if cls is not Section]  # Section itself: a choice without keys
    return create_model(f"{section}:{'+'.join(names)}", __base__=(_BASES[section], *given))


def _mapping(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name} must be a mapping of keys to values, got {value!r}")
    for one, other in [ALTERNATIVES[name]] if name in ALTERNATIVES else []:
        if value.get(one) is not None and value.get(other) is not None:
            raise UserError(f"{where}: {name}.{one} and {name}.{other} exclude each other: give one")
    return value


_UNION_MEMBER = re.compile(r"int|str|float|bool|list\[.*|literal\[.*|constrained-.*")  # as pydantic calls them


def build(model: type[Section], raw: Mapping[str, Any], label: str, where: str) -> Any:
    """The section `model` with the keys `raw`. UserError with one line that names the key."""
    values = {str(key): value for key, value in raw.items()}
    for key, field in model.model_fields.items():
        values |= _inner(field, key, values, label, where)
    try:
        return model(**values)
    except ValidationError as error:
        first, *others = error.errors()
        if first["type"] == "extra_forbidden":
            path = [str(part) for part in first["loc"]]
            hint = f"; {nearest(path[0], list(model.model_fields))}" if len(path) == 1 else ""
            raise UserError(f"{where}: unknown key '{'.'.join([label, *path])}'{hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: {label}.{first['loc'][0]} is missing") from None
        place, messages = list(first["loc"]), [first["msg"]]
        if _UNION_MEMBER.fullmatch(str(place[-1])):  # none of several types fits: say all of them
            messages += [other["msg"] for other in others if list(other["loc"][:-1]) == place[:-1]]
            place.pop()
        problem = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in messages))
        if first["msg"].startswith("Input should be "):
            problem = f"must be {problem}"
        if first["type"] == "string_pattern_mismatch":
            problem = "only letters, digits, spaces and . , + = - _ are allowed"
        key = ".".join([label, *(str(part) for part in place if part != "[key]")])
        raise UserError(f"{where}: {key}: {problem[0].lower()}{problem[1:]}, got {first['input']!r}") from None


def _inner(field: Any, key: str, values: Mapping[str, Any], label: str, where: str) -> dict[str, Any]:
    """The value of a key that is a section itself, a list of sections or a choice, built; else nothing."""
    value, label = values.get(key), f"{label}.{key}"
    for choice in (mark for mark in field.metadata if isinstance(mark, Choice)):
        raw = _inner_mapping({} if value is None else value, label, where)
        name = raw.get("name", choice.default)
        registry.load(choice.family, name, f"{where}: {label}.name")
        return {key: build(_inner_model(choice.family, name), {**raw, "name": name}, label, where)}
    kind = field.annotation
    items: Any = get_args(kind)[0] if get_origin(kind) is list else None
    if _is_section(items) and isinstance(value, list):
        named = [(item, f"{label}[{i}]") for i, item in enumerate(value)]
        return {key: [build(items, _inner_mapping(item, name, where), name, where) for item, name in named]}
    if _is_section(kind):
        return {key: build(kind, _inner_mapping({} if value is None else value, label, where), label, where)}
    return {}


def _inner_mapping(value: Any, label: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {label} must be a mapping of keys to values, got {value!r}")
    return value


@cache
def _inner_model(family: str, name: str) -> type[Section]:
    options = registry.options(family, name)
    return create_model(f"{family}:{name}", __base__=(_Named,) if options is Section else (_Named, options))


def parse_overrides(texts: Sequence[str]) -> list[tuple[str, Any]]:
    """`section.key=value` as (section.key, value). UserError where one is not of that form."""
    parsed = []
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"command line: '{text}' is not of the form section.key=value")
        parsed.append((key, parse_yaml(value, f"command line: {key}")))
    return parsed


def override(raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], where: str = "command line") -> dict[str, Any]:
    """`raw` with (section.key, value) put in; itself unchanged.

    A new choice drops the options of the old one; of two alternatives the overriding one stays.
    """
    parsed = [(key.split("."), value) for key, value in changes]
    for path, _ in parsed:
        if "" in path:
            raise UserError(f"{where}: '{'.'.join(path)}' is not of the form section.key")
    raw = dict(raw)
    for path, value in parsed:
        if path[0] not in SECTIONS:
            raise UserError(f"{where}: unknown key '{'.'.join(path)}'; {nearest(path[0], SECTIONS)}")
        if len(path) > 1 and not isinstance(raw.get(path[0]) or {}, Mapping):
            raise UserError(f"{where}: {path[0]} has no keys, so not {'.'.join(path)}")
        if len(path) == 2 and path[0] in CHOICES and path[1] in CHOICES[path[0]]:
            raw[path[0]] = _without_old_options(dict(raw.get(path[0]) or {}), path[0], path[1], value)
        if len(path) == 3 and path[0] in CHOICES and path[2] == "name":  # a choice within a choice
            section = dict(raw.get(path[0]) or {})
            inner = section.get(path[1])
            if isinstance(inner, Mapping) and inner.get("name") != value:
                raw[path[0]] = {**section, path[1]: {}}
        if len(path) == 2 and path[1] in ALTERNATIVES.get(path[0], ()):
            section = dict(raw.get(path[0]) or {})
            for key in ALTERNATIVES[path[0]]:
                section.pop(key, None)
            raw[path[0]] = section
    for path, value in parsed:
        node = raw
        for step, key in enumerate(path[:-1]):
            child = node.get(key)
            if child is not None and not isinstance(child, Mapping):
                raise UserError(f"{where}: {'.'.join(path[: step + 1])} has no keys, so not {'.'.join(path)}")
            node[key] = dict(child or {})
            node = node[key]
        node[path[-1]] = value
    return raw


def _without_old_options(section: dict[str, Any], name: str, key: str, new: Any) -> dict[str, Any]:
    base = _BASES[name].model_fields[key]
    old = section.get(key, _DEFAULT_NAMES.get(name) if base.is_required() else base.default)
    if old == new or old not in registry.names(CHOICES[name][key]):
        return section
    dropped = set(registry.options(CHOICES[name][key], old).model_fields)
    return {k: v for k, v in section.items() if k not in dropped}


class _Loader(yaml.SafeLoader):
    """Strict YAML: no duplicate keys; only true and false are booleans; 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML declares it
        first: [(tag, regex) for tag, regex in resolvers if tag not in ("tag:yaml.org,2002:bool",
                                                                        "tag:yaml.org,2002:float",
                                                                        "tag:yaml.org,2002:int",
                                                                        "tag:yaml.org,2002:timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }  # fmt: skip

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                problem = "a mapping cannot be a key; quote a text that has braces"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key '{key}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBER = "-+0123456789."
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list(_NUMBER))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list(_NUMBER),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UserError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The tree of a YAML text under the strict rules. UserError with `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with stricter rules
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def reference() -> str:
    """Every key with its default and what it means, as `python -m fedhpc.config` prints it."""
    lines = ["mode: federated    # federated | centralized | local"]

    def keys(model: type[Section], indent: str) -> None:
        for name, field in model.model_fields.items():
            inner = next((a for a in (field.annotation, *get_args(field.annotation)) if _is_section(a)), None)
            if inner is not None:
                lines.append(f"{indent}{name}:    # {field.description}")
                keys(inner, f"{indent}  ")
                continue
            choice = next((mark for mark in field.metadata if isinstance(mark, Choice)), None)
            stated = {"name": choice.default} if choice else field.default
            default = "(required)" if field.is_required() and not choice else json.dumps(stated)
            values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            choices = f" ({' | '.join(map(str, values))})" if values else ""
            lines.append(f"{indent}{name}: {default}    # {field.description}{choices}")

    for section in [*_PLAIN, *_BASES]:
        lines.append(f"{section}:")
        if section in _PLAIN:
            keys(_PLAIN[section], "  ")
            continue
        if _BASES[section] is not _Named:
            keys(_BASES[section], "  ")
        for key, family in CHOICES[section].items():
            for choice in registry.names(family):
                lines.append(f"  # with {key}: {choice}")
                keys(registry.options(family, choice), "  ")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
