#!/usr/bin/env bash
# A run inside an allocation that you hold (salloc): RANKS=9 bash launch/srun.sh [CONFIG.yaml] [section.key=value ...]
# Batch jobs: slurm/fedhpc.sbatch. RANKS defaults to the number of tasks of the allocation.
set -euo pipefail
export PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH" OMP_NUM_THREADS=1
exec srun ${RANKS:+--ntasks="$RANKS"} --kill-on-bad-exit=1 python -m fedhpc.main "$@"
