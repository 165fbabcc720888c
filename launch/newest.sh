#!/usr/bin/env bash
# Run the tests that lean most on other libraries with the newest releases of these (launch/constraints-newest.txt), in an
# environment outside the checkout that later runs find again. Arguments go to pytest.
#   FEDHPC_NEWEST   the folder of that environment (~/.cache/fedhpc/newest)
set -euo pipefail
cd "$(dirname "$0")/.."
export FEDHPC_VENV=${FEDHPC_NEWEST:-${XDG_CACHE_HOME:-$HOME/.cache}/fedhpc/newest}
export FEDHPC_CONSTRAINTS=launch/constraints-newest.txt
export PIP_CONSTRAINT=$PWD/launch/constraints-newest.txt # pip may be held to older releases on this machine
export PIP_NO_COMPILE=0                                  # "no" to the compilation of all that is not imported
bash launch/install.sh test
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
chosen=(tests/test_screen.py tests/test_export.py tests/test_kinds.py tests/test_methods.py tests/test_store.py)
chosen+=("tests/test_federation.py::test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not[dropout-adam-2]")
chosen+=(tests/test_startup.py::test_transformers_models_are_read_once_and_then_known_from_the_cache)
chosen+=(tests/test_startup.py::test_forked_ranks_import_nothing_heavy_of_their_own)
# Every model, method, exchange and optimizer once; how they combine is tested with the pinned releases.
exec "$FEDHPC_VENV/bin/python" -m pytest -n auto --dist loadfile -p no:cacheprovider --each-once \
    -m "not gpu and not soak and not cluster" "${chosen[@]}" "$@"
