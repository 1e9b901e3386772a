#!/usr/bin/env bash
# Retrieval and captioning scores of every checkpoint of a run, on every data set named.
#   sbatch --array=0-3 slurm/eval_array.sh RUN DATA [DATA ...]
# RUN may also be a single model (checkpoint, export, NAME@TAG); DATA is what `coca-scale eval` takes:
# folder, CSV/TSV, shards; class folders with EVAL=zeroshot. The pairs of checkpoint and data set are
# dealt to the tasks of the array, however many there are. Results, one .json and one .txt per pair
# and evaluation, are written to OUT (default: RUN/eval, or eval for a single model); what is there
# is left alone. EVAL names the evaluations (default: "retrieval captioning"), EVAL_ARGS more options.
#SBATCH --job-name=coca_eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# shellcheck source=/dev/null
. "${COCA_SCALE_HOME:-${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}}/slurm/launch.sh"

if [ $# -lt 2 ]; then
  say "usage: sbatch --array=0-3 slurm/eval_array.sh RUN DATA [DATA ...]"
  exit 2
fi
run=${1%/}
shift
models=("$run")
out=${OUT:-eval}
if [ -d "$run/checkpoints" ]; then
  models=("$run"/checkpoints/step_*[0-9]/)
  out=${OUT:-$run/eval}
fi
case $out in -*) out=./$out ;; esac
mkdir -p "$out" || exit 2

tasks=${SLURM_ARRAY_TASK_COUNT:-1}
mine=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
pair=-1
failed=0
for data in "$@"; do
  for model in "${models[@]%/}"; do
    pair=$((pair + 1))
    [ $((pair % tasks)) = "$mine" ] || continue
    for evaluation in ${EVAL:-retrieval captioning}; do
      result=$out/$(basename -- "$model").$(tr -cs '[:alnum:]\n' _ <<<"$data").$evaluation
      if [ -s "$result.txt" ]; then
        say "$result.txt is there already"
        continue
      fi
      say "$evaluation of $model on $data"
      # shellcheck disable=SC2086
      if alone "$PYTHON" -m coca_scale eval "$evaluation" ${EVAL_ARGS:-} \
        --out "$result.json" -- "$model" "$data" >"$result.txt.tmp"; then
        mv "$result.txt.tmp" "$result.txt"
        cat "$result.txt"
      else
        failed=1
      fi
    done
  done
done
exit "$failed"
