"""What to do with a run directory: start a run in it, resume the one it holds, or report it as finished.

`decide` writes nothing. A run is resumed where its configuration, data and model are the same; some keys may differ.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedhpc.config import Config, changed, plugins, read_yaml, restore, unread
from fedhpc.errors import UserError
from fedhpc.results.checkpoint import CHECKPOINT, checkpoint_meta
from fedhpc.results.lock import LOCK_WAIT_S, refuse_live, unusable
from fedhpc.results.run_directory import FILES, FOLDERS
from fedhpc.results.status import read_status

# What a resumed run may change without changing what it computes. federation.rounds and runtime.block_size
# have rules of their own in _compare.
FREE_KEYS = frozenset(
    {
        "run.name",
        "run.dir",
        "model.offload",
        "runtime.transport",
        "runtime.device",
        "runtime.server",
        "runtime.timeout_s",
        "runtime.worker_ranks",
        "runtime.threads",
        "checkpoint.every",
    }
)

# The keys whose value may be a path, relative to the working directory.
_PATHS = re.compile(
    r"data\.(source|chat_template)|devices\.file|model\.name|"
    r"method\.(.+\.)?(source|model|encoder|retriever|adapter|from)"
)

FREE_SECTIONS = ("trackers",)  # other ones, or none, or ones that are gone by now

Decision = Literal["fresh", "resume", "finished"]


def decide(
    config: Config,
    directory: Path,
    fresh: bool,
    data_fingerprint: str | None = None,
    model_fingerprint: str | None = None,
    wait_s: float = LOCK_WAIT_S,
) -> Decision:
    """What to do with `directory`: start a run in it, resume the one it holds, or report it as finished.

    A fingerprint of None is one not known yet and is not compared, so that the configuration can be judged
    before data and model are loaded. UserError where the directory cannot serve this run, InUseError where a live
    run still has it after `wait_s`. Writes nothing.
    """
    _check_usable(directory)
    refuse_live(directory, wait_s)
    status = read_status(directory)
    if status is None and not (directory / CHECKPOINT).exists():
        taken = [name for name in (*FILES, *FOLDERS) if os.path.lexists(directory / name)]
        if taken:
            raise UserError(
                f"{directory}: holds no run of fedhpc, but {', '.join(taken)} that a run would replace; "
                "choose another run.dir"
            )
        return "fresh"
    if fresh:  # before the checkpoint is opened: a damaged one must not stand in the way of starting over
        return "fresh"
    meta = checkpoint_meta(directory)
    if meta is None and (directory / "results.h5").exists():
        if status is None or status.state != "complete":
            raise UserError(f"{directory}: has no checkpoint, cannot resume; start over with --fresh")
        meta = {"round": status.round}
    if meta is None:
        return "fresh"  # ended before its first checkpoint: nothing to resume, nothing to lose
    _check_plugins(config, directory, meta.get("plugins", {}))
    complete = status is not None and status.state == "complete"
    extended = _compare(config, directory, meta, complete)
    began_in = _other_folder(meta)
    for what, now in (("data", data_fingerprint), ("model", model_fingerprint)):
        stored = meta.get(f"fingerprint_{what}")
        if now is not None and stored is not None and now != stored:
            elsewhere = f"; it began in {began_in}, and relative paths are others here" if began_in else ""
            raise UserError(
                f"{directory}: the content of the {what} changed since the run began ({stored} -> {now}){elsewhere}; "
                "put the old content back, choose another run.dir, or start over with --fresh"
            )
    if complete and not extended:
        return "finished"
    if not (directory / CHECKPOINT).exists():
        raise UserError(f"{directory}: has no checkpoint, cannot be extended; start over with --fresh")
    if began_in is not None:
        _check_paths(config, directory, began_in)
    return "resume"


def _other_folder(meta: Mapping[str, Any]) -> Path | None:
    """The working directory that the run had, if it is another one than now, and is known and still there."""
    folder = meta.get("working_directory")
    return Path(folder) if folder is not None and folder != os.getcwd() and Path(folder).is_dir() else None


def where_it_began(config: Config, meta: Mapping[str, Any]) -> Config:
    """The configuration with the relative paths that were files or folders where the run began made absolute.

    meta: of the run's checkpoint.
    """
    began_in = _other_folder(meta)
    if began_in is None:
        return config
    changes = [
        (key, str(began_in / value)) for key, value in by_key(config.model_dump(mode="json")).items()
        if _PATHS.fullmatch(key) and isinstance(value, str) and value != "builtin" and (began_in / value).exists()
    ]  # fmt: skip
    return changed(config, changes, f"{began_in}, where the run began")


def _check_paths(config: Config, directory: Path, began_in: Path) -> None:
    """UserError where a relative path of the configuration is a file or folder where the run began, but not here."""
    for key, value in by_key(config.model_dump(mode="json")).items():
        if not _PATHS.fullmatch(key) or not isinstance(value, str) or os.path.isabs(value):
            continue
        if (began_in / value).exists() and not Path(value).exists():
            raise UserError(
                f"{directory}: the run began in {began_in}, where {key} '{value}' is; here, in {os.getcwd()}, there is "
                f"none; give the same command in {began_in}",
                key=key,
            )


def _check_plugins(config: Config, directory: Path, before: Mapping[str, str]) -> None:
    """UserError where a plugin that the run began with has another source now."""
    now = plugins(config)
    for which, digest in before.items():
        if now.get(which, digest) != digest and not which.startswith(FREE_SECTIONS):
            raise UserError(
                f"{directory}: the source of the plugin {which} changed since the run began ({digest[:12]} -> "
                f"{now[which][:12]}); put the old file back, choose another run.dir, or start over with --fresh"
            )


def _compare(config: Config, directory: Path, meta: Mapping[str, Any], complete: bool) -> bool:
    """Whether the run is to go beyond the rounds it was made for. UserError where it is another run."""
    path = directory / "config.yaml"
    try:
        tree = {key: value for key, value in read_yaml(path).items() if key not in FREE_SECTIONS}
        old = by_key(restore(tree, str(path)).model_dump(mode="json"))
    except UserError as error:
        raise UserError(
            f"{error}; it says what the run in {directory} computes: mend it, or start over with --fresh"
        ) from error
    new = by_key(config.model_dump(mode="json"))
    free = {*FREE_KEYS, "federation.rounds"}
    # Without a number the cohort has ten clients, which older versions wrote down.
    if {old.get("federation.cohort_size"), new["federation.cohort_size"]} == {None, 10}:
        free.add("federation.cohort_size")
    if new["runtime.block_size"] == meta.get("block_size"):
        free.add("runtime.block_size")
    if not complete:  # the test is yet to come
        free.add("evaluation.test_max_examples")
    ignored = [*unread(config), *FREE_SECTIONS]
    free |= {key for key in {*old, *new} if any(f"{key}.".startswith(f"{one}.") for one in ignored)}
    changed = [key for key in [*old, *(k for k in new if k not in old)] if old.get(key) != new.get(key)]
    # Options that came or went with a choice explain less than the choice itself.
    differing = sorted((key for key in changed if key not in free), key=lambda k: (k in old) + (k in new) < 2)
    if differing:
        shown = ", ".join(f"{key} {_shown(old, key)} -> {_shown(new, key)}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{directory}: holds a run of another configuration: {shown}{more}; choose another run.name or "
            "run.dir, or start over with --fresh"
        )
    before, rounds, done = int(old["federation.rounds"]), config.federation.rounds, int(meta["round"])
    if rounds < done:
        raise UserError(
            f"{directory}: {done} rounds are done, federation.rounds cannot be {rounds}; give at least "
            f"{done}, choose another run.dir, or start over with --fresh"
        )
    if rounds != before and (config.client.schedule != "constant" or config.client.warmup > 0):
        raise UserError(
            f"{directory}: federation.rounds {before} -> {rounds} would change the learning rates of the "
            "rounds done; it needs client.schedule constant and client.warmup 0; start over with --fresh"
        )
    fixed = config.method.fixes_rounds or config.privacy.fixes_rounds
    if rounds != before and fixed:
        raise UserError(
            f"{directory}: federation.rounds {before} -> {rounds}: {fixed}; give {before}, choose "
            "another run.dir, or start over with --fresh"
        )
    return rounds > before


def by_key(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration by key: {"client.lr": 0.01, "transforms.0.name": "clip", ...}."""
    if not isinstance(tree, (dict, list)) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= by_key(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = json.dumps(flat[key], ensure_ascii=False).strip('"') if key in flat else "(absent)"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_usable(directory: Path) -> None:
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise unusable(directory, f"{existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unusable(directory, f"no permission to write in {existing}")
