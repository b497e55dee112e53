#!/usr/bin/env bash
# One GPU (or none), to debug: a small batch, a few steps, little compiling, the first NaN named.
#
#   launch/one_gpu.sh [--gpu=0] [--stage=S --batch=2 --steps=4] [--quick] [--nans]
#                     -- train --config=… --workdir=RUN
#
#   --gpu    which one; none: the CPU
#   --batch, --steps   of --stage, which they need; its learning rate is not warmed up
#   --quick  compiles with few optimizations: sooner ready, slower steps
#   --nans   stops at the operation that makes the first NaN, with its traceback (slow)
#
# Memory is taken as it is needed, so that nvidia-smi shows what a step takes. Not run on real hardware.
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
# So few steps are fewer than those of a recipe's warm-up.
[[ ! ${opt[steps]:-} ]] || overrides+=("--config.stages.${opt[stage]}.optim.warmup=0")
run env "${extra[@]}" vadapter "${command[@]}" "${overrides[@]}"
