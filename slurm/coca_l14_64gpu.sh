#!/usr/bin/env bash
# CoCa ViT-L/14 on 64 GPUs: 8 nodes × 8 tasks, one task per GPU.
#   sbatch [--account=... --partition=...] slurm/coca_l14_64gpu.sh [key.path=value ...]
# RECIPE, PYTHON and COCA_SCALE_HOME may be set in the environment.
#SBATCH --job-name=coca_l14
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

cd "${COCA_SCALE_HOME:-${SLURM_SUBMIT_DIR:-.}}"
RECIPE=${RECIPE:-recipes/large.yaml}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# since SLURM 22.05 srun does not inherit this, and would give every task one core
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

srun --wait=60 --kill-on-bad-exit=1 \
  "$PYTHON" coca_scale/train.py --recipe "$RECIPE" "$@"
