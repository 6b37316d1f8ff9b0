#!/usr/bin/env bash
# Runs several JAX processes on this machine, joined into one run: to try a multi-host program
# without a cluster, or to give every GPU of a machine its own process.
#
#   launch/local_processes.sh 2 -m kd_jax.main --config=configs/quickstart.py
#
# The first argument is the number of processes, the others go to `python` as they are, followed by
# --coordinator, --process_id and --process_count. Processes run on the CPU unless JAX_PLATFORMS
# says otherwise; with JAX_PLATFORMS=cuda process i gets GPU i.
#
# Lines are printed with the number of their process in front. SIGTERM and Ctrl-C are passed on: all
# processes save a checkpoint and leave, and the same command continues. The exit status is that of
# the last process that failed, else 0. The variable PYTHON names another interpreter.
set -euo pipefail

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NUMBER_OF_PROCESSES PYTHON_ARGUMENTS..." >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')

pids=()
for ((i = 0; i < count; i++)); do
  if [[ $JAX_PLATFORMS == cuda* ]]; then
    export CUDA_VISIBLE_DEVICES=$i
  fi
  "$python" "$@" --coordinator="127.0.0.1:$port" --process_id="$i" --process_count="$count" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended `wait`, not the process
    code=0
    wait "$pid" || code=$?
  done
  ((code == 0)) || status=$code
done
exit "$status"
