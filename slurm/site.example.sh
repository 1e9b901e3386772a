#!/usr/bin/env bash
# Copy to slurm/site.sh and keep what your cluster needs; every line may go. It is read
#   - by slurm/launch.sh at the start of every job, on its first node;
#   - by `coca-scale slurm --submit` before sbatch, and by you before a plain one:
#         . slurm/site.sh && sbatch slurm/coca_l14_64gpu.sh
# Written as ${NAME:-value}, a setting can still be changed for a single job.

# Where the job goes. sbatch reads these; they have no effect inside a job.
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_project}
export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_CONSTRAINT=h100

# Software on the nodes, if it is not in the checkout's own virtual environment.
# module load cuda/12.8 nccl
# export PYTHON=/projects/coca/env/bin/python

# Or a container; checkout, data and run folders must be among the mounts.
# export CONTAINER_RUNTIME=pyxis CONTAINER=/projects/images/coca-scale.sqsh
# export CONTAINER_RUNTIME=apptainer CONTAINER=/projects/images/coca-scale.sif
# export CONTAINER_MOUNTS=$PWD:$PWD,/data:/data

# Network between the nodes. NCCL finds InfiniBand by itself; name the interface for the start-up
# where the first one found is not it.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# Where srun must not look for an MPI, where logs go, how often a job without progress comes back,
# whether it goes on with fewer nodes, how long a check of a node before a start may take.
# export SRUN_ARGS="--mpi=none"
# export LOG_DIR=/projects/coca/logs
# export MAX_RESTARTS=5
# export ELASTIC=1
# export NODE_CHECK_SECONDS=180
