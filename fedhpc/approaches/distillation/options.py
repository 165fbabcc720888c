"""Knowledge distillation: what is exchanged is what models hold likely on a public set, not their parameters.

The method of each model, of the server's and of every group of clients, is one that has parameters, with its options.
See `fedhpc.approaches.distillation.approach`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedhpc import registry
from fedhpc.approaches.reads import ALWAYS, SPLITS
from fedhpc.registry import Choice, Chosen, Section


class Public(Section):
    source: str | None = Field(None, min_length=1, description="where it is, as in data.source; default data.source")
    split: str | None = Field(
        None, min_length=1, description="split or file; with source or where train, else rows taken out of data.train"
    )
    where: dict[str, list[str | int | float | bool]] = Field({}, description="keep rows with one of these values")
    where_not: dict[str, list[str | int | float | bool]] = Field({}, description="drop rows with one of these")
    max_examples: int = Field(256, ge=1, description="size; a fixed sample of a larger set")


class Group(Section):
    model: str | None = Field(None, min_length=1, description="base of these clients; default model.name")
    method: Annotated[Chosen, Choice("methods", "lora")] = Field(
        description="what they train, {name: ..., its options}"
    )
    share: float = Field(1.0, gt=0, description="share of the clients, as a part of the sum of all shares")


class Learning(Section):
    lr: float | None = Field(None, ge=0, description="learning rate; default client.lr")
    batch_size: int | None = Field(None, ge=1, description="public examples per step; default client.batch_size")
    epochs: int = Field(1, ge=1, description="passes over the public set in a round")


class Options(Section):
    reads = (
        ALWAYS
        | SPLITS
        | {"client.optimizer", "client.lr", "client.weight_decay", "client.clip_norm"}
        | {"client.proximal", "client.proximal_metric", "client.layer_lr_decay"}
        | {"client.schedule", "client.schedule_per", "client.lr_min", "client.warmup"}
        | {"client.micro_batch", "server.weighting", "evaluation.max_clients"}
    )

    student: Annotated[Chosen, Choice("methods", "lora")] = Field(
        description="what the server's model (model.name) trains, {name: ..., its options}"
    )
    groups: list[Group] = Field([], description="clients by model and method; default one group, with the server's")
    public: Public = Field(description="the examples on which all give their opinion")
    top_k: int | None = Field(16, ge=1, description="likeliest classes that are sent per position; null: all")
    temperature: float = Field(1.0, gt=0, description="of the softmax, of teachers and of learners")
    aggregation: Literal["mean", "entropy"] = Field(
        "mean", description="weight of a client at a position, times server.weighting; entropy: by its confidence"
    )
    align: Literal["none", "edit_distance"] = Field(
        "none", description="how knowledge gets from one tokenizer to another, where a group has its own"
    )
    down: Literal["ensemble", "server", "none"] = Field(
        "ensemble", description="whose knowledge the clients learn from before they train"
    )
    hard_weight: float = Field(0.0, ge=0, le=1, description="weight of the public examples' own targets in the loss")
    distil: Learning = Field(description="how the server learns from the ensemble")
    digest: Learning = Field(description="how the clients learn from what goes down")
    alone: bool = Field(True, description="at the end, compare with the student trained on the public targets alone")

    def conflict(self, config: Any) -> str | None:
        if config.mode != "federated":
            return (
                f"mode {config.mode} has no ensemble to distil: give method the name of what is trained, such as "
                f"{self.student.name}"
            )
        for key, learning in (("distil", self.distil), ("digest", self.digest)):
            if learning.lr is not None and learning.lr < config.client.lr_min:
                return f"method.{key}.lr {learning.lr} is less than client.lr_min {config.client.lr_min}"
        methods = {"student": self.student, **{f"groups[{i}].method": g.method for i, g in enumerate(self.groups)}}
        for key, method in methods.items():
            if registry.is_approach(method.name):
                return f"method.{key}: {method.name} trains no model of its own; use one such as lora"
            if method.name == "fedkseed":
                return f"method.{key}: fedkseed sends seeds to save bytes, of which nothing is left here; use full"
            problem: str | None = method.conflict(config)
            if problem:
                return problem
        return None
