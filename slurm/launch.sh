#!/usr/bin/env bash
# What the scripts of this folder share; they source it inside their job. See docs/clusters.md.
# Settings, from the environment of sbatch or from the site file (slurm/site.example.sh):
#   COCA_SCALE_HOME    checkout with the code and the recipes; default: where sbatch was called
#   SITE               site file; default: slurm/site.sh if there is one
#   PYTHON             default: .venv/bin/python of the checkout if there is one, else python3
#   CONTAINER          image the ranks run in; CONTAINER_RUNTIME is pyxis or apptainer,
#   CONTAINER_MOUNTS   what they see, comma-separated SOURCE:TARGET; default: the checkout
#   SRUN_ARGS          further options of srun, for example --mpi=none
#   LOG_DIR            folder of the logs per node; default: logs
#   MAX_RESTARTS       restarts in a row that saved nothing new before the job gives up; default: 5

set -uo pipefail  # no -e: exit codes are what this file is about

say() { echo "launch: $*" >&2; }

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"
cd "${COCA_SCALE_HOME:-$SLURM_SUBMIT_DIR}" || exit 2

site=${SITE:-slurm/site.sh}
case $site in */*) ;; *) site=./$site ;; esac  # or bash looks for it in PATH
if [ -f "$site" ]; then
  set +u  # module and conda functions read variables that are not set
  # shellcheck source=/dev/null
  . "$site"
  set -u
elif [ -n "${SITE:-}" ]; then
  say "SITE=$SITE: no such file"
  exit 2
fi

LOGS=${LOG_DIR:-logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID
EXIT_FILE=$LOGS/exit.${SLURM_RESTART_COUNT:-0}  # code of the first rank that failed
mkdir -p "$LOGS" || exit 2

read -ra srun_args <<<"${SRUN_ARGS:-}"
SRUN=(srun --wait=60 --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"})
INSIDE=()
if [ -z "${CONTAINER:-}" ]; then
  PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
else
  PYTHON=${PYTHON:-python3}
  mounts=${CONTAINER_MOUNTS:-$PWD:$PWD}
  case ${CONTAINER_RUNTIME:-} in
    pyxis)
      SRUN+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
      ;;
    apptainer) INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER") ;;
    *)
      say "CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-}: choose pyxis or apptainer"
      exit 2
      ;;
  esac
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# another port after a restart: a rank of the last one may still hold it; all are below the
# ephemeral ports
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 12000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
# since SLURM 22.05 srun does not inherit this, and would give every task one core
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# as_rank LOGS EXIT_FILE COMMAND...: one task of a step. Its lines get its number and go to the log
# of its node as well. Signals are for the command: this shell and its filters outlive them.
as_rank() {
  local logs=$1 exit_file=$2 code
  shift 2
  trap : USR1 TERM
  "$@" 2>&1 \
    | (trap '' USR1 TERM && exec sed -u "s/^/$SLURM_PROCID: /") \
    | (trap '' USR1 TERM && exec tee -a "$logs/$SLURMD_NODENAME.log")
  code=${PIPESTATUS[0]}
  # the first one: srun kills the others as soon as one is gone, and returns the highest code
  [ "$code" = 0 ] || (set -o noclobber && echo "$code" >"$exit_file") 2>/dev/null
  exit "$code"
}

# on_all_ranks COMMAND...: one task per GPU; the code of the first rank that failed
on_all_ranks() {
  local code
  "${SRUN[@]}" bash -c "$(declare -f as_rank); as_rank \"\$@\"" rank "$LOGS" "$EXIT_FILE" \
    ${INSIDE[@]+"${INSIDE[@]}"} "$@"
  code=$?
  [ ! -s "$EXIT_FILE" ] || code=$(cat "$EXIT_FILE")
  return "$code"
}

# alone COMMAND...: a single task on the first node
alone() {
  "${SRUN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 ${INSIDE[@]+"${INSIDE[@]}"} "$@" </dev/null
}

# latest FOLDER: name of the newest complete checkpoint of a run folder, if any
latest() { cat -- "$1/checkpoints/latest" 2>/dev/null; }

# come_back REASON CODE: put the job into the queue again, which ends this script
come_back() {
  local job='' state
  for _ in {1..12}; do  # a controller may be busy, and a signal to the job ends scontrol as well
    job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    [ -z "$job" ] || break
    sleep 5
  done
  state=$(grep -o 'JobState=[A-Z_]* Reason=[A-Za-z]*' <<<"$job")
  case $state in
    *=RUNNING\ * | *\ Reason=TimeLimit) ;;
    *)  # cancelled by someone, or SLURM requeues it itself
      say "$1; SLURM has the job as ${state:-unknown}, and it is left at that"
      exit "$2"
      ;;
  esac
  say "$1; job $SLURM_JOB_ID goes back into the queue and on from the newest checkpoint"
  trap - TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    sleep 300  # SLURM ends this script
  else
    say "SLURM did not requeue the job; submitted again by hand it goes on as well: sbatch" \
      "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')"
  fi
  exit "$2"
}

# launch_training RECIPE [key.path=value ...]: train on all ranks and decide what comes after.
launch_training() {
  local recipe=$1 folder before code reason restarts=0
  shift
  folder=$(alone "$PYTHON" -c '
import sys
from coca_scale.recipe import RecipeError, load_recipe
try:
    print(load_recipe(sys.argv[1], [a for a in sys.argv[2:] if "=" in a]).run.folder)
except RecipeError as error:
    print(error, file=sys.stderr)
    sys.exit(2)' "$recipe" "$@") || exit 2
  before=$(latest "$folder")
  say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST," \
    "$SLURM_NTASKS ranks; logs per node in $LOGS"
  # SIGTERM to this script means that the job is ending; the ranks may still be saving
  trap : TERM
  on_all_ranks "$PYTHON" coca_scale/train.py --recipe="$recipe" "$@"
  code=$?
  case $code in
    0) exit 0 ;;
    1 | 2)
      say "ended with code $code, a fault that a restart does not mend; its reason is above"
      exit "$code"
      ;;
    75) reason="was told to stop, and saved" ;;
    *) reason="a rank died (exit code $code)" ;;
  esac
  if [ "$(latest "$folder")" = "$before" ]; then
    restarts=$(($(cat "$LOGS/restarts" 2>/dev/null || echo 0) + 1))
  fi
  echo "$restarts" >"$LOGS/restarts"
  if [ "$restarts" -gt "${MAX_RESTARTS:-5}" ]; then
    say "$reason; $restarts starts in a row saved nothing new, so the job is not restarted"
    exit "$code"
  fi
  come_back "$reason" "$code"
}
