#!/usr/bin/env bash
# Run several processes on this machine as one job, to try out a pod or to use a GPU each.
#
#   launch/local.sh --processes=2 --devices=2 [--logs=DIR] -- train --config=… --workdir=RUN
#   launch/local.sh --processes=4 --gpus -- train --config=… --workdir=RUN
#
#   --processes  number of processes
#   --devices    simulated CPU devices of each process
#   --gpus       use GPU I for process I instead
#   --logs       folder for host-I.log (default: RUN/logs); the lines are printed too
#
# Ctrl-C and SIGTERM are sent to all processes. The exit code is that of the first one that failed.
# No process outlives the script. To restart after failures:
#   launch/supervise.sh --workdir=RUN -- launch/local.sh … -- train …
# Tested on CPUs; --gpus has not been run on real hardware.
# https://docs.jax.dev/en/latest/multi_process.html
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="processes devices gpus logs"
parse "$@"
need processes
[[ ${opt[devices]:-} || ${opt[gpus]:-} ]] || missing+=("--devices=… (or --gpus)")
need_command
run_dir=$(workdir)
[[ $run_dir != *://* ]] || run_dir='' # logs cannot be appended in a bucket
logs=${opt[logs]:-${run_dir:+$run_dir/logs}}
[[ $logs || ${#command[@]} == 0 ]] || missing+=("--logs=… (--workdir is not a local folder)")
complete
counts processes devices
n=${opt[processes]}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Sets `host_env` to the variables of process $1.
environment() {
  host_env=("VADAPTER_COORDINATOR=127.0.0.1:$port" "VADAPTER_PROCESSES=$n" "VADAPTER_PROCESS=$1")
  if [[ ${opt[gpus]:-} ]]; then
    host_env+=("CUDA_VISIBLE_DEVICES=$1")
  else
    local flags="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${opt[devices]}"
    host_env+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${flags# }")
  fi
}

if [[ $dry_run ]]; then
  port=PORT
  for ((i = 0; i < n; i++)); do
    environment "$i"
    run env "${host_env[@]}" vadapter "${command[@]}"
  done
  say_logs "$logs/host-0.log to $logs/host-$((n - 1)).log"
  exit
fi

port=$(free_port)
mkdir -p "$logs"
pipes=$(mktemp -d)
children=() writers=()
forward() { for pid in "${children[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
# Kills what is left of the processes and their children: each process leads its own group.
kill_groups() { for pid in "${children[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done; }
stopped_by=''
trap 'stopped_by=TERM; forward TERM' TERM
trap 'stopped_by=INT; forward INT' INT
trap 'kill_groups; rm -rf "$pipes"' EXIT
say_logs "$logs/host-0.log to $logs/host-$((n - 1)).log"

set -m # own groups, so that Ctrl-C at the terminal arrives once, through `forward`
for ((i = 0; i < n; i++)); do
  environment "$i"
  mkfifo "$pipes/$i"
  tee -a "$logs/host-$i.log" <"$pipes/$i" | sed -u "s/^/host $i: /" &
  writers+=($!)
  env "${host_env[@]}" vadapter "${command[@]}" >"$pipes/$i" 2>&1 </dev/null &
  children+=($!)
done
set +m
[[ -z $stopped_by ]] || forward "$stopped_by" # processes that started after the signal

first=0 waiting=("${children[@]}")
while ((${#waiting[@]})); do
  alive=()
  for pid in "${waiting[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
    else
      code=0
      wait "$pid" || code=$?
      ((first)) || first=$code
    fi
  done
  waiting=("${alive[@]}")
  sleep 0.2
done
kill_groups # closes the pipes
wait "${writers[@]}" || true
exit "$first"
