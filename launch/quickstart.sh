#!/usr/bin/env bash
# The embedded default, federated and centralised, as server + 2 workers on this machine; then a table and plots.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh report
export OMP_NUM_THREADS=1
for mode in federated centralized; do
    .venv/bin/torchrun --standalone --nproc_per_node=3 -m fedhpc.main mode="$mode" run.name="quickstart-$mode" "$@"
done
.venv/bin/python -m fedhpc.report runs/quickstart-federated runs/quickstart-centralized --out runs/quickstart-report
echo "next: bash launch/quickstart.sh partition.alpha=0.1 --fresh (more skew), or your own data: configs/README.md"
