# What both job scripts share; sourced by them on the job's first node.

srun_arguments=(--kill-on-bad-exit=1)

# One worker per GPU and the server beside them on the first node, unless the job was given --ntasks... of its own.
place_ranks() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} hosts host rank
    if [ "$gpus" = 0 ] || [ -n "${SLURM_NTASKS:-}" ]; then
        # From Slurm 22.05 on srun does not take the job's --cpus-per-task over by itself.
        if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then srun_arguments+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
        return
    fi
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    SLURM_HOSTFILE=$(mktemp 2> /dev/null || mktemp -p /tmp) # TMPDIR may name a folder that is not there
    export SLURM_HOSTFILE
    {
        echo "${hosts[0]}"
        for host in "${hosts[@]}"; do
            for ((rank = 0; rank < gpus; rank++)); do echo "$host"; done
        done
    } > "$SLURM_HOSTFILE"
    srun_arguments+=(--distribution=arbitrary --overcommit --ntasks="$((1 + gpus * ${#hosts[@]}))")
}

# status RUN_DIR KEY: the state, or the number of finished rounds, as status.json has it; empty where there is none.
status() { sed -n "s/^ *\"$2\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$1/status.json" 2>/dev/null || true; }

# run RUN_DIR COMMAND...: run it; if the end of the time limit interrupts it, put the job back into the queue.
run() {
    local directory=$1 ended= code=0 before
    shift
    trap 'ended=1' TERM # scancel, or a preemption: Slurm knows itself what becomes of the job
    before=$(status "$directory" round)
    "$@" || code=$?
    # Codes below 75 are final: done, failed, refused. Above it srun may have killed the ranks that were not quick.
    if [ "$code" -lt 75 ] || [ -n "$ended" ] || [ "$(status "$directory" state)" != preempted ]; then exit "$code"; fi
    if [ "$(status "$directory" round)" = "$before" ]; then
        echo "fedhpc: no round was finished within the time limit; not requeued: give the job more --time" >&2
        exit 1
    fi
    echo "fedhpc: requeued, to go on after round $(status "$directory" round)"
    # A task of an array by its own name: the bare id of one of them is that of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${job:-$SLURM_JOB_ID}" || exit "$code" # some sites requeue a job that ends with 75
    exit 0
}
