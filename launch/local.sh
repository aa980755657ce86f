#!/usr/bin/env bash
# Several processes of one program on this machine, as a pod has them: each is told where the coordinator is, which one
# it is, and how many there are (almost_jax.io.distributed reads it). When one fails, the others are stopped.
set -euo pipefail

say() { printf 'local.sh: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

dry_run=""
if [[ ${1:-} == --dry-run ]]; then dry_run=yes && shift; fi
[[ ${1:-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || die "usage: local.sh [--dry-run] N COMMAND..., N a number of processes"
count=$1
shift
command -v -- "$1" >/dev/null || die "there is no command '$1'"

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    # A port on which nobody answers.
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

coordinator=${ALMOST_COORDINATOR:-127.0.0.1:$(free_port)}
pids=()
stop() {
  kill "${pids[@]}" 2>/dev/null || return 0
  # JAX takes the signal as a notice of preemption and goes on.
  for ((tries = 0; tries < 10; tries++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.3
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}
trap 'stop; exit 130' INT TERM

for ((id = 0; id < count; id++)); do
  words=(env "ALMOST_COORDINATOR=$coordinator" "ALMOST_PROCESS_ID=$id" "ALMOST_NUM_PROCESSES=$count" "$@")
  if [[ $dry_run ]]; then
    printf '%s\n' "${words[*]@Q}"
  else
    "${words[@]}" > >(sed -u "s/^/[$id] /") 2>&1 &
    pids+=($!)
  fi
done
[[ -z $dry_run ]] || exit 0

for ((left = count; left > 0; left--)); do
  code=0
  wait -n -p ended "${pids[@]}" || code=$?
  for id in "${!pids[@]}"; do
    [[ ${pids[id]} != "$ended" ]] || break
  done
  unset "pids[id]"
  if ((code)); then
    say "process $id ended with exit code $code; the others are stopped"
    stop
    # Without bash's own word about each one killed.
    wait 2>/dev/null
    exit "$code"
  fi
done
