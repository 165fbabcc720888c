#!/usr/bin/env bash
# The embedded default, federated and centralised, as server + 2 workers on this machine; then a table and plots.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh report
export OMP_NUM_THREADS=1
run() { .venv/bin/torchrun --standalone --nproc_per_node=3 -m fedhpc.main runtime.workers=2 "$@"; }
run run.name=quickstart-federated "$@"
# As many examples: a round of the federation has 10 of 20 clients, about 1,200 examples.
run mode=centralized client.steps=150 run.name=quickstart-centralized "$@"
.venv/bin/python -m fedhpc.report runs/quickstart-federated runs/quickstart-centralized --out runs/quickstart-report
echo "next: bash launch/quickstart.sh partition.alpha=0.1 --fresh (more skew), or your own data: configs/README.md"
