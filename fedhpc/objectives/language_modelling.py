"""Language modelling: the cross-entropy of every token of a target, given what stands in front of it."""

from __future__ import annotations

from fedhpc.data.tokens import Examples
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.generative import TokenBatch
from fedhpc.objectives.base import CrossEntropy, Int32, Int64


class LanguageModelling(CrossEntropy):
    """The negative log-likelihood of each supervised token after all that stands in front of it."""

    tasks = frozenset({"causal_lm", "seq2seq"})
    can_pack = True

    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        return examples.num_supervised(indices)

    def packed(self, base: CausalLM, examples: Examples, indices: Int64, clients: Int64) -> TokenBatch:
        return base.packed(examples, indices, clients)

    def targets(self, examples: Examples, indices: Int64) -> Int32:
        row, position = examples.supervised(indices)
        targets: Int32 = examples.ids[examples.offsets[indices[row]] + position]
        return targets
