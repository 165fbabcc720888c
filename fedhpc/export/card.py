"""What the card of an export says of its run: data, clients, method, test, and the command that exported it.

A card may be published, so paths of this machine are named by their last parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedhpc.approaches.export import for_others
from fedhpc.config import Config
from fedhpc.export.source import Source
from fedhpc.report.runs import LoadedRun
from fedhpc.report.text import Grid, as_number, in_order, title_of


def section(run: LoadedRun, config: Config, source: Source, command: Sequence[str]) -> str:
    """The part of a README.md behind how to use the export. command: what writes it, as `for_others`."""
    parts = ["## The run", f"Exported: {source.of}."]
    parts.append("\n".join(f"- {line}" for line in _facts(run, config)))
    run = replace(run, config={**run.config, "data": _for_others(run.config["data"])})
    test, base = run.metrics("test"), run.metrics("base")
    if source.is_tested and test:
        parts.append(_tested(run, test, base))
    parts.append(
        f"Trained by `fedhpc run` with the `config.yaml` in the run's directory `{command[2]}`, and exported by:"
    )
    parts.append("```\n" + " ".join(command) + "\n```")
    return "\n\n".join(parts) + "\n"


def _facts(run: LoadedRun, config: Config) -> list[str]:
    partition = run.results.groups["partition"]
    sizes = partition.get("num_examples")
    clients = f"{len(sizes):,} clients with {int(sizes.sum()):,} examples" if sizes is not None else "clients"
    options = _for_others(config.method.model_dump(mode="json", exclude_defaults=True))
    method = {**options, "name": for_others(config.method.name)}
    sampled = config.federation.cohort_size
    return [
        f"data: `{for_others(config.data.source)}`, {clients}, partition {for_others(config.partition.name)}",
        f"method: `{json.dumps(method, ensure_ascii=False)}`",
        f"{config.mode}: {run.results.num_rounds} rounds of {run.planned}"
        + (f", {sampled} clients a round" if sampled and config.mode == "federated" else "")
        + f", seed {config.run.seed}",
    ]


def _for_others(value: Any) -> Any:
    """Options with the last part of each absolute path."""
    if isinstance(value, dict):
        return {key: _for_others(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_for_others(one) for one in value]
    return for_others(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _tested(run: LoadedRun, test: dict[str, float], base: dict[str, float]) -> str:
    rows = []
    for name in in_order(test):
        sampling = run.sampling("test", name)
        known = sampling is not None and sampling.known
        interval = f"{as_number(sampling.low)} to {as_number(sampling.high)}" if sampling and known else ""
        before = as_number(base[name]) if name in base else ""
        rows.append([title_of(name), before, as_number(test[name]), interval, sampling.items if sampling else ""])
    header = ["metric", "untouched base", "this", "95 % interval", "over"]
    return Grid(f"Test on {run.test_set}", header, rows).markdown().rstrip()
