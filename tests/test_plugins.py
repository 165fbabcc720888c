"""Choices from a folder outside the package: whole small federations with them, and what a wrong one says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.config import plugins, resolve
from fedhpc.errors import UserError
from fedhpc.ranks.verdict import RefusedError
from tests.federations import federate, settings

LABELS = {
    "data": {"prompt": "{mr} is a", "target": " {label}", "label": "label", "client": "client"},
    "method": {"name": "prefix", "num_virtual_tokens": 2},
    "partition": {"name": "iid", "num_clients": 4},
    "federation": {"rounds": 2, "cohort_size": 3},
    "client": {"steps": 1, "batch_size": 2, "lr": 0.01},
    "evaluation": {"every": 1, "max_examples": 24, "test_max_examples": 24, "samples": 0},
}

MCC = '''
"""The correlation of labels and predictions (Matthews 1975), of several classes (Gorodkin 2004)."""

import numpy as np

from fedhpc.evaluation.metrics.base import Metric, Outputs


class MCC(Metric):
    """How far predictions and labels agree beyond chance, -1 to 1."""

    needs = "labels"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        classes = max(outputs.labels.max(), outputs.predictions.max()) + 1
        right = np.eye(classes)[outputs.labels] - np.eye(classes)[outputs.labels].mean(axis=0)
        said = np.eye(classes)[outputs.predictions] - np.eye(classes)[outputs.predictions].mean(axis=0)
        size = np.sqrt((right**2).sum() * (said**2).sum())
        return float((right * said).sum() / size) if size else 0.0
'''

BY_LENGTH = '''
"""Clients in the order of the labels, of equal size."""

import numpy as np
from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Partitioner, Rows, grouped
from fedhpc.registry import Section


class Sorted(Partitioner):
    """Sorts the examples by label and cuts the row into equal pieces."""

    class Options(Section):
        pieces: int = Field(3, ge=1, description="number of clients")

    needs_labels = True

    def partition(self, rows: Rows) -> Assignment:
        owner = np.empty(len(rows), np.int64)
        owner[np.argsort(rows.labels, kind="stable")] = np.arange(len(rows)) * self.options.pieces // len(rows)
        return grouped(owner, self.options.pieces)
'''


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def finals(folder: str) -> dict[str, np.ndarray]:
    with h5py.File(Path(folder) / "results.h5") as file:
        return {f"{group}/{name}": file[group][name][()] for group in ("final", "test") for name in file[group]}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_metric_of_labels_and_a_partitioner(tmp_path: Path) -> None:
    put("mcc.py", MCC)
    put("divide/by_label.py", BY_LENGTH)
    tree = {
        **LABELS,
        "partition": {"name": "./divide/by_label.py", "pieces": 4},
        "evaluation": {**LABELS["evaluation"], "metrics": ["loss", "./mcc.py"], "test_metrics": ["mcc.py", "accuracy"]},
    }
    for ranks in (1, 3):
        config = settings(tmp_path / f"run{ranks}", tree)
        assert resolve(config.model_dump(mode="json")) == config
        federate(config, ranks)
    same(finals("run1"), finals("run3"))
    assert -1 <= finals("run1")["test/mcc"] <= 1
    with h5py.File(tmp_path / "run1" / "results.h5") as file:
        assert np.isfinite(file["rounds"]["eval_mcc"][()]).all()
        counts = file["partition"]["label_counts"][()]
    assert ((counts > 0).sum(axis=0) <= 2).all()  # each label lies with one or two neighbours


UPDATES = {
    "trimmed.py": '''
"""The trimmed mean (Yin et al. 2018, arXiv 1803.01498)."""

from pydantic import Field

from fedhpc.registry import Section
from fedhpc.server.aggregators.base import Aggregator


class TrimmedMean(Aggregator):
    """The mean of every coordinate without its largest and smallest values."""

    class Options(Section):
        trim: float = Field(0.1, ge=0, lt=0.5, description="share of the values that is cut off at either end")

    def combine(self, cohort):
        cut = int(self.options.trim * len(cohort))
        return cohort.by_coordinate(lambda values: values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0))
''',
    "signs.py": '''
"""SignSGD (Bernstein et al. 2018, arXiv 1802.04434)."""

from fedhpc.training.optimizers.base import ClientOptimizer


class SignSGD(ClientOptimizer):
    """Steps by the sign of the gradient."""

    def step(self, theta, gradient, buffers, count, lr):
        theta.sub_(lr * gradient.sign())
''',
    "slow.py": '''
"""Momentum that the server looks ahead along (Nesterov)."""

from pydantic import Field

from fedhpc.lazy import torch
from fedhpc.registry import Section
from fedhpc.server.optimizers.base import ServerOptimizer


class Nesterov(ServerOptimizer):
    """v = beta v + g, theta - lr (g + beta v)."""

    class Options(Section):
        beta: float = Field(0.5, ge=0, lt=1, description="share of the last step that is kept")

    def buffers(self, size):
        return {"velocity": torch.zeros(size, dtype=torch.float64)}

    def step(self, theta, gradient, buffers):
        velocity = buffers["velocity"].mul_(self.options.beta).add_(gradient)
        return theta - self.options.lr * (gradient + self.options.beta * velocity)
''',
    "coarse.py": '''
"""Rounding with error feedback (Karimireddy et al. 2019, arXiv 1901.09847)."""

from pydantic import Field

from fedhpc.registry import Section
from fedhpc.updates.transforms.base import Transform


class Coarse(Transform):
    """Sends whole multiples of `step`, of which a client keeps what it lost."""

    class Options(Section):
        step: float = Field(1e-3, gt=0, description="distance of neighbouring numbers")

    keeps = ("residual",)

    def on_client(self, updates, context):
        wanted = updates + context.tensors["residual"]
        sent = (wanted / self.options.step).round() * self.options.step
        context.tensors["residual"] = wanted - sent
        context.bytes_up[:] = updates.shape[1]
        return sent
''',
}


def test_an_aggregator_a_transform_and_optimizers(tmp_path: Path) -> None:
    """On 1 and 3 ranks, and resumed after the first round."""
    for name, text in UPDATES.items():
        put(name, text)
    tree = {
        **LABELS,
        "client": {"optimizer": "./signs.py", "steps": 1, "batch_size": 2, "lr": 0.01},
        "server": {"aggregator": "./trimmed.py", "trim": 0.34, "optimizer": "slow.py", "beta": 0.3},
        "transforms": [{"name": "./coarse.py", "step": 0.003}, {"name": "clip", "norm": 1.0}],
    }
    for ranks in (1, 3):
        config = settings(tmp_path / f"run{ranks}", tree)
        assert resolve(config.model_dump(mode="json")) == config
        federate(config, ranks)
    same(finals("run1"), finals("run3"))
    federate(settings(tmp_path / "resumed", {**tree, "federation": {"rounds": 1, "cohort_size": 3}}))
    federate(settings(tmp_path / "resumed", tree))
    same(finals("run1"), finals("resumed"))
    with h5py.File(tmp_path / "run1" / "results.h5") as file:
        parameters = int(file.attrs["payload_parameters"])
        assert (file["rounds"]["bytes_up"][1:] == 3 * parameters).all()
        assert (file["rounds"]["update_norm"][1:] > 0).all()
    with pytest.raises(UserError, match=r"aggregator fednova .* of client.optimizer ./signs.py are not"):
        resolve({**tree, "server": {"aggregator": "fednova"}})


SOFT = '''
"""Trained vectors in front of the text, all starting at zero."""

from contextlib import contextmanager

from pydantic import Field

from fedhpc import kernels
from fedhpc.lazy import torch
from fedhpc.methods.base import Attached, Method
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout


class Soft(Method):
    """A soft prompt."""

    class Options(Section):
        length: int = Field(2, ge=1, description="vectors in front of the text")

    @property
    def virtual_tokens(self):
        return self.options.length

    @property
    def payload(self):
        return Layout({"soft": (self.options.length, self.base.hidden_size)})

    def initial(self):
        return {"soft": torch.zeros(self.payload.shapes["soft"])}

    @contextmanager
    def attach(self, trained, received, rows, row_keys=None):
        yield Attached(embeddings=kernels.of_rows(trained["soft"].to(self.base.dtype), rows))

    def export(self, payload, path):
        path.mkdir(parents=True, exist_ok=True)
        (path / "soft.txt").write_text(" ".join(str(x) for x in payload["soft"].flatten().tolist()))
'''


def test_a_method_which_must_not_change_while_a_run_is_resumed(tmp_path: Path) -> None:
    put("soft.py", SOFT)
    tree = {**LABELS, "method": {"name": "./soft.py", "length": 3}, "client": {**LABELS["client"], "lr": 0.5}}
    for ranks in (1, 3):
        federate(settings(tmp_path / f"run{ranks}", tree), ranks)
    same(finals("run1"), finals("run3"))
    assert finals("run1")["final/soft"].shape == (3, 128) and finals("run1")["final/soft"].any()
    assert len(Path("run1/adapter/soft.txt").read_text().split()) == 384
    shorter = {**tree, "federation": {"rounds": 1, "cohort_size": 3}}
    for folder in ("resumed", "changed"):
        federate(settings(tmp_path / folder, shorter))
    federate(settings(tmp_path / "resumed", tree))
    same(finals("run1"), finals("resumed"))
    put("soft.py", SOFT.replace("starting at zero", "starting at naught"))
    words = r"the source of the plugin method\.name \./soft\.py changed since the run began \(\w{12} -> \w{12}\); put"
    with pytest.raises((UserError, RefusedError), match=words):
        federate(settings(tmp_path / "changed", tree))
    put("soft.py", SOFT)
    federate(settings(tmp_path / "changed", tree))
    same(finals("run1"), finals("changed"))


def test_every_rank_has_the_plugin_of_rank_0() -> None:
    put("soft.py", SOFT)
    stated = configuration.stated(resolve({**LABELS, "method": {"name": "./soft.py"}}))
    assert configuration.restore_stated(stated).method.name == "./soft.py"
    put("soft.py", SOFT + "# edited on this host\n")
    with pytest.raises(UserError, match=r"method\.name: the plugin \./soft\.py has another source here than on rank 0"):
        configuration.restore_stated(stated)
    Path("soft.py").unlink()
    with pytest.raises(UserError, match=r"method\.name: there is no file 'soft\.py'"):
        configuration.restore_stated(stated)


def test_options_must_not_hide_a_key_of_the_section() -> None:
    put("signs.py", UPDATES["signs.py"] + "\n    class Options(Section):\n        lr: float = 1.0\n")
    put("signs.py", "from fedhpc.registry import Section\n" + Path("signs.py").read_text())
    with pytest.raises(
        UserError, match=r"client\.optimizer: \./signs\.py has the option lr, which client has without it"
    ):
        resolve({**LABELS, "client": {"optimizer": "./signs.py"}})


def test_who_edits_a_plugin_does_not_change_a_run_that_is_going_on(tmp_path: Path) -> None:
    put("signs.py", UPDATES["signs.py"])
    tree = {**LABELS, "client": {"optimizer": "./signs.py", "steps": 1, "batch_size": 2, "lr": 0.01}}
    config = settings(tmp_path / "run", tree)
    before, kept = plugins(config), registry.choice("client_optimizers", "./signs.py")
    put("signs.py", UPDATES["signs.py"] + "\n# edited\n")
    assert registry.choice("client_optimizers", "./signs.py") is kept and plugins(config) == before
    edited = settings(tmp_path / "run", tree)
    assert registry.choice("client_optimizers", "./signs.py") is not kept and plugins(edited) != before


WRONG = {
    "no such file": ("./none.py", None, "there is no file 'none.py'"),
    "no such module": ("pkg.none", None, "there is no module 'pkg.none'"),
    "an unknown name": ("accurcy", None, "unknown value 'accurcy'; did you mean 'accuracy'?"),
    "a mistake in its text": ("./m.py", "class (", r"./m.py cannot be imported: SyntaxError: .*\(line 1\)"),
    "a mistake in its import": ("./m.py", "x = 1\nimport nothing_like_it", r"No module named 'nothing_like_it' \(m"),
    "no class": ("./m.py", "x = 1", "./m.py has no class derived from fedhpc.evaluation.metrics.base.Metric"),
    "two classes": ("./m.py", MCC + MCC.replace("MCC(", "Other("), r"several classes .*Metric \(MCC, Other\)"),
    "a program that ends": (
        "./m.py",
        "raise SystemExit(0)",
        r"./m.py cannot be imported: SystemExit: 0 \(m.py, line 1\)",
    ),
    "a class that is not complete": (
        "./m.py",
        MCC.replace("compute", "other"),
        "the class MCC of ./m.py lacks compute",
    ),
    "a class that does not say what it needs": ("./m.py", MCC.replace("needs =", "x ="), "MCC of ./m.py lacks needs"),
}

OPTIONS = """
from fedhpc import Aggregator
from fedhpc.registry import Section
from pydantic import field_validator

class Trimmed(Aggregator):
    class Options({base}):
        {body}

    def combine(self, cohort):
        return cohort.mean()
"""
WRONG_OPTIONS = {
    "no section": (
        "object",
        "trim = 1",
        {},
        r"server\.aggregator: Options of ./m.py is no class derived from .*Section$",
    ),
    "a key that is there": (
        "Section",
        "lr: str = 'x'",
        {},
        "./m.py has the option lr, which server has without it",
    ),
    "a check that fails": (
        "Section",
        "trim: int = 1\n        _check = field_validator('trim')(lambda x: 1 // 0)",
        {"trim": 2},
        "server: ZeroDivisionError: ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plugin_is_one_line(case: str) -> None:
    name, text, words = WRONG[case]
    if text is not None:
        put("m.py", text)
    with pytest.raises(UserError, match=rf"^configuration: evaluation\.metrics: .*{words}") as caught:
        resolve({"evaluation": {"metrics": [name]}, "data": {"label": "label", "client": "client"}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "cohort.by_coordinate(lambda values: values)",
            r"by_coordinate returned a tensor of shape \(3, \d+\), not a ten",
        ),
        ("cohort.by_coordinate(lambda values: values.median(dim=0))", "the rule of by_coordinate returned a median"),
        ("None", r"\./wrong.py returned a NoneType, not a tensor of shape \(\d+,\)"),
    ],
)
def test_an_aggregator_that_returns_no_update_is_told_so(tmp_path: Path, answer: str, words: str) -> None:
    put("wrong.py", UPDATES["trimmed.py"].partition("        return ")[0] + f"        return {answer}\n")
    tree = {**LABELS, "client": {"steps": 1, "batch_size": 2}, "server": {"aggregator": "./wrong.py"}}
    with pytest.raises(UserError, match=rf"server\.aggregator: .*{words}"):
        federate(settings(tmp_path / "run", tree))


def test_the_name_of_a_file_without_its_ending_is_told_how_to_name_it() -> None:
    put("trimmed.py", UPDATES["trimmed.py"])
    with pytest.raises(UserError, match=r"unknown value 'trimmed'; a file of your own is './trimmed.py'; did you mean"):
        resolve({"server": {"aggregator": "trimmed"}, "partition": {"name": "iid"}})


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_one_line(case: str) -> None:
    base, body, keys, words = WRONG_OPTIONS[case]
    put("m.py", OPTIONS.format(base=base, body=body))
    with pytest.raises(UserError, match=words) as caught:
        resolve({**LABELS, "server": {"aggregator": "./m.py", **keys}})
    assert "\n" not in str(caught.value)


def test_an_aggregate_that_is_not_finite_does_not_reach_the_server_s_state(tmp_path: Path) -> None:
    rule = "cohort.by_coordinate(lambda values: values.mean(dim=0) / 0)"
    put("wrong.py", UPDATES["trimmed.py"].partition("        return ")[0] + f"        return {rule}\n")
    tree = {**LABELS, "client": {"steps": 1, "batch_size": 2}, "server": {"aggregator": "./wrong.py"}}
    with pytest.raises(
        UserError, match=r"server\.aggregator: round 1: \./wrong.py gave an aggregate that is not finite"
    ):
        federate(settings(tmp_path / "run", tree))


WRONG_PARTITIONS = {
    "None": r"partition\.name: ./p.py gave NoneType instead of an Assignment",
    "grouped(np.arange(len(rows) - 9) % 4, 4)": r"did not give each of the \d+ training examples to exactly one client",
    "grouped(np.arange(len(rows) + 1) % 4, 4)": r"did not give each of the \d+ training examples to exactly one client",
    "Assignment(np.arange(len(rows)), np.array([0, 9]))": "offsets that do not go from 0 to the number of its indices",
}


@pytest.mark.parametrize("value", WRONG_PARTITIONS)
def test_a_partitioner_that_loses_examples_is_refused(tmp_path: Path, value: str) -> None:
    text = BY_LENGTH.partition("        owner = ")[0].replace("import Assignment,", "import Assignment as Assignment,")
    put("p.py", f"{text}        return {value}\n")
    with pytest.raises(RefusedError, match=WRONG_PARTITIONS[value]):
        federate(settings(tmp_path / "run", {**LABELS, "partition": {"name": "./p.py"}}))
    assert not (tmp_path / "run").exists()


def test_a_module_and_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("site/ours/mcc.py", MCC)
    put("site/ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    entries = "site/ours-1.0.dist-info/entry_points.txt"
    put(entries, "[fedhpc.metrics]\nmatthews = ours.mcc:MCC\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert registry.choice("metrics", "matthews") is registry.choice("metrics", "ours.mcc")
    assert "matthews" in registry.names("metrics")
    assert registry.source_hash("metrics", "matthews") == registry.source_hash("metrics", "site/ours/mcc.py")
    assert registry.source_hash("metrics", "accuracy") is None
    put("other/more-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    put("other/more-1.0.dist-info/entry_points.txt", "[fedhpc.metrics]\naccuracy = ours.mcc\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other")])
    with pytest.raises(UserError, match="'accuracy' is a choice of fedhpc and an entry point of more too"):
        registry.choice("metrics", "accuracy")
    assert registry.choice("metrics", "loss")
