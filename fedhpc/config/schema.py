"""The keys of the configuration: their types, defaults and what they mean.

Each key has a one-line description here, or in the class `Options` of the file that a choice names
(`method: {name: prefix}` -> methods/prefix.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, create_model

from fedhpc import registry
from fedhpc.config.yaml import to_yaml
from fedhpc.registry import Choice, Chosen, Open, Section

EMBEDDED = Path(__file__).parents[1] / "default.yaml"

#: What becomes of a row whose supervised tokens have no room in `data.max_length`.
Overlong = Literal["error", "drop", "truncate"]
#: What becomes of a row that lacks a column which other rows have.
Missing = Literal["error", "empty"]

#: Which tokens of a chat are supervised: those of all the assistant's turns, of its last one, or all tokens.
TrainOn = Literal["assistant", "last_assistant", "all"]

#: Keys of the section `data` that name columns of its source.
COLUMNS = (
    *("prompt", "target", "messages", "tools", "chosen", "rejected", "desirable"),
    *("label", "client", "join", "where", "where_not"),
)

#: Keys of the section `model` that say how a base is quantised while it is loaded.
QUANTIZATION = ("quantize", "quantization_type", "double_quantization", "quantization_library")

#: Keys of which at most one can be given: one replaces the other.
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
        "none", description="weights of the linear layers of the frozen base in fewer bits"
    )
    quantization_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="what 4 bits stand for: the quantiles of a normal distribution (QLoRA), or floating point"
    )
    double_quantization: bool = Field(
        False, description="the scales of 4 bits in 8 bits each (QLoRA): 0.37 bits less for a weight"
    )
    quantization_library: Literal["bitsandbytes", "torchao"] = Field(
        "bitsandbytes", description="what quantises and computes; torchao: 8bit alone"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: the layers of the frozen base stay in host memory, and a GPU gets one at a time"
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
    source: str = Field(
        "builtin:dining",
        min_length=1,
        description="builtin:<task>, hub id, folder or file; the file's ending says its format",
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    streaming: bool = Field(False, description="read a hub data set as it comes, without a copy of it on this machine")
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
    messages: str | None = Field(
        None, description="column of chats (lists of {role, content}), in place of prompt and target"
    )
    tools: str | None = Field(None, description="column with the tools of a chat, as JSON schemas")
    chat_template: str | None = Field(None, description="file of a chat template (Jinja); default the tokenizer's own")
    train_on: TrainOn = Field("assistant", description="turns of a chat that the loss is on, with their end tokens")
    chosen: str | None = Field(
        None, min_length=1, description="the better of two answers to data.prompt: a column, or a template over columns"
    )
    rejected: str | None = Field(None, min_length=1, description="the worse one")
    desirable: str | None = Field(
        None, min_length=1, description="column that says whether data.target is an answer that people want"
    )
    label: str | None = Field(None, description="column with the class of an example")
    label_noise: float = Field(
        0.0, ge=0, le=1, description="probability that a training example has another class, drawn uniformly"
    )
    client: str | None = Field(None, description="column with the owner of an example, for natural partitions")
    client_from: Literal["column", "file", "folder"] = Field(
        "column", description="where the column client is: in the rows, or made of the names of files or folders"
    )
    missing: Missing = Field("error", description="a row without a column that others have: an error, or empty there")
    max_length: int = Field(256, ge=4, description="tokens; a longer prompt loses its front (encoders: its end)")
    overlong: Overlong = Field(
        "drop", description="rows whose target does not fit in max_length are an error, left out, or lose its end"
    )


class Federation(Section):
    rounds: int = Field(20, ge=1, description="number of rounds")
    cohort_size: int | None = Field(None, ge=1, description="clients sampled per round; default 10, or all of fewer")
    cohort_fraction: float | None = Field(None, gt=0, le=1, description="the same as a share of the population")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a sampled client does not report back")
    min_cohort: int = Field(1, ge=1, description="with fewer completed clients the round changes nothing")
    schedule: Annotated[Chosen, Choice("schedules", "synchronous")] = Field(description="which clients start when")


class DeviceModel(Open):
    name: Annotated[str, Choice("devices")] = Field(
        "none", description="how long clients take in virtual time (participation/devices/)"
    )


class Client(Open):
    optimizer: Annotated[str, Choice("client_optimizers")] = Field(
        "adamw", description="rule of the local steps (training/optimizers/)"
    )
    lr: float = Field(0.01, ge=0, description="learning rate of the clients")
    layer_lr_decay: float = Field(
        1.0, gt=0, le=10, description="factor of the learning rate for each layer that is further below the top one"
    )
    batch_size: int = Field(8, ge=1, description="examples per local step")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="batches whose gradients make one local step: as one batch of all their examples"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="examples of a client in one forward at most, for less memory; default batch_size"
    )
    packing: bool = Field(
        False, description="several short examples of a client in one row, apart from each other (decoders)"
    )
    epochs: int | None = Field(None, ge=1, description="passes over the client's data per round; default 1")
    steps: int | None = Field(None, ge=1, description="local steps per round, instead of epochs")
    weight_decay: float = Field(0.0, ge=0, description="L2 (sgd) or decoupled (adamw) weight decay")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of a client's gradient in a step")
    proximal: float = Field(0.0, ge=0, description="mu of FedProx: pull towards the state the round began with")
    proximal_metric: Literal["euclidean", "relative"] = Field(
        "euclidean",
        description="how far a client is from there; relative: squares over the mean square of their layer's keys or "
        "values, or of their tensor, as the round began",
    )
    scaffold: bool = Field(False, description="correct the clients' drift by control variates (SCAFFOLD, federated)")
    moments: Literal["fresh", "second", "second_by_block", "both"] = Field(
        "fresh",
        description="which moments of adamw clients begin a round with as the server has them, the mean of the "
        "clients' of the last round (federated); by_block: one mean for each layer or tensor; fresh: none",
    )
    server_momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each local step that is the direction of the last round (FedCM, federated)",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the learning rate over the whole run, down to lr_min"
    )
    schedule_per: Literal["step", "round"] = Field(
        "step", description="whether the learning rate changes with every local step, or once a round"
    )
    lr_min: float = Field(0.0, ge=0, description="learning rate at which a linear or cosine schedule ends")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the run in which the learning rate rises from 0")


class Server(Open):
    aggregator: Annotated[str, Choice("aggregators")] = Field(
        "mean", description="how updates combine (server/aggregators/)"
    )
    preaggregator: Annotated[Chosen, Choice("preaggregators", "none")] = Field(
        description="how updates are mixed before the aggregator sees them (server/preaggregators/)"
    )
    optimizer: Annotated[str, Choice("server_optimizers")] = Field(
        "sgd", description="how the server steps (server/optimizers/); sgd, lr 1.0: FedAvg"
    )
    lr: float = Field(1.0, ge=0, description="learning rate of the server")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weight of a client in the mean")


class Secure(Open):
    name: Annotated[str, Choice("secure_protocols")] = Field(
        "none", description="how uploads are masked, so that the server learns their sum alone"
    )


class Evaluation(Section):
    every: int = Field(5, ge=1, description="rounds between evaluations; first and last are always evaluated")
    metrics: Annotated[list[str], Choice("metrics")] = Field(
        ["loss"], description="names of files in evaluation/metrics/, such as loss, f1, recall"
    )
    test_metrics: Annotated[list[str] | None, Choice("metrics")] = Field(
        None, description="metrics of the test at the end; default metrics"
    )
    max_examples: int = Field(256, ge=1, description="size of the fixed validation subset")
    test_max_examples: int | None = Field(
        None, ge=1, description="size of a fixed test subset; default all of the split"
    )
    batch_size: int = Field(32, ge=1, description="examples per evaluation batch")
    max_new_tokens: int = Field(64, ge=1, description="length limit of generated text")
    samples: int = Field(8, ge=0, description="generated texts kept in /samples, and by round in /eval_samples")
    max_clients: int = Field(100, ge=1, description="clients of the per-client evaluation, a seeded sample")
    client_fraction: float = Field(0.0, ge=0, lt=1, description="share of each client's data held out of training")
    ema: float | None = Field(
        None, gt=0, lt=1, description="evaluate and export a moving average of the states, with this decay a round"
    )
    lawa: int | None = Field(
        None, ge=2, description="evaluate and export the mean of the states of this number of last rounds"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="the state that is tested and exported: the last, or that with the best first metric"
    )
    patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a better first metric after which the run ends"
    )

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
    block_size: _Positive | Literal["auto"] = Field(
        "auto", description="most clients that train in one forward (K); auto: by cohort, workers and device"
    )
    workers: _Positive = Field(
        8, description="how many ranks that train blocks are made for; the bits are the same on any number of them"
    )
    worker_ranks: _Positive | Literal["auto"] = Field(
        1,
        description="ranks that make up a worker and hold the base between them: each a part of every layer (G); auto: "
        "as few as there is memory for",
    )
    threads: _Positive | Literal["auto"] = Field(
        "auto", description="CPU threads per rank, also those that make tokens; auto is 1"
    )
    timeout_s: float = Field(60.0, ge=1, description="silence after which a rank counts as lost")
    deterministic: bool = Field(False, description="bit-identical results on CUDA, at a cost")


class Checkpoint(Section):
    every: int = Field(1, ge=1, description="rounds between checkpoints")


class Local(Section):
    max_clients: int = Field(100, ge=1, description="with mode local: the most clients that train, a seeded sample")


class ObjectiveChoice(Open):
    name: Annotated[str, Choice("objectives")] = Field("auto", description="what the loss of a batch is; by the model")


class AttackChoice(Open):
    name: Annotated[str, Choice("attacks")] = Field("none", description="what attackers do (attacks/)")
    fraction: float = Field(0.2, gt=0, lt=1, description="share of the population that attacks, drawn by run.seed")


class Partition(Open):
    name: Annotated[str, Choice("partitioners")] = Field("dirichlet", description="who holds which example")


class Customization(Open):
    name: Annotated[str, Choice("methods")] = Field("prefix", description="what is customized, and how")

    @property
    def goes_on_from(self) -> str | None:
        """The folder of the adapter from which training goes on, `method.from`; no attribute can be called so."""
        folder: str | None = getattr(self, "from")
        return folder


_FROM: dict[str, Any] = {
    "from": (str | None, Field(None, min_length=1, description="adapter/ of a run, or of PEFT, to go on from"))
}
#: The section `method`: a `Customization` with a key that is a word of Python, so that no class can be written with it.
_CUSTOMIZATION = create_model("Customization", __base__=Customization, **_FROM)


class Transformation(Open):
    name: Annotated[str, Choice("transforms")] = Field(description="what changes the clients' updates")


class Protection(Open):
    name: Annotated[str, Choice("privacy")] = Field("none", description="what differential privacy protects")


class Tracking(Open):
    name: Annotated[str, Choice("trackers")] = Field(description="where the rounds are shown beside the screen")


class Config(Section):
    """The resolved configuration.

    `objective`, `partition`, `method`, `devices`, `client`, `server`, `secure`, `attack`, `privacy`, each transform and
    each tracker carry the options of the file they name.
    """

    mode: Literal["federated", "centralized", "local"] = "federated"
    run: Run
    model: Model
    data: Data
    objective: SerializeAsAny[ObjectiveChoice]
    partition: SerializeAsAny[Partition]
    method: SerializeAsAny[Customization]
    federation: Federation
    devices: SerializeAsAny[DeviceModel]
    client: SerializeAsAny[Client]
    server: SerializeAsAny[Server]
    secure: SerializeAsAny[Secure]
    attack: SerializeAsAny[AttackChoice]
    transforms: tuple[SerializeAsAny[Transformation], ...]
    privacy: SerializeAsAny[Protection]
    trackers: tuple[SerializeAsAny[Tracking], ...]
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

    @property
    def divides_by_rate(self) -> str | None:
        """The choice by which updates are divided by the one learning rate of all parameters, if there is one."""
        if registry.choice("aggregators", self.server.aggregator).needs_movements:
            return f"server.aggregator {self.server.aggregator}"
        name = self.client.optimizer
        if self.corrects_drift and registry.choice("client_optimizers", name)(self.client).follows_gradients:
            return f"client.scaffold with client.optimizer {name}"
        return None

    @property
    def beside_updates(self) -> list[str]:
        """The keys by which clients send more than updates."""
        moments = [] if self.client.moments == "fresh" else ["client.moments"]
        return ["client.scaffold", *moments] if self.client.scaffold else moments

    @property
    def beside_theta(self) -> list[str]:
        """The keys by which clients are sent more than the server's model."""
        momentum = ["client.server_momentum"] if self.client.server_momentum else []
        return [*self.beside_updates, *momentum]

    @property
    def shares_direction(self) -> bool:
        """Whether clients are sent the direction of the last round: that of a client alone is its own."""
        return self.client.server_momentum > 0 and self.mode == "federated"

    @property
    def exchanges_moments(self) -> bool:
        """Whether clients begin with the server's moments: a client alone goes on with its own."""
        return self.client.moments != "fresh" and self.mode == "federated"

    @property
    def masks_uploads(self) -> bool:
        """Whether the server learns sums of the updates alone (secure aggregation)."""
        return self.secure.name != "none"

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; loading it gives an equal Config."""
        return to_yaml(self.model_dump(mode="json"))


#: Every section, in the order in which they are checked.
SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "data": Data,
    "federation": Federation,
    "evaluation": Evaluation,
    "personalization": Personalization,
    "runtime": Runtime,
    "checkpoint": Checkpoint,
    "local": Local,
    "objective": ObjectiveChoice,
    "partition": Partition,
    "method": _CUSTOMIZATION,
    "devices": DeviceModel,
    "client": Client,
    "server": Server,
    "secure": Secure,
    "attack": AttackChoice,
    "transforms": Transformation,
    "privacy": Protection,
    "trackers": Tracking,
}
#: The sections that are lists: of as many as are given.
LISTS = ("transforms", "trackers")
KEYS = ["mode", *SECTIONS]
