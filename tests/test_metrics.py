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
    margins=np.array([[0.5, -1.0]]),
)


def compute(name: str, outputs: Outputs) -> float:
    return float(registry.choice(FAMILY, name)().compute(outputs))


@pytest.mark.parametrize("name", registry.names(FAMILY))
def test_every_metric_says_what_it_needs(name: str) -> None:
    metric = registry.choice(FAMILY, name)
    assert metric.needs in ("losses", "labels", "texts", "rankings", "preferences")
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


# ---------------------------------------------------------------- intervals over the drawing of the items


def interval(name: str, outputs: Outputs) -> tuple[float, float, str]:
    return tuple(registry.choice(FAMILY, name)().interval(outputs))  # type: ignore[return-value]


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 7), (7, 7), (3, 8), (256, 300), (9, 500)])
def test_the_interval_of_a_share_is_wilsons(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    labels = np.zeros(n, np.int64)
    low, high, by = interval("accuracy", Outputs(labels=labels, predictions=labels + (np.arange(n) >= right)))
    assert (low, high) == pytest.approx(tuple(want), abs=1e-6) and by == "Wilson"
    found = interval("recall", Outputs(ranks=(np.arange(n) < right).astype(np.int64)))
    assert found[:2] == pytest.approx((low, high), abs=1e-12)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    ranks = np.array([1, 2, 4, 0, 3, 1])
    values = np.array([1, 1 / 2, 1 / 4, 0, 1 / 3, 1])
    half = 1.959964 * values.std(ddof=1) / np.sqrt(6)
    found = interval("mrr", Outputs(ranks=ranks))
    assert found == (pytest.approx(values.mean() - half), pytest.approx(values.mean() + half), "normal")
    assert math.isnan(
        interval("rouge_l", Outputs(texts=["a b c"], references=[["a b d"]]))[0]
    )  # one item has no spread


def test_the_interval_of_a_loss_covers_as_often_as_it_says() -> None:
    """Prompts of unlike lengths whose examples are alike: counted one by one they would seem to say more."""
    rng = np.random.default_rng(3)
    difficulty, lengths = rng.gamma(2.0, 1.0, 4000), rng.integers(1, 30, 4000)
    truth = float((difficulty * lengths).sum() / lengths.sum())
    hits, exact = 0, 400
    for _ in range(exact):
        drawn = rng.integers(4000, size=80)
        sums = difficulty[drawn] * lengths[drawn]
        outputs = Outputs(
            nll_sum=float(sums.sum()), tokens=int(lengths[drawn].sum()), prompt_nll=sums, prompt_tokens=lengths[drawn]
        )
        low, high, _ = interval("loss", outputs)
        assert low < compute("loss", outputs) < high
        assert interval("perplexity", outputs)[:2] == pytest.approx((math.exp(low), math.exp(high)))
        hits += low < truth < high
    assert 0.91 < hits / exact < 0.98
    assert math.isnan(
        interval("loss", Outputs(nll_sum=1.0, tokens=2, prompt_nll=np.ones(1), prompt_tokens=np.ones(1)))[0]
    )


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_interval_of_a_corpus_score_is_of_resampled_items(name: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    references = [[" ".join(rng.choice(words, 9)) for _ in range(1 + i % 3)] for i in range(60)]
    texts = [refs[-1][: 8 + 3 * (i % 5)] + " w1 w2" for i, refs in enumerate(references)]
    outputs = Outputs(texts=texts, references=references)
    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    columns = [[refs[j] if j < len(refs) else None for refs in references] for j in range(3)]
    statistics = np.array(metric._extract_corpus_statistics(texts, columns))
    scores = [metric._aggregate_and_compute(statistics[rng.integers(60, size=60)].tolist()).score for _ in range(1500)]
    want = np.quantile(scores, (0.025, 0.975))
    low, high, by = interval(name, outputs)
    width = want[1] - want[0]
    assert (low, high, by) == (
        pytest.approx(want[0], abs=width / 8),
        pytest.approx(want[1], abs=width / 8),
        "bootstrap",
    )
    assert interval(name, outputs) == (low, high, by)  # the same draws in every run
    assert interval(name, Outputs(texts=[""], references=[["a b"]]))[:2] == (0.0, 0.0)


def test_the_interval_of_macro_f1_is_of_resampled_examples() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 200)
    predictions = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 3, 200))
    outputs = Outputs(labels=labels, predictions=predictions)
    drawn = [rng.integers(200, size=200) for _ in range(2000)]
    scores = [compute("macro_f1", Outputs(labels=labels[d], predictions=predictions[d])) for d in drawn]
    low, high, by = interval("macro_f1", outputs)
    assert (low, high) == pytest.approx(tuple(np.quantile(scores, (0.025, 0.975))), abs=0.015) and by == "bootstrap"
    assert interval("macro_f1", outputs) == (low, high, by)
