#!/usr/bin/env bash
# Runs a command again for as long as that may help.
#
#   launch/supervise.sh --workdir=RUN [--tries=5] [--pause=10] -- vadapter train …
#
#   --workdir  where checkpoints appear: a folder, or gs://… (asked with `gcloud storage ls`)
#   --tries    starts in a row that leave no new checkpoint or finished stage; then it gives up
#   --pause    seconds before another start, doubled each time without progress, at most 300
#
# Exit codes of vadapter: 0, 2, 77 and 78 end it (finished, or something to mend), and so does 130
# (Ctrl-C). 75 (stopped and saved), 1 (a host lost or hung) and deaths by a signal (134, 137, …)
# start it again. A SIGTERM or Ctrl-C to the supervisor goes to the command, which is not started
# again after it.
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

# Whether there is a checkpoint or a finished stage that was never seen before: one that was thrown
# away and made once more does not count.
declare -A seen=()
progress() {
  local line new=1
  while read -r line; do
    if [[ $line && ! ${seen[$line]:-} ]]; then seen[$line]=1 new=0; fi
  done < <(reached "${opt[workdir]}")
  return "$new"
}

asked='' child=''
forward() {
  asked=$1
  [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}

if [[ $dry_run ]]; then run "${command[@]}"; exit; fi
trap 'forward TERM' TERM
trap 'forward INT' INT
left=$tries wait=$pause
progress || true
while :; do
  # A group of its own: Ctrl-C at the terminal comes once, through `forward`.
  set -m; "${command[@]}" & child=$!; set +m
  [[ -z $asked ]] || forward "$asked" # it came while there was no child
  code=0; hold "$child" || code=$?
  child=''
  if [[ $asked ]]; then say "stopped by SIG$asked"; exit "$code"; fi
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
  say "exit code $code: again in $wait s"
  sleep "$wait" & child=$!
  [[ -z $asked ]] || kill "$child" 2>/dev/null || true # it came before there was this child
  wait "$child" || true
  kill "$child" 2>/dev/null || true
  child=''
  if [[ $asked ]]; then say "stopped by SIG$asked"; exit "$code"; fi
  wait=$((wait * 2 > 300 ? 300 : wait * 2))
done
