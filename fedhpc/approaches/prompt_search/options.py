"""Prompt engineering: a search for the best words of a prompt, scored by the clients on their own data.

No parameter is trained. The round is that of fedhpc/approaches/prompt_search/approach.py; this file has its options.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedhpc.approaches.scoring.conflict import ACCEPTED, READS, conflict
from fedhpc.registry import Choice, Chosen, Section

_Text = Annotated[str, Field(min_length=1)]


class Options(Section):
    reads = READS | ACCEPTED | {"evaluation.max_clients"}

    instructions: list[_Text] = Field([], description="hand-written texts in front of the input, to begin with")
    cues: list[str] = Field([""], min_length=1, description="texts between input and answer; the first to begin with")
    label_words: dict[str, list[str]] = Field(
        {}, description="words of each label, the first to begin with; default: the label's name"
    )
    separator: str = Field("\n", description="between instruction, demonstrations and input")
    demonstrations: int = Field(0, ge=0, description="most examples in a prompt; a client puts its own there")
    rules: list[Literal["random", "balanced", "short"]] = Field(
        ["random", "balanced", "short"], min_length=1, description="how a client may choose its demonstrations"
    )
    share_demonstrations: bool = Field(False, description="clients send examples, and prompts are made of those")
    max_prompt_tokens: int = Field(64, ge=1, description="of instruction, demonstrations, cue and longest label")
    objective: Literal["loss", "label_loss", "accuracy"] = Field(
        "loss", description="what is scored: likelihood of the target, of the label among labels, or right labels"
    )
    proposers: Annotated[list[Chosen], Choice("proposers", "templates")] = Field(
        min_length=1,
        description="where new candidates come from (proposers/), each an equal share",
    )
    population: int = Field(16, ge=2, description="candidates of a generation")
    survivors: int = Field(4, ge=1, description="candidates that go on to the next generation")
    eta: int = Field(2, ge=2, description="each round of a generation goes on with one in eta of the candidates")
    examples: int = Field(4, ge=1, description="examples of a client in a generation's first round; times eta in each")

    def conflict(self, config: Any) -> str | None:
        if self.survivors >= self.population:
            return (
                f"method.survivors {self.survivors} leaves no place for others in method.population {self.population}"
            )
        if self.share_demonstrations and not self.demonstrations:
            return "method.share_demonstrations: no prompt has demonstrations; give method.demonstrations"
        if not config.evaluation.metrics:
            return "evaluation.metrics: prompts are compared by the first metric on the validation split; give one"
        return conflict(config, self.objective)
