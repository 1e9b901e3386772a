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
#   SPARE_NODES        nodes of the job that take the place of others; default: 0
#   ELASTIC            1: goes on with fewer nodes, where the recipe's batch divides over them
#   NODE_CHECK_SECONDS for the check of a node before a start; default: 180

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

# shellcheck source=slurm/nodes.sh
. slurm/nodes.sh || exit 2

LOGS=${LOG_DIR:-logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$LOGS" || exit 2

read -ra srun_args <<<"${SRUN_ARGS:-}"
BARE_SRUN=(srun ${srun_args[@]+"${srun_args[@]}"})
SRUN=("${BARE_SRUN[@]}" --wait=60 --kill-on-bad-exit=1)
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
  [ "$code" = 0 ] || (set -o noclobber && echo "$code $SLURMD_NODENAME" >"$exit_file") 2>/dev/null
  exit "$code"
}

# on_all_ranks RANKS START WHY COMMAND...: so many tasks on each of NODES, one per GPU. START is
# RESTART.LAUNCH: of SLURM, and since then in place. CODE becomes that of the first rank that
# failed, and FIRST_NODE its node.
on_all_ranks() {
  local ranks=$1 start=$2 why=$3 saver=''
  local exit_file=$LOGS/exit.$start
  shift 3
  export MASTER_ADDR=${NODES[0]}
  # another port at every start: a rank of the last one may still hold it; all are below the
  # ephemeral ports
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * ${start%.*} + 104729 * ${start#*.}) % 12000))
  if [ ${#SPARES[@]} -gt 0 ]; then
    leave_drained &
    saver=$!
  fi
  COCA_SCALE_LAUNCH=${start#*.} COCA_SCALE_WHY=$why "${SRUN[@]}" --overlap \
    --nodes="${#NODES[@]}" --ntasks="$((ranks * ${#NODES[@]}))" --ntasks-per-node="$ranks" \
    --nodelist="$(joined "${NODES[@]}")" \
    bash -c "$(declare -f as_rank); as_rank \"\$@\"" rank "$LOGS" "$exit_file" \
    ${INSIDE[@]+"${INSIDE[@]}"} "$@"
  CODE=$? FIRST_NODE=''
  [ -z "$saver" ] || kill "$saver" 2>/dev/null
  [ ! -s "$exit_file" ] || read -r CODE FIRST_NODE <"$exit_file"
}

# alone COMMAND...: a single task on the first node
alone() {
  "${SRUN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 ${INSIDE[@]+"${INSIDE[@]}"} "$@" </dev/null
}

# latest FOLDER: name of the newest complete checkpoint of a run folder, if any
latest() { cat -- "$1/checkpoints/latest" 2>/dev/null; }

# lasts: whether this allocation is good for another start
lasts() {
  local line end
  line=$(job_line)
  end=$(date -d "$(field EndTime <<<"$line")" +%s 2>/dev/null) || end=$((2 ** 40))  # has no limit
  [ -z "$ENDING" ] && [[ $line = *\ JobState=RUNNING\ * ]] && [ "$end" -gt $(($(date +%s) + 600)) ]
}

# come_back: put the job into the queue again, which ends this script
come_back() {
  local state
  state=$(job_line | grep -o 'JobState=[A-Z_]* Reason=[A-Za-z]*')
  case $state in
    *=RUNNING\ * | *\ Reason=TimeLimit) ;;
    *)  # cancelled by someone, or SLURM requeues it itself
      say "$REASON; SLURM has the job as ${state:-unknown}, and it is left at that"
      exit "$CODE"
      ;;
  esac
  say "$REASON; job $SLURM_JOB_ID goes back into the queue and on from the newest checkpoint"
  trap - TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    sleep 300  # SLURM ends this script
  else
    say "SLURM did not requeue the job; submitted again by hand it goes on as well: sbatch" \
      "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')"
  fi
  exit "$CODE"
}

# train_once FOLDER RANKS START COMMAND...: on the nodes that are chosen. CODE becomes that of the
# ranks, REASON why they ended, IN_PLACE empty if they should not start again in this allocation.
train_once() {
  local folder=$1 ranks=$2 start=$3 node
  shift 3
  post_guard
  rm -f "$LOGS/moved"
  say "start $start of job $SLURM_JOB_ID on $(joined "${NODES[@]}")," \
    "$((ranks * ${#NODES[@]})) ranks; logs per node in $LOGS"
  on_all_ranks "$ranks" "$start" "$(cat "$LOGS/why" 2>/dev/null)" "$@"
  case $CODE in
    0) exit 0 ;;
    1 | 2)
      say "ended with code $CODE, a fault that a restart does not mend; its reason is above"
      exit "$CODE"
      ;;
    75)
      REASON="was told to stop, and saved"
      IN_PLACE=$(cat "$LOGS/moved" 2>/dev/null)
      [ -z "$IN_PLACE" ] || REASON="left $IN_PLACE, which SLURM drains"
      ;;
    *)
      node=$(lost_node)
      if [ -n "$node" ]; then
        REASON="node $node was lost"
      else
        node=$(culprit "$folder" "$start" "$CODE" "$FIRST_NODE")
        [ -z "$node" ] || BLAMES[$node]=$((${BLAMES[$node]:-0} + 1))
        REASON="a rank died (exit code $CODE)${node:+ on $node}"
      fi
      ;;
  esac
}

# launch_training RECIPE [key.path=value ...]: train on all ranks and decide what comes after.
launch_training() {
  local recipe=$1 ranks counts plan folder before launch=0 restarts
  shift
  ranks=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
  counts=("$((SLURM_JOB_NUM_NODES - ${SPARE_NODES:-0}))")
  if [ "${counts[0]}" -lt 1 ]; then
    say "SPARE_NODES=$SPARE_NODES of $SLURM_JOB_NUM_NODES nodes leave none for the ranks"
    exit 2
  fi
  plan=$(alone "$PYTHON" -m coca_scale.planning.nodes "$recipe" "${counts[0]}" "$ranks" "$@") \
    || exit 2
  folder=$(sed -n 1p <<<"$plan")
  [ "${ELASTIC:-0}" = 0 ] || read -ra counts <<<"$(sed -n 2p <<<"$plan")"
  # SIGTERM to this script means that the job is ending; the ranks may still be saving
  ENDING=''
  trap 'ENDING=1' TERM
  while :; do
    before=$(latest "$folder")
    CODE=70 IN_PLACE=1 REASON="too few of its nodes can take ranks"
    # what is wrong may pass, and the queue is long
    if choose_nodes "$folder" "$ranks" "${counts[@]}" \
      || { sleep 30 && choose_nodes "$folder" "$ranks" "${counts[@]}"; }; then
      train_once "$folder" "$ranks" "${SLURM_RESTART_COUNT:-0}.$launch" \
        "$PYTHON" coca_scale/train.py --recipe="$recipe" "$@"
    else
      IN_PLACE=''
    fi
    restarts=0
    if [ "$(latest "$folder")" = "$before" ]; then
      restarts=$(($(cat "$LOGS/restarts" 2>/dev/null || echo 0) + 1))
    fi
    echo "$restarts" >"$LOGS/restarts"
    echo "$REASON" >"$LOGS/why"
    if [ "$restarts" -gt "${MAX_RESTARTS:-5}" ]; then
      say "$REASON; $restarts starts in a row saved nothing new, so the job is not restarted"
      exit "$CODE"
    fi
    if [ -z "$IN_PLACE" ] || ! lasts; then
      come_back
    fi
    launch=$((launch + 1))
    say "$REASON; the ranks start again in place, from the newest checkpoint"
    [ "$restarts" -lt 2 ] || sleep $((30 * (restarts - 1)))  # again: what is wrong may pass
  done
}
