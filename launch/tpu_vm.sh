#!/usr/bin/env bash
# Run on one or several TPU slices as VMs: request, install, run, watch and delete them.
#
#   launch/tpu_vm.sh create  --name=N --project=P --zone=Z --type=v5litepod-64 --runtime=R
#                            --provision=on-demand|spot|reserved --install=WHAT [--slices=1]
#   launch/tpu_vm.sh run     --name=N --project=P --zone=Z [--slices=1] [--env=NAME=VALUE …]
#                            [--files='a.py data'] [--tries=5]
#                            -- train --config=… --workdir=gs://B/RUN
#   launch/tpu_vm.sh logs    --name=N --project=P --zone=Z [--lines=20] [--out=DIR]
#   launch/tpu_vm.sh stop    --name=N --project=P --zone=Z    save; the VMs stay
#   launch/tpu_vm.sh delete  --name=N --project=P --zone=Z    until then the VMs cost money
#   launch/tpu_vm.sh install --name=N --project=P --zone=Z --install=WHAT    change the version
#
#   --type       type of a slice; `vadapter plan` says which one a recipe needs
#   --runtime    software of the VMs, such as v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e
#   --slices     number of slices, joined by the data-center network; `run` adds
#                --config.mesh.slices
#   --provision  kind of capacity, which sets the price
#   --install    a pinned version for every host: 'vadapter[tpu,gs]==0.1', a local wheel
#                ('dist/vadapter-0.1-py3-none-any.whl[tpu,gs]'), or a commit
#                ('vadapter[tpu,gs] @ git+https://HOST/REPOSITORY@COMMIT'); the extra
#                gs is for buckets
#   --python     version of Python on the VMs (3.12)
#   --env        an environment variable of every host, such as VADAPTER_DATA=gs://B/data; may be
#                repeated; not for secrets, since it is readable on the hosts
#   --files      files such as recipes, copied to the home folder of every host, where the command
#                runs
#   --tries      consecutive starts without a new checkpoint, see supervise.sh
#   --lines      number of last lines of each host's log to print
#   --out        folder for the whole log of each host instead
#
# `create` waits until the slices exist; after an interruption `install` resumes it. Every host runs
# the same command under supervise.sh and writes ~/vadapter.log; RUN must be visible to all hosts.
# After a preemption the slice is gone: delete, create and run again, and training resumes.
# Not run on real hardware.
# https://cloud.google.com/tpu/docs/queued-resources, https://cloud.google.com/tpu/docs/multislice-introduction
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (create, ssh, scp)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verbs="create install run logs stop delete"
options="name project zone type runtime install slices provision python env files tries lines out"
verb=${1:-}
case " $verbs " in
  *" $verb "*) shift ;;
  *) [[ $verb == -h || $verb == --help ]] && parse --help; die "the first argument must be one of $verbs (see --help)" ;;
esac
parse "$@"
need name project zone
queue=(gcloud compute tpus queued-resources)
location=(--project="${opt[project]:-}" --zone="${opt[zone]:-}")

everywhere() {
  run "${queue[@]}" ssh "${opt[name]}" "${location[@]}" --node=all --worker=all "${@:2}" --command="$1"
}

copy() { run "${queue[@]}" scp --recurse "$@" "${opt[name]}:" "${location[@]}" --node=all --worker=all; }

create() {
  local slices=${opt[slices]:-1} nodes=(--node-id="${opt[name]}") provision=()
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="${opt[name]}")
  [[ ${opt[provision]} == on-demand ]] || provision=("--${opt[provision]}")
  run "${queue[@]}" create "${opt[name]}" "${location[@]}" "${nodes[@]}" \
    --accelerator-type="${opt[type]}" --runtime-version="${opt[runtime]}" "${provision[@]}"
}

await() {
  local now describe=("${queue[@]}" describe "${opt[name]}" "${location[@]}")
  local state=("${describe[@]}" --format='value(state.state)')
  if [[ $dry_run ]]; then
    echo "# every 30 s, until it prints ACTIVE:"
    quoted "${state[@]}"
    return
  fi
  until now=$("${state[@]}") && [[ $now == ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING)
        echo "the queued resource is $now; see: $(quoted "${describe[@]}")" >&2
        exit 1
        ;;
    esac
    echo "$(date +%T) $now"
    sleep 30
  done
}

# uv installs the requested Python, whatever version the VMs have.
uv=0.13.7
install() {
  local what=${opt[install]} file=${opt[install]%%[*} extra='' files=("$here/supervise.sh" "$here/common.sh")
  if [[ $file == *.whl && $file != *://* ]]; then
    [[ $what != *"["* ]] || extra="[${what#*[}"
    what=./$(basename "$file")$extra
    files+=("$file")
  fi
  copy "${files[@]}"
  everywhere "curl -LsSf https://astral.sh/uv/$uv/install.sh | sh && \
~/.local/bin/uv venv --quiet --clear --seed --python ${opt[python]:-3.12} ~/venv && \
~/venv/bin/pip install --quiet $(quoted "$what")"
}

start() {
  local files=() again env
  env=$(quoted VADAPTER_DISTRIBUTED=auto "${variables[@]}")
  if [[ ${opt[files]:-} ]]; then
    read -r -a files <<<"${opt[files]}"
    copy "${files[@]}"
  fi
  again=$(quoted ./supervise.sh --workdir="$run_dir" --tries="${opt[tries]:-5}" -- vadapter "${command[@]}")
  # JAX finds hosts and slices through the metadata of the VMs.
  everywhere "if kill -0 \$(cat vadapter.pid 2>/dev/null) 2>/dev/null; then echo already running >&2; exit 1; fi; \
export PATH=~/venv/bin:\$PATH $env; \
setsid nohup $again >>vadapter.log 2>&1 </dev/null & echo \$! >vadapter.pid"
  say_logs "vadapter.log in the home folder of every host: $(quoted "$here/tpu_vm.sh" logs --name="${opt[name]}" "${location[@]}")"
}

logs() {
  if [[ ${opt[out]:-} ]]; then
    run mkdir -p "${opt[out]}"
    everywhere "cat vadapter.log" --output-directory="${opt[out]}"
  else
    everywhere "echo \"== \$(hostname)\"; tail -n ${opt[lines]:-20} vadapter.log"
  fi
}

case $verb in
  create) need type runtime provision install ;;
  install) need install ;;
  run)
    need_command
    run_dir=$(workdir)
    [[ $run_dir || ${#command[@]} == 0 ]] || missing+=("--workdir=… after --, visible to all hosts")
    ;;
esac
complete
counts slices tries lines
case ${opt[provision]:-spot} in
  on-demand | spot | reserved) ;;
  *) die "--provision=${opt[provision]}: on-demand, spot or reserved" ;;
esac
case ${opt[install]:-==} in
  *==* | *.whl | *.whl\[*\] | *git+*@*) ;;
  *) die "--install=${opt[install]}: must be pinned: NAME==VERSION, a wheel, or git+…@COMMIT" ;;
esac

case $verb in
  create) create; await; install ;;
  install) await; install ;;
  run) add_slices; start ;;
  logs) logs ;;
  stop) everywhere "kill -TERM \$(cat vadapter.pid)" ;;
  delete) run "${queue[@]}" delete "${opt[name]}" "${location[@]}" --force --quiet ;;
esac
