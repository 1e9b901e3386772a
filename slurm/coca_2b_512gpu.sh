#!/usr/bin/env bash
# recipes/coca_2b.yaml on 512 GPUs: 64 nodes × 8 tasks, one task per GPU.
#   sbatch [--account=... --partition=...] THIS_FILE [key.path=value ...]
# Settings of the cluster: slurm/site.example.sh. Written by
#   coca-scale slurm recipes/coca_2b.yaml --gpus 512
#SBATCH --job-name=coca_2b_laion2b
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck source=/dev/null
. "${COCA_SCALE_HOME:-${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}}/slurm/launch.sh"

recipe=recipes/coca_2b.yaml
launch_training "${RECIPE:-$recipe}" "$@"
