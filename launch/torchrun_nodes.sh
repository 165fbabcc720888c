#!/usr/bin/env bash
# A run over several machines without a scheduler; the same command on each of them, with the arguments of torchrun.sh:
#   NODES=2 HEAD=host1 RANKS=4 bash launch/torchrun_nodes.sh [CONFIG.yaml] [section.key=value ...]
# HEAD is a host or address of the first machine that all reach, RANKS the ranks of this machine, PORT a free port there.
set -euo pipefail
export PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH" OMP_NUM_THREADS=1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 # torchrun itself would die of SIGUSR2
exec torchrun --nnodes="${NODES:?}" --nproc_per_node="${RANKS:-3}" --rdzv_backend=c10d --rdzv_id="${RUN_ID:-fedhpc}" \
    --rdzv_endpoint="${HEAD:?}:${PORT:-29400}" -m fedhpc.main "$@"
