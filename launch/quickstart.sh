#!/usr/bin/env bash
# The embedded demo as server + 2 workers on this machine: federated as configs/gap advises, by plain FedAvg (the
# embedded default as it is), and centralised; then a table and plots.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh report
export OMP_NUM_THREADS=1
run() { .venv/bin/torchrun --standalone --nproc_per_node=3 -m fedhpc.main runtime.workers=2 "$@"; }
# Few clients a round, many rounds and a rate that falls to 0, as configs/gap came to: about as many examples (9,600) and
# as many updates (80) as the plain FedAvg beside it. What is given on the command line holds for all three runs.
run run.name=quickstart-federated federation.rounds=40 federation.cohort_size=2 client.lr=0.1 client.schedule=linear \
  evaluation.every=5 "$@"
run run.name=quickstart-fedavg "$@"
run mode=centralized client.steps=150 client.lr=0.1 client.schedule=linear run.name=quickstart-centralized "$@"
.venv/bin/python -m fedhpc.report runs/quickstart-{federated,fedavg,centralized} --out runs/quickstart-report
echo "next: bash launch/quickstart.sh partition.alpha=0.1 --fresh (more skew), or your own data: configs/README.md"
