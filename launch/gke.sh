#!/usr/bin/env bash
# Run on TPU slices of a GKE cluster, as a JobSet: a Job for each slice, restarted together.
#
#   launch/gke.sh --context=C --namespace=S --account=A --name=N --image=REGISTRY/IMAGE:TAG
#                 --accelerator=tpu-v5-lite-podslice --topology=8x8 --hosts=16 --chips=4
#                 --restarts=R [--slices=1] [--env=NAME=VALUE …]
#                 -- train --config=… --workdir=gs://B/RUN
#
#   --context    kubectl context of the cluster (`kubectl config get-contexts`)
#   --namespace, --account   of the cluster; the service account may read and write the bucket
#   --image      built from launch/Dockerfile with --build-arg EXTRA=tpu, with your recipes in it
#   --accelerator, --topology   labels of the node pools: one pool a slice
#   --hosts      machines of a slice; --chips  TPU chips of a machine
#   --slices     number of slices, joined by the data-center network; adds --config.mesh.slices
#   --restarts   how often the JobSet may restart, with or without progress
#   --env        an environment variable of every pod, such as VADAPTER_DATA=gs://B/data; may be
#                repeated; not for secrets, since it is readable in the cluster
#
# Runs `kubectl apply`; with --dry-run it prints the YAML and the command. Exit codes 2, 77 and 78
# end the JobSet; any other failure of a pod restarts all of it, so supervise.sh is not needed.
# `kubectl delete jobset N` sends SIGTERM, which saves a checkpoint. Not run on real hardware.
# https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="context namespace account name image accelerator topology hosts chips restarts slices env"
parse "$@"
need context namespace account name image accelerator topology hosts chips restarts
need_command
if [[ ${command[0]:-} == train && $(workdir) != gs://* ]]; then
  missing+=("--workdir=gs://… after --, because a pod keeps no files")
fi
complete
counts hosts chips slices restarts
for key in name namespace account; do
  [[ ${opt[$key]} =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "--$key=${opt[$key]}: must consist of lowercase letters, digits and -"
done
add_slices
opt[slices]=${opt[slices]:-1}
kubectl=(kubectl --context="${opt[context]}")

# Prints a string as JSON, which is also YAML.
json() {
  local text=$1
  text=${text//\\/\\\\} text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

yaml() {
  local text args='' env='' word
  text=$(<"$here/jobset.yaml")
  for word in "${variables[@]}"; do
    env+=$'\n'"                    - {name: $(json "${word%%=*}"), value: $(json "${word#*=}")}"
  done
  for word in "${command[@]}"; do args+="${args:+, }$(json "$word")"; done
  shopt -u patsub_replacement 2>/dev/null || true # since bash 5.2 a & would be replaced by the key
  for key in name namespace accelerator topology hosts chips restarts slices account; do
    text=${text//@$key@/${opt[$key]}}
  done
  text=${text//@image@/$(json "${opt[image]}")}
  text=${text//@env@/$env}
  echo "${text//@args@/[$args]}"
}

if [[ $dry_run ]]; then
  yaml
  echo "# to: $(quoted "${kubectl[@]}" apply -f -)"
else
  yaml | "${kubectl[@]}" apply -f -
fi
say_logs "$(quoted "${kubectl[@]}" logs -f --namespace="${opt[namespace]}" --prefix --max-log-requests=1000 \
  -l "jobset.sigs.k8s.io/jobset-name=${opt[name]}"); for deleted pods: Cloud Logging"
