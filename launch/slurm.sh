#!/usr/bin/env bash
# Run on GPUs through SLURM: one process per node or per GPU, restarted while that may help.
#
#   launch/slurm.sh --nodes=N --gpus=G --time=HH:MM:SS --partition=P --logs=DIR [--per=node]
#                   [--account=A] [--bin=ENV/bin] [--tries=5] -- train --config=… --workdir=RUN
#
#   --gpus     GPUs of a node
#   --per      node: one process with all GPUs of its node; gpu: one process for each GPU
#   --logs     folder for JOB.log, and JOB-PROCESS.log of every process, over all restarts
#   --bin      folder with the `vadapter` to run (default: found in PATH)
#   --tries    consecutive starts without a new checkpoint, see supervise.sh
#
# This folder, DIR and RUN must be on a file system that all nodes share. sbatch and srun pass the
# environment of the calling shell ($VADAPTER_DATA and so on) to all processes. The job restarts lost
# processes within its time limit. Five minutes before the limit it receives SIGTERM and saves; if
# there is a new checkpoint by then, it is requeued. `scancel --signal=TERM --batch JOB` does the
# same at once; `scancel JOB` ends it. Not run on real hardware.
# https://slurm.schedmd.com/sbatch.html (--signal, --requeue), https://slurm.schedmd.com/srun.html
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="nodes gpus time partition logs per account bin tries"
parse "$@"
need nodes gpus time partition logs
need_command
run_dir=$(workdir)
[[ $run_dir || ${#command[@]} == 0 ]] || missing+=("--workdir=… after --")
complete
counts nodes gpus tries
vadapter=${opt[bin]:+${opt[bin]}/}vadapter
# shellcheck disable=SC2016 # expanded in the job
case ${opt[per]:-node} in
  node) tasks=1 device='' ;;
  gpu) tasks=${opt[gpus]} device=' CUDA_VISIBLE_DEVICES=$SLURM_LOCALID' ;;
  *) die "--per=${opt[per]}: must be node or gpu" ;;
esac

# Prints the job script; $SLURM_… are expanded in the job.
script() {
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=vadapter
#SBATCH --nodes=${opt[nodes]}
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gpus-per-node=${opt[gpus]}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=${opt[time]}
#SBATCH --partition=${opt[partition]}${opt[account]:+
#SBATCH --account=${opt[account]}}
#SBATCH --output=${opt[logs]}/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
source $(quoted "$here/common.sh")
read -r first < <(scontrol show hostnames "\$SLURM_JOB_NODELIST")
export VADAPTER_COORDINATOR=\$first:\$((20000 + SLURM_JOB_ID % 20000))

# Starts all processes once. On SIGTERM srun would kill them; scancel lets them save.
start() {
  trap 'scancel --signal=TERM "\$SLURM_JOB_ID"' TERM
  srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none \\
    --output=$(quoted "${opt[logs]}/%j-%t.log") --open-mode=append bash -c \\
    'VADAPTER_PROCESSES=\$SLURM_NTASKS VADAPTER_PROCESS=\$SLURM_PROCID$device exec "\$@"' \\
    bash $(quoted "$vadapter" "${command[@]}") &
  hold \$!
}
export -f start hold

before=\$(reached $(quoted "$run_dir") | sort) stopping='' supervisor=''
trap 'stopping=1; [[ -z \$supervisor ]] || kill -TERM "\$supervisor"' TERM
$(quoted "$here/supervise.sh" --workdir="$run_dir" --tries="${opt[tries]:-5}" -- bash -c start) &
supervisor=\$!
[[ -z \$stopping ]] || kill -TERM "\$supervisor" # the signal came before
code=0
hold "\$supervisor" || code=\$?
case \$code in 0 | 2 | 77 | 78) exit "\$code" ;; esac # finished, or a user error
[[ \$stopping ]] || exit "\$code"
if [[ \$(comm -13 <(echo "\$before") <(reached $(quoted "$run_dir") | sort)) ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
else
  echo "no new checkpoint within --time=${opt[time]}: not requeued" >&2
fi
exit "\$code"
SCRIPT
}

if [[ $dry_run ]]; then
  run mkdir -p "${opt[logs]}"
  echo "sbatch <<'EOF'"
  script
  echo EOF
else
  mkdir -p "${opt[logs]}"
  script | sbatch
fi
say_logs "${opt[logs]}/JOB.log, and of every process ${opt[logs]}/JOB-PROCESS.log"
