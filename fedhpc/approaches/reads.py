"""Which keys of the configuration all approaches read; each adds its own (`Options.reads`).

A key that a person gave and that the chosen approach does not read is refused (fedhpc.config.check).
"""

from __future__ import annotations

#: To load model and data, to divide them among clients and these among workers, and to evaluate.
ALWAYS = frozenset(
    {
        *("mode", "run", "model", "objective", "partition", "method", "federation", "runtime", "checkpoint"),
        *("data.source", "data.subset", "data.streaming", "data.train", "data.test", "data.where", "data.where_not"),
        *("data.prompt", "data.target", "data.label", "data.client", "data.client_from"),
        *("data.missing", "data.max_length", "data.overlong"),
        *("evaluation.every", "evaluation.metrics", "evaluation.test_metrics", "evaluation.batch_size"),
        *("evaluation.max_examples", "evaluation.test_max_examples"),
        *("evaluation.samples", "evaluation.max_new_tokens"),
        # Where blocks are placed follows from the steps that their clients would take.
        *("client.batch_size", "client.gradient_accumulation_steps", "client.steps", "client.epochs"),
    }
)

#: Of approaches that evaluate on the validation split, from the same files as what clients train on.
SPLITS = frozenset({"data.validation", "data.join", "data.label_noise"})
