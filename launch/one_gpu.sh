#!/usr/bin/env bash
# Debug on one GPU or on the CPU: a small batch, a few steps, fast compilation, errors at NaNs.
#
#   launch/one_gpu.sh [--gpu=0] [--stage=S --batch=2 --steps=4] [--quick] [--nans]
#                     -- train --config=… --workdir=RUN
#
#   --gpu    index of the GPU; none: use the CPU
#   --batch, --steps   of --stage, which is then required; --steps also sets warmup to 0
#   --quick  compile with few optimizations: a faster start, slower steps
#   --nans   stop at the operation that produces the first NaN, with its traceback (slow)
#
# Memory is allocated on demand, so that nvidia-smi shows what a step needs. Not run on real hardware.
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
# https://docs.jax.dev/en/latest/debugging/flags.html
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="gpu batch steps stage quick nans"
parse "$@"
need_command
if [[ ${opt[batch]:-} || ${opt[steps]:-} ]]; then need stage; fi
complete
counts batch steps
extra=(XLA_PYTHON_CLIENT_PREALLOCATE=false)
if [[ ${opt[gpu]:-0} == none ]]; then
  extra+=(JAX_PLATFORMS=cpu)
else
  extra+=("CUDA_VISIBLE_DEVICES=${opt[gpu]:-0}")
fi
[[ ! ${opt[quick]:-} ]] || extra+=(JAX_DISABLE_MOST_OPTIMIZATIONS=1)
[[ ! ${opt[nans]:-} ]] || extra+=(JAX_DEBUG_NANS=1)
overrides=()
for key in batch steps; do
  [[ ! ${opt[$key]:-} ]] || overrides+=("--config.stages.${opt[stage]}.$key=${opt[$key]}")
done
# A recipe's warmup may be longer than so few steps.
[[ ! ${opt[steps]:-} ]] || overrides+=("--config.stages.${opt[stage]}.optim.warmup=0")
run env "${extra[@]}" vadapter "${command[@]}" "${overrides[@]}"
