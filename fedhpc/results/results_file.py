"""results.h5: everything a run measured, in one file that h5py and pandas alone can read.

HDF5 does not survive a killed writer, so the file is never opened for writing: an image of it is made in
memory and replaces the old file atomically. Between two such writes the checkpoint carries the new rows
(`pending`).

Resuming: the checkpoint's round R is the truth. `restore` completes the file's rows up to R. Rows of later
rounds, which a file can hold where `checkpoint.every` is greater than 1, stay in the file until their round
has been computed again and replaces them: the file never gets shorter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from fedhpc import __version__
from fedhpc.errors import UserError
from fedhpc.results.files import FORMAT, atomic_write
from fedhpc.results.record import Sampling

FORMAT_VERSION = 1
LIBRARIES = ("torch", "transformers", "peft", "numpy", "h5py", "mpi4py")


class Column(NamedTuple):
    """One dataset of a table: its dtype, and what it means (the dataset's attribute `description`)."""

    dtype: type
    description: str


# /rounds: row 0 is the evaluated initial state, then one row per round.
ROUNDS = {
    "round": Column(np.int64, "0 is the initial state"),
    "train_loss": Column(np.float64, "mean loss of the supervised tokens of local training, nats; NaN in row 0"),
    "eval_loss": Column(np.float64, "mean loss of the validation subset, nats per token; NaN: not evaluated"),
    "cohort_size": Column(np.int64, "clients sampled"),
    "completed": Column(np.int64, "clients whose update was used"),
    "dropped": Column(np.int64, "clients that did not report back"),
    "rejected": Column(np.int64, "clients whose update could not be used"),
    "tokens": Column(np.int64, "supervised tokens of local training"),
    "padded_tokens": Column(np.int64, "padding tokens of local training"),
    "bytes_down": Column(np.int64, "protocol bytes server to clients: payload times clients, or as compressed"),
    "bytes_up": Column(np.int64, "protocol bytes clients to server: what all of them send"),
    "wire_bytes": Column(np.int64, "bytes counted by the transport, all ranks"),
    "update_norm": Column(np.float64, "L2 norm of the server's step"),
    "seconds": Column(np.float64, "wall time of the round"),
    "seconds_broadcast": Column(np.float64, "of these: sending the payload"),
    "seconds_local": Column(np.float64, "of these: local training, slowest worker"),
    "seconds_reduce": Column(np.float64, "of these: combining the updates"),
    "seconds_server": Column(np.float64, "of these: the server's step"),
    "seconds_eval": Column(np.float64, "of these: evaluation"),
    "peak_memory_bytes": Column(np.int64, "largest memory of a rank: device memory on a GPU, else resident"),
}
# /clients: one row per sampled client and round.
CLIENTS = {
    "round": Column(np.int64, "round"),
    "client_id": Column(np.int64, "client in 0..N-1"),
    "num_examples": Column(np.int64, "training examples of the client"),
    "tokens": Column(np.int64, "supervised tokens of its local training"),
    "steps": Column(np.int64, "local steps"),
    "loss_first": Column(np.float64, "loss of its first local step, nats per token"),
    "loss_last": Column(np.float64, "loss of its last local step, nats per token"),
    "update_norm": Column(np.float64, "L2 norm of its update"),
    "status": Column(np.int8, "0 ok, 1 dropped, 2 rejected, 3 late"),
    "worker": Column(np.int64, "rank that trained it; -1 none"),
    "block": Column(np.int64, "block it trained in; -1 none"),
}
# Columns that only some runs have: of clients that train in steps, of a privacy budget, of attackers, of clients that
# take virtual time, of workers of several ranks, of bases with experts, a row per round, layer and expert, and of
# evaluations that have texts written.
SOMETIMES = {
    "rounds/block_occupancy": Column(np.float64, "local steps over those of full blocks; NaN: nobody trained"),
    "rounds/epsilon": Column(np.float64, "differential privacy: what the rounds so far have spent, at privacy.delta"),
    "rounds/clip_norm": Column(np.float64, "adaptive clipping: the norm to which the next round clips; 0 in row 0"),
    "clients/attacker": Column(np.int8, "1: it attacks (attack.name)"),
    "rounds/late": Column(np.int64, "clients that were cut off: their updates came after those that were taken"),
    "rounds/virtual_seconds": Column(np.float64, "virtual time of the round: from the step before it to its own"),
    "rounds/staleness": Column(np.float64, "mean over the updates used: server steps since the client started"),
    "clients/virtual_seconds": Column(np.float64, "virtual time from the moment it was asked to its update"),
    "clients/staleness": Column(np.int64, "server steps between the state it started from and the one it changes"),
    "rounds/idle_share": Column(np.float64, "share of the local time in which ranks waited for others of their worker"),
    "rounds/gathered_bytes": Column(np.int64, "bytes of layers that ranks received in local training, all ranks"),
    "experts/round": Column(np.int64, "round"),
    "experts/layer": Column(np.int64, "layer of the base that has routed experts, from 0"),
    "experts/expert": Column(np.int64, "expert of the layer, from 0"),
    "experts/share": Column(np.float64, "share of what local training sent to experts of the layer; they add up to 1"),
    "eval_samples/round": Column(np.int64, "round after which it was written"),
    "eval_samples/prompt": Column(str, "what the model was given, of the validation split"),
    "eval_samples/references": Column(str, "the targets of this prompt, a JSON list"),
    "eval_samples/text": Column(str, "what the model wrote"),
}
# Of these, columns of /rounds that follow from how a run was launched, which may change when it is resumed.
OF_LAUNCH = ("idle_share", "gathered_bytes")
# What columns of /rounds that a resumed run may not have had yet say of the rounds before: those of a launch, and one
# that older versions did not know.
_BEFORE = {**dict.fromkeys(OF_LAUNCH, 0.0), "block_occupancy": math.nan}
# Beside the client's number, where the clients of a natural partition have names: it follows from /partition.
CLIENT_NAME = Column(str, "owner of the client's data")
EVENTS = {
    "round": Column(np.int64, "round in which it happened"),
    "kind": Column(str, "rejected, resumed, preempted, ..."),
    "message": Column(str, "what happened"),
}
# The other groups. Datasets of /final are named by the method, those of /tables by the approach (docs/results.md).
DESCRIPTIONS = {
    "partition/num_examples": "training examples of each client",
    "partition/label_counts": "of these, how many have each label",
    "partition/label_names": "the labels, in the order of the columns of label_counts",
    "partition/client_names": "the clients' owners, where a natural partition names them",
    "partition/indices": "training examples by number, those of client 0 first",
    "partition/offsets": "client i has indices[offsets[i]:offsets[i + 1]]",
    "samples/prompt": "what the model was given",
    "samples/references": "the targets of this prompt, a JSON list",
    "samples/text": "what the model wrote",
    "client_eval/client_id": "client in 0..N-1",
    "client_eval/client_name": "owner of the client's data",
    "client_eval/num_examples": "examples held out of the client's training (evaluation.client_fraction)",
    "client_eval/tokens": "supervised tokens of these",
}
_TESTED = {"test": "of the final state on the test split", "base": "of the untouched base on the test split"}
_STATISTICS = {
    "mean": "mean over clients with held-out examples",
    "worst_10_percent": "mean over the worst tenth of the clients",
    "std": "standard deviation over clients",
}

Scalar = str | int | float | bool
Arrays = dict[str, np.ndarray]


def metric_column(metric: str) -> Column:
    """The /rounds column eval_<metric>."""
    return Column(np.float64, f"{metric} on the validation subset; NaN: not evaluated")


class _Table:
    """Equally long columns that grow by parts; one of them is `round`.

    Rows `saved` are in the file, rows `new` not yet; `ahead` are rows of rounds to be computed again.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = dict(columns)
        self.empty = self._arrays({name: [] for name in columns})
        self.saved = self.empty
        self.new: list[Arrays] = []
        self.ahead = self.empty

    def append(self, rows: Mapping[str, Any]) -> None:
        if set(rows) != set(self.columns):
            raise ValueError(f"columns {sorted(set(rows) ^ set(self.columns))} missing or unknown")
        arrays = self._arrays(rows)
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("columns are not equally long")
        self.new.append(arrays)

    def pending(self) -> Arrays:
        return self._joined(self.new)

    def recorded(self) -> Arrays:
        return self._joined([self.saved, *self.new])

    def image(self, last_round: int) -> Arrays:
        """What a file after `last_round` holds."""
        return self._joined([self.saved, *self.new, _where(self.ahead, self.ahead["round"] > last_round)])

    def mark_saved(self) -> None:
        self.saved, self.new = self.recorded(), []

    def restore(self, start: int, pending: Mapping[str, Any], last_round: int) -> None:
        """The first `start` rows of the file and the pending ones, which the file may hold or lack."""
        recorded = self.recorded()
        rows = self._arrays(pending)
        late = {name: array[start + len(rows["round"]) :] for name, array in recorded.items()}
        self.saved = {name: array[:start] for name, array in recorded.items()}
        # Of the rounds done, a file newer than the checkpoint can only have more events ("preempted").
        self.new = [rows, _where(late, late["round"] <= last_round)]
        self.ahead = _where(late, late["round"] > last_round)

    def widen(self, columns: Mapping[str, Column]) -> None:
        """Add columns that are not there yet, with what `_BEFORE` says in all rows."""
        new = {name: column for name, column in columns.items() if name not in self.columns}
        self.columns |= new
        for rows in (self.empty, self.saved, *self.new, self.ahead):
            rows |= {n: np.full(len(rows["round"]), _BEFORE[n], column.dtype) for n, column in new.items()}

    def _arrays(self, rows: Mapping[str, Any]) -> Arrays:
        return {
            name: np.array(rows[name], dtype=object if column.dtype is str else column.dtype).reshape(-1)
            for name, column in self.columns.items()
        }

    def _joined(self, parts: Sequence[Arrays]) -> Arrays:
        return {name: np.concatenate([part[name] for part in (self.empty, *parts)]) for name in self.columns}


def _where(rows: Arrays, mask: np.ndarray) -> Arrays:
    return {name: array[mask] for name, array in rows.items()}


class Results:
    """The content of one results.h5.

    `attributes` (root attributes: config, method, mode, model, seed, ...) may be changed at any time;
    versions and `created_utc` are filled in where absent. `metrics` are the names behind eval_<metric>, `columns` those
    of SOMETIMES that this run has.
    """

    def __init__(
        self, attributes: Mapping[str, Scalar], metrics: Iterable[str] = (), columns: Iterable[str] = ()
    ) -> None:
        self.attributes: dict[str, Scalar] = {**_environment(), **attributes}
        self.complete = False
        #: Attributes of single datasets, beside their description: path -> name -> value.
        self.notes: dict[str, dict[str, Scalar]] = {}
        named = {f"eval_{metric}": metric_column(metric) for metric in metrics}
        more: dict[str, dict[str, Column]] = {"rounds": {}, "clients": {}, "experts": {}, "eval_samples": {}}
        for path in columns:
            table, _, name = path.partition("/")
            more[table][name] = SOMETIMES[path]
        self._tables = {
            "rounds": _Table({**ROUNDS, **more["rounds"], **{k: v for k, v in named.items() if k not in ROUNDS}}),
            "clients": _Table({**CLIENTS, **more["clients"]}),
            "events": _Table(EVENTS),
        }
        self._tables |= {name: _Table(more[name]) for name in ("experts", "eval_samples") if more[name]}
        self.groups: dict[str, dict[str, Any]] = {
            name: {}
            for name in ("partition", "test", "base", "client_eval", "client_summary", "samples", "final", "tables")
        }

    # ------------------------------------------------------------ what a run adds

    def add_round(self, row: Mapping[str, float | int]) -> None:
        """One row of /rounds, in order from round 0. A missing eval_<metric> is NaN.

        Round 0, the initial state, may lack the rest too: numbers of clients, bytes and seconds are then 0.
        """
        table = self._tables["rounds"]
        if row["round"] != self._rows():
            raise ValueError(f"round {row['round']} added after {self._rows()} rows")
        blank = {name: np.nan for name in table.columns if name.startswith("eval_")}
        blank |= {name: value for name, value in _BEFORE.items() if name in table.columns}
        if row["round"] == 0:
            blank = {**dict.fromkeys(table.columns, 0), "train_loss": np.nan, **blank}
        table.append({**blank, **row})

    def widen(self, columns: Iterable[str]) -> None:
        """Take in those of `columns`, as of a new run, that this one may not have had before it was resumed."""
        known = {f"rounds/{name}": name for name in _BEFORE}
        self._tables["rounds"].widen({known[path]: SOMETIMES[path] for path in columns if path in known})

    def add_clients(self, columns: Mapping[str, Any]) -> None:
        """Rows of /clients: every column that the run has, one value per sampled client."""
        self._tables["clients"].append(columns)

    def add_experts(self, columns: Mapping[str, Any]) -> None:
        """Rows of /experts, which runs that an older version began do not have."""
        if "experts" in self._tables:
            self._tables["experts"].append(columns)

    def add_eval_samples(self, round: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Rows of /eval_samples: prompt, references (a list; kept as JSON), text; runs of older versions have none."""
        if samples and "eval_samples" in self._tables:
            rows = {"round": [round] * len(samples), **_sample_columns(samples)}
            self._tables["eval_samples"].append(rows)

    def add_event(self, round: int, kind: str, message: str) -> None:
        self._tables["events"].append({"round": [round], "kind": [kind], "message": [message]})

    def set_partition(
        self,
        num_examples: np.ndarray,
        label_counts: np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
        indices: np.ndarray | None = None,
        offsets: np.ndarray | None = None,
        client_names: Sequence[str] | None = None,
    ) -> None:
        """num_examples[N], label_counts[N, C], label_names[C], client_names[N] of a natural partition.

        Client i has the training examples indices[offsets[i]:offsets[i + 1]]. Not for a virtual population.
        """
        values = {
            "num_examples": num_examples,
            "label_counts": label_counts,
            "label_names": None if label_names is None else _strings(label_names),
            "indices": indices,
            "offsets": offsets,
            "client_names": None if client_names is None else _strings(client_names),
        }
        self.groups["partition"] = {name: np.asarray(v) for name, v in values.items() if v is not None}

    def set_evaluated(self, sampling: Mapping[str, Sampling]) -> None:
        """What the metrics of the validation split were measured on last."""
        for name, one in sampling.items():
            self.notes[f"rounds/eval_{name}"] = {"n": one.n, "of": one.of, "unit": one.unit}

    def set_test(self, metrics: Mapping[str, float], sampling: Mapping[str, Sampling] | None = None) -> None:
        """Metrics of the final state on the test split."""
        self._set_tested("test", metrics, sampling)

    def set_base(self, metrics: Mapping[str, float], sampling: Mapping[str, Sampling] | None = None) -> None:
        """Metrics of the untouched base (no payload) on the test split."""
        self._set_tested("base", metrics, sampling)

    def _set_tested(self, group: str, metrics: Mapping[str, float], sampling: Mapping[str, Sampling] | None) -> None:
        self.groups[group] = {name: np.float64(value) for name, value in metrics.items()}
        self.notes |= {f"{group}/{name}": one._asdict() for name, one in (sampling or {}).items()}

    def sampling(self, path: str) -> Sampling | None:
        """What the metric in a dataset like "test/loss" was measured on; None in files from before it was said."""
        note = self.notes.get(path, {})
        if "n" not in note:
            return None
        low, high = (float(note.get(end, math.nan)) for end in ("low", "high"))
        return Sampling(int(note["n"]), int(note["of"]), str(note["unit"]), low, high, str(note.get("by", "")))

    def set_client_eval(self, columns: Mapping[str, Any], summary: Mapping[str, float] | None = None) -> None:
        """Per-client results on the clients' held-out examples; one value per client in each column.

        /client_eval has client_id, num_examples, tokens, loss and the metrics of the test, of the final state;
        loss_personal and so on with the client's own part of the payload and after its fine-tuning, where a run has
        them; loss_low, loss_high and so on, the ends of 95 % intervals over the drawing of a client's examples.
        summary, in /client_summary: for each of these metrics `loss/mean`, `loss/worst_10_percent` and `loss/std` over
        the clients, each client counted once (fedhpc.evaluation.evaluate.over_clients).
        """
        self.groups["client_eval"] = {name: np.asarray(values) for name, values in self._named(columns).items()}
        self.groups["client_summary"] = {name: np.float64(value) for name, value in (summary or {}).items()}

    def set_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Generated texts: prompt, references (a list; kept as JSON), text."""
        self.groups["samples"] = _sample_columns(samples)

    def set_final(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The final payload by tensor name; personal parts as they were before the first round."""
        self.groups["final"] = {name: np.asarray(tensor) for name, tensor in tensors.items()}

    def set_tables(self, tables: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """What an approach has to tell beside the rest: equally long columns in /tables/<name>/."""
        self.groups["tables"] = {
            f"{name}/{column}": np.asarray(values) for name, table in tables.items() for column, values in table.items()
        }

    # ------------------------------------------------------------ what readers see

    @property
    def num_rounds(self) -> int:
        """Rounds done; the initial state does not count."""
        return max(self._rows() - 1, 0)

    @property
    def rounds(self) -> Arrays:
        return self._tables["rounds"].recorded()

    @property
    def clients(self) -> Arrays:
        return self._named(self._tables["clients"].recorded())

    @property
    def experts(self) -> Arrays:
        """The rows of /experts; none where a run has no such table."""
        return self._tables["experts"].recorded() if "experts" in self._tables else {}

    @property
    def eval_samples(self) -> Arrays:
        """The rows of /eval_samples; none where a run has no such table."""
        return self._tables["eval_samples"].recorded() if "eval_samples" in self._tables else {}

    @property
    def events(self) -> Arrays:
        return self._tables["events"].recorded()

    def _named(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Rows with a client_id, and with the client's name beside it where clients have names."""
        names = self.groups["partition"].get("client_names")
        return dict(rows) if names is None else {**rows, "client_name": names[np.asarray(rows["client_id"])]}

    def _rows(self) -> int:
        table = self._tables["rounds"]
        return len(table.saved["round"]) + sum(len(part["round"]) for part in table.new)

    # ------------------------------------------------------------ file and checkpoint

    def write(self, path: Path, complete: bool) -> None:
        """Replace the file at `path` atomically (fedhpc.results.atomic_write, with its errors)."""
        atomic_write(path, self.image(complete))
        self.complete = complete
        for table in self._tables.values():
            table.mark_saved()

    def image(self, complete: bool) -> bytes:
        """What `write` puts on the disk: the bytes of the HDF5 file.

        No booleans but 0 and 1: netCDF4 does not list HDF5's boolean attributes.
        """
        marks: dict[str, Scalar] = {"format": FORMAT, "format_version": FORMAT_VERSION, "complete": complete}
        last = np.iinfo(np.int64).max if complete else self._rows() - 1
        # The name is of no file: the core driver without backing store never touches the disk.
        with h5py.File("results.h5", "w", driver="core", backing_store=False, block_size=1 << 20) as file:
            _note(file, self.attributes | marks)
            for group, table in self._tables.items():
                rows = table.image(last)
                for name, array in (self._named(rows) if group == "clients" else rows).items():
                    dataset = _put(file, f"{group}/{name}", array)
                    _note(dataset, {"description": table.columns.get(name, CLIENT_NAME).description})
            for group, values in self.groups.items():
                file.require_group(group)
                for name, value in values.items():
                    dataset = _put(file, f"{group}/{name}", value)
                    _note(dataset, {"description": text} if (text := _description(group, name)) else {})
            for path, note in self.notes.items():
                if path in file:
                    _note(file[path], note)
            file.flush()
            image: bytes = file.id.get_file_image()
        return image

    @classmethod
    def read(cls, path: Path) -> Results:
        """The content of a file. UserError where it is missing, damaged or not of fedhpc."""
        if not path.is_file():
            raise UserError(f"{path}: there is no such results file")
        try:
            # The file is only ever replaced whole; a lock would only hinder readers, on some file systems.
            with h5py.File(path, "r", locking=False) as file:
                return cls._from(file, path)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: damaged or not an HDF5 file ({error}); put back a copy of it, or start the run "
                "over with --fresh"
            ) from error

    @classmethod
    def _from(cls, file: Any, path: Path) -> Results:
        attributes = _attributes(file)
        if attributes.pop("format", None) != FORMAT:
            raise UserError(f"{path}: is an HDF5 file, but not the results of a fedhpc run")
        version = attributes.pop("format_version", 0)
        if version > FORMAT_VERSION:
            raise UserError(f"{path}: format version {version} is newer than this fedhpc knows: update fedhpc")
        complete = bool(attributes.pop("complete"))
        metrics = [name.removeprefix("eval_") for name in file["rounds"] if name.startswith("eval_")]
        results = cls(attributes, metrics, [path for path in SOMETIMES if path in file])
        results.complete = complete
        results.attributes = attributes
        for group, table in results._tables.items():
            table.append({name: _get(file[group][name]) for name in table.columns})
            table.mark_saved()
            results.notes |= {f"{group}/{name}": _notes(file[group][name]) for name in table.columns}
        for group, values in results.groups.items():

            def collect(name: str, item: Any, values: dict[str, Any] = values) -> None:
                if isinstance(item, h5py.Dataset):
                    values[name] = _get(item)
                    results.notes[item.name.removeprefix("/")] = _notes(item)

            if group in file:  # files of format 1 from before /client_summary lack it
                file[group].visititems(collect)
        return results

    def pending(self) -> tuple[dict[str, Any], Arrays]:
        """(JSON-able, arrays): the rows that the last written file lacks, for the checkpoint.

        The metrics of the base are included. Partition, test, samples and final payload are not: a run sets
        them when it starts and when it ends, resumed or not.
        """
        arrays: Arrays = {}
        strings: dict[str, list[str]] = {}
        for group, table in self._tables.items():
            for name, array in table.pending().items():
                if table.columns[name].dtype is str:
                    strings[f"{group}/{name}"] = array.tolist()
                else:
                    arrays[f"{group}/{name}"] = array
        base = {name: float(value) for name, value in self.groups["base"].items()}
        start = {group: len(table.saved["round"]) for group, table in self._tables.items()}
        return {"start": start, "strings": strings, "base": base}, arrays

    def restore(self, pending: tuple[Mapping[str, Any], Mapping[str, np.ndarray]], round: int) -> None:
        """Go back or forward to the checkpoint of `round` that holds `pending`. For new or just read Results.

        UserError where the file lacks rows that the checkpoint builds on: it was removed or replaced.
        """
        meta, arrays = pending
        for group, table in self._tables.items():
            start = meta["start"][group]
            if len(table.recorded()["round"]) < start:
                raise UserError(
                    f"results.h5: lacks rows of /{group} that the checkpoint builds on ({start}); put back "
                    "the file of this run, or start over with --fresh"
                )
            count = len(arrays[f"{group}/round"])
            rows = {
                name: meta["strings"][f"{group}/{name}"]
                if column.dtype is str
                else np.full(count, _BEFORE[name])
                if name in _BEFORE and f"{group}/{name}" not in arrays
                else arrays[f"{group}/{name}"]
                for name, column in table.columns.items()
            }
            table.restore(start, rows, round)
        if self.num_rounds != round:
            raise UserError(
                f"results.h5: ends at round {self.num_rounds} under a checkpoint of round {round}; put "
                "back the file of this run, or start over with --fresh"
            )
        if meta["base"]:
            self.set_base(meta["base"])


def _environment() -> dict[str, Scalar]:
    environment: dict[str, Scalar] = {
        "fedhpc_version": __version__,
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    for name in LIBRARIES:
        try:
            environment[f"{name}_version"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return environment


def _sample_columns(samples: Sequence[Mapping[str, Any]]) -> Arrays:
    """The columns of generated texts: prompt, references (a JSON list), text."""
    return {
        "prompt": _strings(sample["prompt"] for sample in samples),
        "references": _strings(json.dumps(list(sample["references"]), ensure_ascii=False) for sample in samples),
        "text": _strings(sample["text"] for sample in samples),
    }


def _strings(texts: Iterable[str]) -> np.ndarray:
    return np.array([*texts, None], dtype=object)[:-1]


def _description(group: str, name: str) -> str:
    """What a dataset outside the tables of rounds holds; nothing for tensors and for what an approach adds."""
    if group in _TESTED:
        return f"{name} {_TESTED[group]}: n items, low to high their 95 % interval over the drawing of these items"
    if group not in ("client_eval", "client_summary") or f"{group}/{name}" in DESCRIPTIONS:
        return DESCRIPTIONS.get(f"{group}/{name}", "")
    column, _, statistic = name.partition("/")
    end = next((end for end in ("low", "high") if column.endswith(f"_{end}")), "")
    metric = column.removesuffix(f"_{end}").removesuffix("_personal")
    personal = column.removesuffix(f"_{end}").endswith("_personal")
    of = "with the client's own part and after its fine-tuning" if personal else "of the final state"
    if group == "client_summary":
        return f"{_STATISTICS.get(statistic, statistic)}: {metric} {of}, each client counted once"
    bound = f"{end} end of the 95 % interval of the " if end else ""
    return f"{bound}{metric} {of} on the client's held-out examples; NaN: not known"


def _note(item: Any, attributes: Mapping[str, Scalar]) -> None:
    """Write attributes of a file or dataset; True and False as 1 and 0."""
    for name, value in attributes.items():
        item.attrs[name] = _clean(value) if isinstance(value, str) else int(value) if isinstance(value, bool) else value


def _notes(dataset: Any) -> dict[str, Scalar]:
    """What `notes` has of a dataset."""
    return {name: value for name, value in _attributes(dataset).items() if name != "description"}


def _attributes(item: Any) -> dict[str, Any]:
    """The attributes of a file or dataset as plain values."""
    return {name: v.item() if isinstance(v, np.generic) else v for name, v in item.attrs.items()}


def _put(file: Any, name: str, value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind in "OU":
        return file.create_dataset(name, array.shape, h5py.string_dtype(), [_clean(text) for text in array])
    return file.create_dataset(name, data=array.astype(np.int8) if array.dtype == bool else array)


def _get(dataset: Any) -> Any:
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]


def _clean(text: str) -> str:
    """What HDF5's UTF-8 strings can hold: generated text may have NUL characters and lone surrogates."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
