#!/usr/bin/env bash
# Make .venv, install everything the tests need, run them: a file of tests at a time on every core, in the order of their
# names (by the number of tests in each, the long ones would come last).
# Arguments go to pytest, e.g. -m slow, or -n 0 for one process.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
