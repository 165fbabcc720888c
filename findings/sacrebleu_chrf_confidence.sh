#!/usr/bin/env bash
# sacrebleu 2.6.0 with numpy 2: chrF's confidence interval is a TypeError where one resample scores 0 and another does not.
#
# What one would guess: `corpus_score(..., n_bootstrap=1000)`, and `sacrebleu --metrics chrf --confidence`, give the score
# and its interval for any texts, as they do for BLEU and with numpy 1.
# What happens: the counts of a resample are numpy's float32, so its score is one too (until numpy 2, which keeps float32
# beside Python's numbers, it was a float64, which is a float); only a resample without any match returns the literal 0.0.
# `statistics.mean` takes no mixture: TypeError, don't know how to coerce float and float32. A corpus in which most texts
# match never shows it; a short test set, a weak model or another language does.
# What to do: resample the counts of each text oneself, or numpy below 2.
#
# Seen: of two texts, one right and one wrong, 4 and more resamples raise it (the first 3 all hold the right one); BLEU does
# not. With numpy 1.26.4 the interval of 1000 resamples is 50.60 +- 50.00.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check sacrebleu==2.6.0 numpy==2.4.6
cat > "$folder/interval.py" <<'PY'
import sys

import sacrebleu.metrics

metric, resamples = getattr(sacrebleu.metrics, sys.argv[1])(), int(sys.argv[2])
texts, references = ["a", "b"], [["a", "c"]]
try:
    print(metric.corpus_score(texts, references, n_bootstrap=resamples))
except TypeError as error:
    print(f"TypeError: {error}")
PY
export SACREBLEU_SEED=12345 # its default: the same resamples every time
plain=$("$folder/venv/bin/python" "$folder/interval.py" CHRF 1)
chrf=$("$folder/venv/bin/python" "$folder/interval.py" CHRF 1000)
bleu=$("$folder/venv/bin/python" "$folder/interval.py" BLEU 1000)
printf 'a\nb\n' > "$folder/texts"
printf 'a\nc\n' > "$folder/references"
command=$("$folder/venv/bin/sacrebleu" "$folder/references" -i "$folder/texts" --metrics chrf --confidence 2>&1 | tail -n 1 || true)
echo "sacrebleu 2.6.0, numpy 2.4.6, the texts a and b beside the references a and c: chrF alone: $plain; with 1000" \
    "resamples: $chrf; on the command line: $command; BLEU with 1000 resamples: $bleu"
[ "$plain" = "chrF2 = 50.00" ] && [[ $chrf == TypeError:* ]] && [[ $command == TypeError:* ]] && [[ $bleu == BLEU* ]]
