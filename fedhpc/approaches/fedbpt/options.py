"""Black-box prompt tuning: FedBPT (Sun et al. 2023, arXiv 2310.01467). A soft prompt without a gradient of the model.

CMA-ES moves a normal distribution over z in R^d; the soft prompt is p_0 + A z with a fixed random A
(subspace.py). The rounds are those of approach.py; this file has the options. What a run
exports is what method prompt exports: a PEFT prompt-tuning adapter.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fedhpc.approaches.scoring.conflict import ACCEPTED, READS, conflict
from fedhpc.methods.prompt import Prompt


class Options(Prompt.Options):
    reads = READS | ACCEPTED

    dimension: int = Field(32, ge=2, description="d, of the random subspace")
    alpha: float = Field(1.0, gt=0, description="spread of the first prompts, in deviations of the word embeddings")
    popsize: int = Field(20, ge=4, description="candidates of an iteration (lambda)")
    exchange: Literal["moments", "scores"] = Field(
        "moments", description="clients search alone and send their distribution, or all score the server's candidates"
    )
    iterations: int = Field(8, ge=1, description="of a client's own search in a round, with exchange moments")
    examples: int | None = Field(None, ge=1, description="examples of a client that a round scores on; default all")
    objective: Literal["loss", "label_loss", "accuracy"] = Field(
        "loss", description="what is scored: likelihood of the target, of the label among labels, or right labels"
    )

    def conflict(self, config: Any) -> str | None:
        if self.exchange == "moments" and config.mode != "federated":
            return f"method.exchange moments is between clients, and mode {config.mode} has one: use exchange scores"
        server = config.server
        chosen = (server.aggregator, server.preaggregator.name, server.weighting)
        if self.exchange == "moments" and chosen != ("mean", "none", "examples"):
            return (
                "server.aggregator, preaggregator and weighting: with method.exchange moments distributions are "
                "weighted by the rank of their scores; take them out, or use exchange scores"
            )
        return conflict(config, self.objective)
