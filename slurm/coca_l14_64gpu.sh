#!/usr/bin/env bash
# recipes/large.yaml on 64 GPUs: 8 nodes × 8 tasks, one task per GPU.
#   sbatch [--account=... --partition=...] THIS_FILE [key.path=value ...]
# Settings of the cluster: slurm/site.example.sh. Written by
#   coca-scale slurm recipes/large.yaml --gpus 64
#SBATCH --job-name=coca_l14_laion2b
#SBATCH --nodes=8
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

recipe=recipes/large.yaml
launch_training "${RECIPE:-$recipe}" "$@"
