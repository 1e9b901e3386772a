#!/usr/bin/env bash
# Which nodes of a job take its ranks; slurm/launch.sh sources this. See docs/surviving.md.

declare -A ANSWERS=()  # of the last check, by node: what it computes with, or what is wrong there
declare -A BLAMES=()   # how often a node was at fault for the end of the ranks
declare -a PASSED=()   # the last check
declare -a NODES=()    # take the ranks
declare -a SPARES=()   # could as well
ONE=(--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1)  # a task beside whatever else runs

# joined WORD...: with commas between them
joined() { local IFS=,; echo "$*"; }

# field NAME: its value in a line of `scontrol show` on stdin
field() { sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# job_line: what SLURM says of the job. It may be busy, and a signal to the job ends scontrol as well
job_line() {
  local line=''
  for _ in {1..12}; do
    line=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    [ -z "$line" ] || break
    sleep 5
  done
  echo "$line"
}

# members: nodes that the job has now; SLURM takes from it what it has lost, if it is --no-kill
members() { scontrol show hostnames "$(job_line | field NodeList)"; }

# states NODE...: lines NODE STATE
states() {
  scontrol show node --oneliner "$(joined "$@")" \
    | sed -n 's/^NodeName=\([^ ]*\).* State=\([^ ]*\).*/\1 \2/p'
}

# check FOLDER RANKS NODE...: ask all nodes at once whether they can take so many ranks
check() {
  local folder=$1 ranks=$2 limit=${NODE_CHECK_SECONDS:-180} node
  local -A pids=()
  shift 2
  ANSWERS=()
  PASSED=()
  for node in "$@"; do
    timeout --kill-after=10 "$limit" "${SRUN[@]}" "${ONE[@]}" --nodelist="$node" \
      ${INSIDE[@]+"${INSIDE[@]}"} "$PYTHON" -m coca_scale.doctor.node "$folder" "$ranks" \
      "$((limit * 3 / 4))" </dev/null >"$LOGS/check.$node" 2>&1 &
    pids[$node]=$!
  done
  for node in "$@"; do
    ! wait "${pids[$node]}" || PASSED+=("$node")
    ANSWERS[$node]=$(sed -n 's/^\([0-9]*: \)\?node: //p' "$LOGS/check.$node" | tail -n 1)
    : "${ANSWERS[$node]:=$(tail -n 1 "$LOGS/check.$node")}"
    : "${ANSWERS[$node]:=no answer within $limit s (NODE_CHECK_SECONDS)}"
  done
}

# choose_nodes FOLDER RANKS COUNT...: NODES become the nodes that take so many ranks each, as many
# nodes as the first COUNT that is possible. Fails if none is, and says why.
choose_nodes() {
  local folder=$1 ranks=$2 node state usual all=() up=() good=() usable=()
  local -A state_of=() faults=()
  shift 2
  readarray -t all < <(members)
  [ ${#all[@]} -gt 0 ] || return 1
  while read -r node state; do state_of[$node]=$state; done < <(states "${all[@]}")
  for node in "${all[@]}"; do
    case ${state_of[$node]:-} in
      *DOWN* | *NOT_RESPONDING* | *\**) faults[$node]="SLURM has it as ${state_of[$node]}" ;;
      *) up+=("$node") ;;
    esac
  done
  check "$folder" "$ranks" ${up[@]+"${up[@]}"}
  usual=$(for node in ${PASSED[@]+"${PASSED[@]}"}; do echo "${ANSWERS[$node]}"; done \
    | sort | uniq -c | sort -rn | sed -n '1s/^ *[0-9]* //p')
  for node in ${up[@]+"${up[@]}"}; do
    if [[ " ${PASSED[*]-} " != *" $node "* ]]; then
      faults[$node]=${ANSWERS[$node]}
    elif [ "${ANSWERS[$node]}" != "$usual" ]; then
      faults[$node]="${ANSWERS[$node]}, and other nodes $usual"
    else
      usable+=("$node")
      if [[ ${state_of[$node]:-} = *DRAIN* ]]; then
        faults[$node]="SLURM drains it"
      elif [ "${BLAMES[$node]:-0}" -ge 2 ]; then
        faults[$node]="was at fault ${BLAMES[$node]} times"
      else
        good+=("$node")
      fi
    fi
  done
  NODES=()
  pick "$@" -- ${good[@]+"${good[@]}"} || pick "$@" -- ${usable[@]+"${usable[@]}"}
  SPARES=()
  for node in ${good[@]+"${good[@]}"}; do
    [[ " ${NODES[*]-} " = *" $node "* ]] || SPARES+=("$node")
  done
  for node in "${all[@]}"; do
    [[ -z ${faults[$node]:-} || " ${NODES[*]-} " = *" $node "* ]] \
      || say "node $node is left out: ${faults[$node]}"
  done
  [ ${#NODES[@]} -gt 0 ]
}

# pick COUNT... -- NODE...: NODES become the first of them, as many as the first possible COUNT
pick() {
  local counts=() count
  while [ "$1" != -- ]; do
    counts+=("$1")
    shift
  done
  shift
  for count in "${counts[@]}"; do
    [ $# -lt "$count" ] || { NODES=("${@:1:count}") && return; }
  done
  return 1
}

# leave_drained: in the background while ranks run. Once SLURM drains a node of theirs and not every
# spare one, they are told to save and leave; the node's name is in LOGS/moved
leave_drained() {
  local node
  while sleep 30 >/dev/null 2>&1; do
    node=$(states "${NODES[@]}" | sed -n '/DRAIN/{s/ .*//p;q}')
    if [ -n "$node" ] && states "${SPARES[@]}" | grep -qvE 'DRAIN|DOWN|RESPOND|\*'; then
      say "SLURM drains $node: the ranks save and leave it"
      echo "$node" >"$LOGS/moved"
      scancel --signal=USR1 "$SLURM_JOB_ID"
      return
    fi
  done
}

# lost_node: one of NODES that the job no longer has
lost_node() {
  local there
  there=$(members)
  [ -z "$there" ] || printf '%s\n' "${NODES[@]}" | grep -vxF -m 1 -- "$there"
}

# culprit FOLDER START CODE NODE: the node at fault for the end of the ranks, if it is one: the run's
# events of this start name it, or a rank there ended first with CODE
culprit() {
  local said start="\"job\": \"$SLURM_JOB_ID\", \"restart\": ${2%.*}, \"launch\": ${2#*.},"
  said=$(tail -n 100 -- "$1/events.jsonl" 2>/dev/null \
    | grep -F '"event": "failure"' | grep -F -m 1 "$start")
  if [ -n "$said" ]; then
    sed -n 's/.*"host": "\([^"]*\)".*/\1/p' <<<"$said"
  elif [ "$3" != 70 ]; then  # with which all ranks end after a fault of one
    echo "$4"
  fi
}

# guard JOB FOLDER: a job that is --no-kill stays when it loses its first node, and this script with
# it, until its time is over. So a step on another node looks, and puts it into the queue
guard() {
  local line host
  trap '' TERM USR1  # they are for the ranks
  echo "$SLURM_STEP_ID" >"$2/guard.step"
  while sleep 20; do
    line=$(scontrol show job --oneliner "$1")
    host=$(field BatchHost <<<"$line")
    case $line in *\ JobState=RUNNING\ *) ;; *) continue ;; esac
    scontrol show hostnames "$(field NodeList <<<"$line")" | grep -qxF -- "$host" && continue
    echo "the first node, $host, was lost" >"$2/why"
    scontrol requeue "$1"
  done
}

# post_guard: where there is another node than this one, and no guard yet
post_guard() {
  local node last=''
  [ -z "${GUARD:-}" ] || ! kill -0 "$GUARD" 2>/dev/null || return 0
  for node in "${NODES[@]}" ${SPARES[@]+"${SPARES[@]}"}; do
    [ "$node" = "${SLURMD_NODENAME:-}" ] || last=$node
  done
  [ -n "$last" ] || return 0
  "${BARE_SRUN[@]}" "${ONE[@]}" --cpus-per-task=1 --nodelist="$last" \
    bash -c "$(declare -f field guard); guard \"\$@\"" guard "$SLURM_JOB_ID" "$LOGS" \
    </dev/null >"$LOGS/guard.out" 2>&1 &
  GUARD=$!
  trap dismiss_guard EXIT
}

# dismiss_guard: or the job would wait for it
dismiss_guard() {
  local step
  step=$(cat "$LOGS/guard.step" 2>/dev/null)
  [ -z "$step" ] || scancel --signal=KILL "$SLURM_JOB_ID.$step" 2>/dev/null  # or gone with its node
}
