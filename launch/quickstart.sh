#!/usr/bin/env bash
# The embedded demo as server + 2 workers on this machine, which is federated as configs/gap advises; beside it plain FedAvg and
# centralised training; then a table and plots.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh report
export OMP_NUM_THREADS=1
run() { .venv/bin/torchrun --standalone --nproc_per_node=3 -m fedhpc.main runtime.workers=2 "$@"; }
# All three process about as many examples (9,600); the federated ones send as many updates (80). What is given on the
# command line holds for each. The demo has two clients a round: one for each worker.
run run.name=quickstart-federated runtime.block_size=1 "$@"
run configs/fedavg.yaml run.name=quickstart-fedavg "$@"
run configs/fedavg.yaml mode=centralized client.steps=150 client.lr=0.1 client.schedule=linear \
  run.name=quickstart-centralized "$@"
.venv/bin/python -m fedhpc.report runs/quickstart-{federated,fedavg,centralized} --out runs/quickstart-report
echo "next: bash launch/quickstart.sh partition.alpha=0.1 --fresh (more skew), or your own data: configs/README.md"
