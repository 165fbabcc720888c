"""The metrics against values worked out by hand and against their packages called directly."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from fedhpc import registry
from fedhpc.evaluation.metrics.base import Outputs

FAMILY = "metrics"
EVERY = Outputs(
    nll_sum=3.0,
    tokens=4,
    labels=np.array([0, 1, 1]),
    predictions=np.array([0, 1, 0]),
    texts=["a cat sat", ""],
    references=[["a cat sat", "the cat"], ["something else"]],
    ranks=np.array([1, 0]),
)


def compute(name: str, outputs: Outputs) -> float:
    return float(registry.choice(FAMILY, name)().compute(outputs))


@pytest.mark.parametrize("name", registry.names(FAMILY))
def test_every_metric_says_what_it_needs(name: str) -> None:
    metric = registry.choice(FAMILY, name)
    assert metric.needs in ("losses", "labels", "texts", "rankings")
    assert isinstance(metric.higher_is_better, bool)
    assert math.isfinite(compute(name, EVERY))


def test_metrics_need_no_heavy_import() -> None:
    code = (
        "import sys; from fedhpc import registry\n"
        f"for name in registry.names({FAMILY!r}): registry.choice({FAMILY!r}, name)\n"
        "assert not {'torch', 'transformers', 'sacrebleu', 'rouge_score', 'nltk'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loss_and_perplexity() -> None:
    assert compute("loss", EVERY) == 0.75
    assert compute("perplexity", EVERY) == pytest.approx(math.exp(0.75), rel=1e-15)
    assert compute("perplexity", Outputs(nll_sum=2000.0, tokens=2)) == math.inf
    assert math.isnan(compute("perplexity", Outputs(nll_sum=math.nan, tokens=2)))


def test_accuracy_and_macro_f1() -> None:
    outputs = Outputs(labels=np.array([0, 0, 0, 1, 1, 2]), predictions=np.array([0, 0, 1, 1, 4, 0]))
    assert compute("accuracy", outputs) == 0.5
    # Class 0: 2 * 2 / (3 + 3), 1: 2 * 1 / (2 + 2), 2: 0 / (1 + 0), 4: 0 / (0 + 1); class 3 does not occur.
    assert compute("macro_f1", outputs) == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4, rel=1e-15)
    right = Outputs(labels=np.array([7, 3]), predictions=np.array([7, 3]))
    assert compute("accuracy", right) == compute("macro_f1", right) == 1.0


TEXTS = ["The Eagle is a cheap pub near Café Sicilia.", "", "It is in the city centre , yes .", "one"]
REFERENCES = [
    ["The Eagle is a cheap pub close to Café Sicilia.", "Near Café Sicilia there is The Eagle.", "A cheap pub."],
    ["nothing was said"],
    ["It lies in the city centre.", "You find it in the centre of the city, yes."],
    ["two three four five six"],
]


def test_bleu_of_one_reference_each_by_hand() -> None:
    # n-gram precisions 4/5, 3/4, 2/3, 1/2; as long as its reference, so no brevity penalty.
    outputs = Outputs(texts=["a b c d e"], references=[["a b c d f"]])
    assert compute("bleu", outputs) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-12)
    assert compute("bleu", Outputs(texts=["a b c d e"], references=[["x", "a b c d e"]])) == pytest.approx(100)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_ragged_references_equal_sacrebleu_and_sentence_statistics(name: str) -> None:
    """Missing references must not count as empty ones: the corpus score is that of the summed item statistics."""
    from sacrebleu.metrics import BLEU, CHRF

    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    statistics = [
        metric._extract_corpus_statistics([text], [[ref] for ref in references])[0]
        for text, references in zip(TEXTS, REFERENCES, strict=True)
    ]
    want = metric._compute_score_from_stats(np.array(statistics).sum(axis=0).tolist()).score
    got = compute(name, Outputs(texts=TEXTS, references=REFERENCES))
    assert got == pytest.approx(want, rel=1e-12)
    columns = [[refs[j] if j < len(refs) else None for refs in REFERENCES] for j in range(3)]
    assert got == {"bleu": BLEU, "chrf": CHRF}[name]().corpus_score(TEXTS, columns).score
    assert 0 < got < 100
    # A corpus without ragged references is sacrebleu's plain call.
    plain = [references[0] for references in REFERENCES]
    assert (
        compute(name, Outputs(texts=TEXTS, references=[[r] for r in plain]))
        == metric.corpus_score(TEXTS, [plain]).score
    )


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l"])
def test_empty_texts_score_nothing(name: str) -> None:
    assert compute(name, Outputs(texts=["", ""], references=[["a b"], ["c", "d e"]])) == 0.0


def test_rouge_l_by_hand_and_by_its_package() -> None:
    # LCS "a cat on mat" has 4 words: precision 4/5, recall 4/6; the second reference shares only "mat".
    one = Outputs(texts=["a cat slept on mat"], references=[["a cat sat on a mat", "mat"]])
    assert compute("rouge_l", one) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6), rel=1e-12)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)
        for text, references in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert compute("rouge_l", Outputs(texts=TEXTS, references=REFERENCES)) == pytest.approx(np.mean(best), rel=1e-12)


def test_short_answers_as_squad_compares_them() -> None:
    outputs = Outputs(
        texts=["The Eiffel Tower!", "in Paris, France", "", "a", "42"],
        references=[["eiffel tower"], ["Paris", "paris france"], ["x"], ["the"], ["41", "43"]],
    )
    assert compute("exact_match", outputs) == 2 / 5  # the first, and the fourth, where both are articles alone
    # Second: 2 of 3 words found are 2 of 2 wanted, F1 4/5.
    assert compute("f1", outputs) == pytest.approx((1 + 4 / 5 + 0 + 1 + 0) / 5, rel=1e-15)
    assert compute("contains", outputs) == 2 / 5  # an answer of articles alone is in nothing
    repeated = Outputs(texts=["no no no"], references=[["no no yes"]])
    assert compute("f1", repeated) == pytest.approx(2 * 2 / 6, rel=1e-15)


def test_recall_and_mean_reciprocal_rank() -> None:
    outputs = Outputs(ranks=np.array([1, 4, 0, 2]))
    assert compute("recall", outputs) == 3 / 4
    assert compute("mrr", outputs) == pytest.approx((1 + 1 / 4 + 0 + 1 / 2) / 4, rel=1e-15)
