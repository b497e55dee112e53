# Shared by the launchers, which source it: options, --dry-run, quoting, progress of a run.
#
# A launcher sets `options` (the names of all its options) and calls `parse "$@"`. Then ${opt[name]}
# is the value of --name=…, `variables` are the values of all --env=…, and `command` is everything
# after `--`: a verb of vadapter and its arguments.
# shellcheck shell=bash disable=SC2034,SC2154 # its callers read what it sets, and set `options`
set -euo pipefail

declare -A opt=()
variables=()
command=()
missing=()
dry_run=
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

parse() {
  local key
  while (($#)); do
    case $1 in
      --) shift; command=("$@"); return ;;
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=1 ;;
      --*)
        key=${1%%=*} key=${key#--}
        [[ " $options " == *" $key "* ]] || die "--$key: unknown option; the options are: $options"
        if [[ $1 == *=* ]]; then opt[$key]=${1#*=}; else opt[$key]=1; fi
        if [[ $key == env ]]; then
          [[ ${opt[env]} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "$1: must be --env=NAME=VALUE"
          variables+=("${opt[env]}")
        fi
        ;;
      *) die "$1: options are --name=value; the vadapter command follows --" ;;
    esac
    shift
  done
}

# -- required options: collected, and reported together by `complete` --------------------------

need() {
  local name
  for name in "$@"; do [[ ${opt[$name]:-} ]] || missing+=("--$name=…"); done
}

need_command() { ((${#command[@]})) || missing+=("-- train --config=… --workdir=…"); }

complete() { ((${#missing[@]} == 0)) || die "missing: ${missing[*]} (see --help)"; }

# Checks options that are counts, if they are given.
counts() {
  local name
  for name in "$@"; do
    [[ ! ${opt[$name]:-} || ${opt[$name]} =~ ^[1-9][0-9]*$ ]] ||
      die "--$name=${opt[$name]}: must be a number above 0"
  done
}

# -- the command ---------------------------------------------------------------------------------

# Prints the run directory of the command; nothing if it has none.
workdir() {
  local i word
  for ((i = 0; i < ${#command[@]}; i++)); do
    word=${command[i]}
    if [[ $word == --workdir=* ]]; then echo "${word#--workdir=}"; fi
    if [[ $word == --workdir ]]; then echo "${command[i + 1]:-}"; fi
  done
}

# Adds the number of slices to the recipe, unless the command sets it.
add_slices() {
  local word
  ((${opt[slices]:-1} > 1)) || return 0
  for word in "${command[@]}"; do [[ $word != --config.mesh.slices=* ]] || return 0; done
  command+=("--config.mesh.slices=${opt[slices]}")
}

# Prints words quoted for a shell.
quoted() {
  local word out=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=("$word"); else out+=("${word@Q}"); fi
  done
  printf '%s\n' "${out[*]}"
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# Prints where the logs of all hosts are.
say_logs() {
  if [[ $dry_run ]]; then echo "# logs: $*"; else echo "logs: $*" >&2; fi
}

# Waits for a child and returns its exit code; a trapped signal ends `wait`, but not the child.
hold() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1"
}

# -- progress of a run -----------------------------------------------------------------------------

# Prints every checkpoint and finished stage of a run directory, one per line. A checkpoint that is
# still being written does not count: its folder has another name, or in a bucket no last file yet.
reached() {
  case $1 in
    gs://*)
      gcloud storage ls "$1/*/checkpoints/*/commit_success.txt" 2>/dev/null || true
      gcloud storage ls "$1/*/done.json" 2>/dev/null || true
      ;;
    *)
      find "$1" -mindepth 2 -maxdepth 3 \
        \( -name done.json -o -path '*/checkpoints/*' -name '[0-9]*' -not -name '*[!0-9]*' \) \
        2>/dev/null || true
      ;;
  esac
}
