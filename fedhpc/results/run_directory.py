"""The run directory: atomic files, checkpoint, status.json, lock, and what to do with a directory found.

Every file is written to a temporary one beside it, fsynced and renamed over the old one, so a killed writer
or a full disk leaves the old file whole. Rank 0 alone calls these functions. The order at the start of a run:
`decide`, `lock`, then `begin` (decision fresh) or `sweep` (resume); `decide` itself writes nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedhpc.config import Config, plugins, read_yaml, restore, unread
from fedhpc.errors import UserError

FORMAT = "fedhpc-run"
FILES = ("config.yaml", "results.h5", "status.json")
FOLDERS = ("adapter", "checkpoint", "clients")
CHECKPOINT = Path("checkpoint") / "state.safetensors"
LOCK = ".lock"
LOCK_WAIT_S = 2.0
TEMPORARY = ".fedhpc-tmp"

# What a resumed run may change without changing what it computes. federation.rounds and runtime.block_size
# have rules of their own in _compare.
FREE_KEYS = frozenset(
    {
        "run.name",
        "run.dir",
        "runtime.transport",
        "runtime.device",
        "runtime.server",
        "runtime.timeout_s",
        "runtime.threads",
        "checkpoint.every",
    }
)

Decision = Literal["fresh", "resume", "finished"]
State = Literal["running", "complete", "preempted", "failed"]


# ---------------------------------------------------------------- atomic files


def atomic_write(path: Path, content: bytes) -> None:
    """Replace the file at `path`: it has its old or its new content at any moment, on the disk too.

    UserError where the disk is full or the directory cannot be written; the old file is then intact.
    """
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed over it when the body has written it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{path}: cannot be written: {reason}; what was there before is intact: make room or allow "
            "writing, then start the same command again and the run goes on after its last checkpoint"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a directory; the rename is atomic there all the same.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove the temporary files that killed runs left. Only with the lock held."""
    for folder in (directory, *(directory / name for name in FOLDERS), *(directory / "clients").glob("*")):
        for stale in folder.glob(f".*{TEMPORARY}"):
            stale.unlink()


def begin(directory: Path) -> None:
    """Mark the directory as ours and remove the files of an earlier run, and nothing else.

    Only with the lock held, after `decide` said fresh.
    """
    # First, so that a directory whose removal is interrupted is known as ours, and not as a finished run.
    write_status(directory, "running", 0)
    sweep(directory)
    for name in FOLDERS:
        folder = directory / name
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    for name in FILES:
        if name != "status.json":
            (directory / name).unlink(missing_ok=True)


def write_config(directory: Path, config: Config) -> None:
    """config.yaml: the resolved configuration of the run."""
    atomic_write(directory / "config.yaml", config.to_yaml().encode())


# ---------------------------------------------------------------- status.json


@dataclass(frozen=True)
class Status:
    """status.json, for scripts: where the run stands, after which round, and why it ended."""

    state: State
    round: int
    reason: str
    updated_utc: str


def write_status(directory: Path, state: State, round: int, reason: str = "") -> None:
    """Replace status.json. UserError as atomic_write."""
    status = Status(state, round, reason, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    content = {"format": FORMAT, **asdict(status)}
    atomic_write(directory / "status.json", (json.dumps(content, indent=1) + "\n").encode())


def read_status(directory: Path) -> Status | None:
    """The status of the run in `directory`; None where there is none, or a status.json that is not ours."""
    try:
        content = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{directory / 'status.json'}: cannot be read: {error.strerror}") from error
    except ValueError:
        return None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        return None
    try:
        return Status(**content)
    except TypeError:
        raise UserError(
            f"{directory / 'status.json'}: damaged; delete it: the run resumes from its checkpoint"
        ) from None


# ---------------------------------------------------------------- tensors and the checkpoint

# What reading a file that is missing, cut or changed can raise.
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Replace the safetensors file `path`: arrays of any shape, `meta` as JSON in the header, and a checksum."""
    # Not ascontiguousarray, which turns a scalar into a vector of one.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps(meta)
    header = {"format": FORMAT, "meta": text, "crc32": str(_checksum(arrays, text))}
    with _replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata=header)


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, meta) as saved. One of DAMAGE where the file is missing or a single bit differs."""
    with safe_open(path, framework="np") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    if int(header["crc32"]) != _checksum(arrays, header["meta"]):
        raise ValueError("its checksum does not match")
    return arrays, json.loads(header["meta"])


def save_checkpoint(directory: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Replace checkpoint/state.safetensors.

    `decide` reads `round`, `block_size`, `fingerprint_data`, `fingerprint_model` and `plugins` from `meta`.
    """
    save_tensors(directory / CHECKPOINT, tensors, meta)


def load_checkpoint(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(tensors, meta) as saved, or None without a checkpoint. UserError where a single bit differs."""
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    with _refusing_damage(path):
        return load_tensors(path)


def _checkpoint_meta(directory: Path) -> dict[str, Any] | None:
    """The JSON of the checkpoint alone: its tensors are not read."""
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    with _refusing_damage(path), safe_open(path, framework="np") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    return meta


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise UserError(
            f"{path}: damaged, cannot resume ({error}); put back a copy of it, or start over with --fresh"
        ) from error


def _checksum(arrays: Mapping[str, np.ndarray], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc) if array.size else crc
    return crc


# ---------------------------------------------------------------- lock


class InUseError(UserError):
    """Another live process has the run directory."""


class Lock:
    """Holds a run directory until `close` or the end of the process, however it ends.

    `held` is False on a file system without locks (some parallel ones are mounted so): two runs in one
    directory cannot be told apart there, which the caller should say.
    """

    def __init__(self, descriptor: int, held: bool) -> None:
        self._descriptor = descriptor
        self.held = held

    def close(self) -> None:
        os.close(self._descriptor)


def lock(directory: Path) -> Lock:
    """Make the directory, and take it for this process. UserError where a live run has it."""
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unusable(directory, error.strerror or str(error)) from error
    held = _flock(descriptor, fcntl.LOCK_EX, directory)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    return Lock(descriptor, held)


def _flock(descriptor: int, kind: int, directory: Path, wait_s: float = LOCK_WAIT_S) -> bool:
    # A killed predecessor may need a moment to go, and another process's `decide` holds its probe an instant.
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > give_up:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            raise InUseError(
                f"{directory}: in use by a live run, pid {owner}; wait for it, end it or give another run.dir"
            )
        time.sleep(0.05)


def _refuse_live(directory: Path, wait_s: float) -> None:
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(directory, error.strerror or str(error)) from error
    try:
        _flock(descriptor, fcntl.LOCK_SH, directory, wait_s)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- decide


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
    _refuse_live(directory, wait_s)
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
    meta = _checkpoint_meta(directory)
    if meta is None and (directory / "results.h5").exists():
        if status is None or status.state != "complete":
            raise UserError(f"{directory}: has no checkpoint, cannot resume; start over with --fresh")
        meta = {"round": status.round}
    if meta is None:
        return "fresh"  # ended before its first checkpoint: nothing to resume, nothing to lose
    _check_plugins(config, directory, meta.get("plugins", {}))
    extended = _compare(config, directory, meta)
    for what, now in (("data", data_fingerprint), ("model", model_fingerprint)):
        stored = meta.get(f"fingerprint_{what}")
        if now is not None and stored is not None and now != stored:
            raise UserError(
                f"{directory}: the content of the {what} changed since the run began ({stored} -> {now}); "
                "put the old content back, choose another run.dir, or start over with --fresh"
            )
    if status is not None and status.state == "complete" and not extended:
        return "finished"
    if not (directory / CHECKPOINT).exists():
        raise UserError(f"{directory}: has no checkpoint, cannot be extended; start over with --fresh")
    return "resume"


def _check_plugins(config: Config, directory: Path, before: Mapping[str, str]) -> None:
    """UserError where a plugin that the run began with has another source now."""
    now = plugins(config)
    for which, digest in before.items():
        if now.get(which, digest) != digest:
            raise UserError(
                f"{directory}: the source of the plugin {which} changed since the run began ({digest[:12]} -> "
                f"{now[which][:12]}); put the old file back, choose another run.dir, or start over with --fresh"
            )


def _compare(config: Config, directory: Path, meta: Mapping[str, Any]) -> bool:
    """Whether the run is to go beyond the rounds it was made for. UserError where it is another run."""
    path = directory / "config.yaml"
    try:
        old = _flat(restore(read_yaml(path), str(path)).model_dump(mode="json"))
    except UserError as error:
        raise UserError(
            f"{error}; it says what the run in {directory} computes: mend it, or start over with --fresh"
        ) from error
    new = _flat(config.model_dump(mode="json"))
    free = {*FREE_KEYS, "federation.rounds"}
    if new["runtime.block_size"] == meta.get("block_size"):
        free.add("runtime.block_size")
    ignored = unread(config)
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
    if rounds != before and config.method.fixes_rounds:
        raise UserError(
            f"{directory}: federation.rounds {before} -> {rounds}: {config.method.fixes_rounds}; give {before}, choose "
            "another run.dir, or start over with --fresh"
        )
    return rounds > before


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"client.lr": 0.01, "transforms.0.name": "clip", ...}"""
    if not isinstance(tree, (dict, list)) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = json.dumps(flat[key], ensure_ascii=False).strip('"') if key in flat else "(absent)"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_usable(directory: Path) -> None:
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise _unusable(directory, f"{existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(directory, f"no permission to write in {existing}")


def _unusable(directory: Path, reason: str) -> UserError:
    return UserError(f"{directory}: cannot be the run directory: {reason}; choose another run.dir")
