"""status.json: where a run stands, for scripts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from fedhpc.errors import UserError
from fedhpc.results.files import FORMAT, atomic_write

RunStatus = Literal["running", "complete", "preempted", "failed"]
PAUSED = "paused"  # how the reason begins where --until asked for it; such a run counts as preempted
BESIDE = "ended beside"  # and the name of a run that failed in the same processes; such a run counts as preempted


@dataclass(frozen=True)
class Status:
    """status.json, for scripts: where the run stands, after which round, and why it ended."""

    state: RunStatus
    round: int
    reason: str
    updated_utc: str


def write_status(directory: Path, state: RunStatus, round: int, reason: str = "") -> None:
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
