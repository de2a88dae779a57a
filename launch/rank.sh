#!/usr/bin/env bash
# usage: launch/rank.sh COMMAND...      One process of a run under srun or mpirun, its numbers in torch's variables.
# MASTER_ADDR     the host of rank 0, as every host reaches it; an address is surest
# MASTER_PORT     a port of that host that is free (default 29400)
# No launcher of torch or DeepSpeed stands between: signals of the scheduler reach the training itself.
set -euo pipefail
if [ -n "${OMPI_COMM_WORLD_RANK:-}" ]; then # Open MPI, also inside of a SLURM job
    RANK=$OMPI_COMM_WORLD_RANK
    WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
    LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK
    LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE
elif [ -n "${PMI_RANK:-}" ] && [ -n "${MPI_LOCALRANKID:-}" ]; then # MPICH's Hydra, Intel MPI
    RANK=$PMI_RANK
    WORLD_SIZE=$PMI_SIZE
    LOCAL_RANK=$MPI_LOCALRANKID
    LOCAL_WORLD_SIZE=$MPI_LOCALNRANKS
elif [ -n "${SLURM_PROCID:-}" ]; then
    RANK=$SLURM_PROCID
    WORLD_SIZE=$SLURM_NTASKS
    LOCAL_RANK=$SLURM_LOCALID
    LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
else
    echo "launch/rank.sh: error: neither srun nor mpirun has started this: use deepspeed or torchrun" >&2
    exit 2
fi
: "${MASTER_ADDR:?launch/rank.sh: the host of rank 0}"
export RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29400}"
exec "$@"
