#!/usr/bin/env bash
# Restart a command for as long as that may help.
#
#   launch/supervise.sh --workdir=RUN [--tries=5] [--pause=10] -- vadapter train …
#
#   --workdir  where checkpoints appear: a folder, or gs://… (listed with `gcloud storage ls`)
#   --tries    give up after so many consecutive starts without a new checkpoint or finished stage
#   --pause    seconds before a restart, doubled each time there was no progress, at most 300
#
# Exit codes 0, 2, 77 and 78 of vadapter (finished, or a user error) and 130 (Ctrl-C) end it. 75
# (stopped and saved), 1 (a host lost or hung) and deaths by a signal (134, 137, …) restart it. A
# SIGTERM or Ctrl-C is passed on to the command, which is then not restarted.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="workdir tries pause"
parse "$@"
need workdir
((${#command[@]})) || missing+=("-- COMMAND")
complete
counts tries
[[ ${opt[pause]:-0} =~ ^[0-9]+$ ]] || die "--pause=${opt[pause]}: must be seconds"
tries=${opt[tries]:-5} pause=${opt[pause]:-10}

say() { echo "supervise: $*" >&2; }

# Succeeds if there is a checkpoint or finished stage that was never there before: one that was
# deleted and written again does not count.
declare -A seen=()
progress() {
  local line new=1
  while read -r line; do
    if [[ $line && ! ${seen[$line]:-} ]]; then seen[$line]=1 new=0; fi
  done < <(reached "${opt[workdir]}")
  return "$new"
}

stopped_by='' child=''
forward() {
  stopped_by=$1
  [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}

if [[ $dry_run ]]; then run "${command[@]}"; exit; fi
trap 'forward TERM' TERM
trap 'forward INT' INT
left=$tries wait=$pause
progress || true
while :; do
  # Its own group, so that Ctrl-C at the terminal arrives once, through `forward`.
  set -m; "${command[@]}" & child=$!; set +m
  [[ -z $stopped_by ]] || forward "$stopped_by" # the signal came while there was no child
  code=0; hold "$child" || code=$?
  child=''
  if [[ $stopped_by ]]; then say "stopped by SIG$stopped_by"; exit "$code"; fi
  case $code in
    1 | 75 | 12[89] | 13[1-9] | 14[0-9] | 1[5-9]? | 2??) ;;
    *) exit "$code" ;;
  esac
  if progress; then
    left=$tries wait=$pause
  elif ((--left == 0)); then
    say "exit code $code after $tries starts without a new checkpoint: giving up"
    exit "$code"
  fi
  say "exit code $code: restarting in $wait s"
  sleep "$wait" & child=$!
  [[ -z $stopped_by ]] || kill "$child" 2>/dev/null || true # the signal came before there was this child
  wait "$child" || true
  kill "$child" 2>/dev/null || true
  child=''
  if [[ $stopped_by ]]; then say "stopped by SIG$stopped_by"; exit "$code"; fi
  wait=$((wait * 2 > 300 ? 300 : wait * 2))
done
