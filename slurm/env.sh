# What differs between sites; both job scripts source this file, on the job's first node. $FEDHPC is this checkout.
# Account and partition are not here: sbatch reads them before this file (README.md, "Your site").

# Modules, if torch or MPI come from them.
#module purge; module load python/3.11 cuda/12.6 openmpi/5

# The environment that launch/install.sh has made; replace it by yours.
export PATH=$FEDHPC/.venv/bin:$PATH

# Compute nodes without internet: download on the login node first, into a folder that all nodes see.
#export HF_HOME=/shared/$USER/huggingface HF_HUB_OFFLINE=1
# Tokens are made once and read by all; also on a file system that all nodes see (default ~/.cache/fedhpc).
#export FEDHPC_CACHE=/shared/$USER/fedhpc

# One thread per rank: more of them change the last bits of a sum, and wait for each other.
export OMP_NUM_THREADS=1

# The network between nodes, where the host name resolves to a slow one.
#export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# How the ranks talk. Default: torch.distributed (gloo, NCCL). MPI instead: the kind of `srun --mpi=list` that fits
# the MPI library which mpi4py loads (MPICH: pmi2; Open MPI: pmix), and runtime.transport=mpi for every run.
#export SLURM_MPI_TYPE=pmix
# Arguments of every run, before those of the command line, e.g. (runtime.transport=mpi runtime.timeout_s=120).
FEDHPC_ARGUMENTS=()
