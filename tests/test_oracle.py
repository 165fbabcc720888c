"""Classes of transformers beside transformers itself (tests/oracle.py): all of them by hand, some in every run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fedhpc.config import Model
from fedhpc.data.tokens import Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.models.load import check_tokens, load_base, model_class
from tests import oracle
from tests.oracle import Case

pytestmark = pytest.mark.filterwarnings("ignore")  # of tiny random models

# One of each sort: rotary and grouped keys, learned positions, one key head, latent attention, experts, a sliding
# window, a state-space hybrid, no SDPA; an encoder, one with relative positions; a classifier that decodes; T5's kind
# and BART's.
REPRESENTATIVES = [
    *(Case("causal_lm", name) for name in ("qwen3", "opt", "falcon", "deepseek_v3", "mixtral", "mistral", "jamba")),
    *(Case("causal_lm", name) for name in ("gemma2", "bloom")),
    *(Case("classification", name) for name in ("distilbert", "deberta-v2", "modernbert", "mbart")),
    *(Case("seq2seq", name) for name in ("mt5", "marian")),
]


ROOT = Path(__file__).parents[1]


def test_the_page_of_models_has_every_class_and_counts_them() -> None:
    """docs/models.md is of the release in launch/constraints.txt."""
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    pinned = re.search(r"^transformers==([0-9.]+)", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE)
    assert pinned and f"with transformers {pinned[1]}, PEFT" in page
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for section in page.split("\n## ")[1:]:
        title, works, count = re.findall(r"^(.+): (\d+) of (\d+) work$", section, re.MULTILINE)[0]
        rows[title] = re.findall(r"^\| (\w+) \(`(.+?)`\) \| (.+?) \|", section, re.MULTILINE)
        assert (int(works), int(count)) == ([result for *_, result in rows[title]].count("works"), len(rows[title]))
    if transformers.__version__ != pinned[1]:
        pytest.skip(f"transformers {transformers.__version__} may have other classes than {pinned[1]}")
    listed = {(title, name, model_type) for title, of_task in rows.items() for name, model_type, _ in of_task}
    assert listed == {(oracle.TITLES[case.task], case.class_name, case.model_type) for case in oracle.cases()}


def _agrees(case: Case, folder: Path) -> None:
    verdict = oracle.judge(case, folder)
    assert not verdict.wrong, verdict.wrong
    assert verdict.works or verdict.refused or verdict.unmade


@pytest.mark.slow
@pytest.mark.parametrize("case", REPRESENTATIVES, ids=str)
def test_a_class_of_each_sort_is_what_transformers_is(case: Case, tmp_path: Path) -> None:
    _agrees(case, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("case", oracle.cases(), ids=str)
def test_every_class_is_what_transformers_is_or_refused(case: Case, tmp_path: Path) -> None:
    _agrees(case, tmp_path)


@pytest.mark.parametrize("model_type", ["convbert", "nystromformer"])
def test_an_encoder_whose_rows_depend_on_their_neighbours_is_refused(model_type: str, tmp_path: Path) -> None:
    """ConvBERT's convolutions and Nystromformer's landmarks see the padding."""
    verdict = oracle.judge(Case("classification", model_type), tmp_path)
    assert "beside longer rows than alone" in verdict.refused and verdict.refused.startswith("model.name: ")


def test_layers_that_are_given_tokens_before_rows_are_refused(tmp_path: Path) -> None:
    """Longformer's attention has positions along its first axis, where clients of a block would be mixed."""
    verdict = oracle.judge(Case("classification", "longformer"), tmp_path)
    assert "is not given the tokens row by row" in verdict.refused and not verdict.wrong


def test_layers_of_its_own_making_are_refused(tmp_path: Path) -> None:
    """I-BERT's layers compute with whole numbers."""
    verdict = oracle.judge(Case("classification", "ibert"), tmp_path)
    assert "no linear layers that can be adapted" in verdict.refused and not verdict.wrong


def test_an_encoder_decoder_classifies_by_the_end_of_a_text(tmp_path: Path) -> None:
    """Its head reads the decoder's state at eos, of which a row has one. By itself it is for target texts."""
    case = Case("classification", "bart")
    verdict = oracle.judge(case, tmp_path)
    assert verdict.works and set(verdict.refusals) == {"prompt", "prefix"}
    model = Model.model_validate({"name": str(tmp_path)})
    assert model_class(model).task == "seq2seq"
    base = load_base(model.model_copy(update={"task": "classification"}), torch.device("cpu"), oracle.LABELS)
    for ids, count in (([1, 5, 6], 0), ([1, 2, 5, 2], 2)):
        tokens = Tokens(np.array([1, 5, 2, *ids], np.int32), np.array([0, 3, 3 + len(ids)]), np.full(2, 3, np.int32))
        examples = examples_from(tokens, labels=np.zeros(2, np.int32), label_names=oracle.LABELS)
        with pytest.raises(UserError, match=rf"example 2 of test, .* has {count} tokens '.*', where the classifier of"):
            check_tokens(base, examples, "test")


def test_a_cache_that_no_prefix_fits_is_refused(tmp_path: Path) -> None:
    verdict = oracle.judge(Case("classification", "xlm"), tmp_path)
    assert verdict.works and "prefix" in verdict.refusals
