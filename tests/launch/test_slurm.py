"""The job of launch/slurm.sh, with commands that stand in for SLURM's own."""

import os
import signal
import subprocess

import pytest
from support.launchers import kill_session, launch, put

from vadapter.errors import PREEMPTED, USER_ERROR

JOB = 20123
# Keeps what it is given as the script of the job.
SBATCH = 'cat >"$RUN/job.sh"'
SCONTROL = """
case $1 in
  show) echo node-a; echo node-b ;;
  requeue) echo "$2" >>"$RUN/requeued" ;;
esac
"""
# Two tasks; as srun does, it kills them when it gets a SIGTERM, and takes the highest exit code.
SRUN = """
while [[ $1 == --* ]]; do shift; done
tasks=()
for i in 0 1; do
  SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks+=($!)
done
trap 'kill -KILL "${tasks[@]}"' TERM
echo "${tasks[@]}" >"$RUN/tasks"
worst=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  ((code <= worst)) || worst=$code
done
exit "$worst"
"""
SCANCEL = """
[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] || exit 1
read -r -a tasks <"$RUN/tasks"
kill -TERM "${tasks[@]}"
"""
# Line by line, what each start does: ends with a code, or waits for a SIGTERM, saves a step and
# ends with 75 or another code.
VADAPTER = """
i=$VADAPTER_PROCESS
told="$VADAPTER_COORDINATOR $VADAPTER_PROCESSES $i ${CUDA_VISIBLE_DEVICES-all}"
echo "$told $*" >>"$RUN/starts-$i"
read -r what step code < <(sed -n "$(wc -l <"$RUN/starts-$i")p" "$RUN/plan")
[[ $what == wait ]] || exit "$what"
trap 'mkdir -p "$RUN/stage/checkpoints/$step"; exit "${code:-75}"' TERM
echo ready >"$RUN/ready-$i"
while :; do sleep 0.05; done
"""
# No pause between two starts.
SLEEP = """
[[ $1 == 10 ]] || exec /bin/sleep "$@"
"""


@pytest.fixture
def submit(tmp_path):
    """Return a function that starts the job and waits for its tasks, and the run directory."""
    run, jobs = tmp_path / "run", []
    run.mkdir()
    path = put(
        tmp_path / "bin", sbatch=SBATCH, scontrol=SCONTROL, srun=SRUN, scancel=SCANCEL,
        vadapter=VADAPTER, sleep=SLEEP,
    )  # fmt: skip
    os.mkfifo(run / "ready-0")
    os.mkfifo(run / "ready-1")

    def begin(*plan, options=()):
        (run / "plan").write_text("".join(f"{line}\n" for line in plan))
        given = ("--nodes=2", "--gpus=1", "--time=1:00", "--partition=p", f"--logs={run}/logs")
        done = launch("slurm.sh", *given, *options, "--", "train", f"--workdir={run}",
                      PATH=path, RUN=str(run))  # fmt: skip
        assert f"logs: {run}/logs/JOB.log, and of every process " in done.stderr
        env = {**os.environ, "PATH": path, "RUN": str(run), "SLURM_JOB_ID": str(JOB)}
        with open(run / "said", "w") as said:
            job = subprocess.Popen(
                ["bash", str(run / "job.sh")], env={**env, "SLURM_JOB_NODELIST": "node-[a-b]"},
                stderr=said, start_new_session=True,
            )  # fmt: skip
        jobs.append(job)
        for i in (0, 1) if plan[-1].startswith("wait") else ():
            (run / f"ready-{i}").read_text()
        return job

    yield begin, run
    for job in jobs:
        kill_session(job)
        job.wait()


def stop(job):
    """What SLURM does before the time of a job is up; its exit code."""
    job.send_signal(signal.SIGTERM)
    return job.wait(timeout=60)


def starts(run, i):
    return (run / f"starts-{i}").read_text().splitlines()


def test_every_process_has_the_coordinator_and_a_lost_job_restarts(submit):
    begin, run = submit
    assert begin("1", "0").wait(timeout=60) == 0
    assert (run / "said").read_text() == "supervise: exit code 1: restarting in 10 s\n"
    for i in (0, 1):
        told = f"node-a:{20000 + JOB % 20000} 2 {i} all train --workdir={run}"
        assert starts(run, i) == [told, told]
    assert not (run / "requeued").exists()


def test_a_process_for_each_gpu_has_it_to_itself(submit):
    begin, run = submit
    assert begin("0", options=("--per=gpu",)).wait(timeout=60) == 0
    assert [starts(run, i)[0].split()[2:4] for i in (0, 1)] == [["0", "0"], ["1", "1"]]


def test_a_user_error_ends_the_job(submit):
    begin, run = submit
    assert begin(str(USER_ERROR), "0").wait(timeout=60) == USER_ERROR
    assert len(starts(run, 0)) == 1
    assert not (run / "requeued").exists()


def test_before_its_time_limit_a_job_saves_and_is_queued_again(submit):
    begin, run = submit
    assert stop(begin("wait 7")) == PREEMPTED
    assert (run / "said").read_text() == "supervise: stopped by SIGTERM\n"
    assert (run / "requeued").read_text() == f"{JOB}\n"


def test_a_finished_job_is_not_queued_again(submit):
    begin, run = submit
    assert stop(begin("wait 7 0")) == 0
    assert not (run / "requeued").exists()


def test_without_a_new_checkpoint_it_does_not_go_back(submit):
    begin, run = submit
    (run / "stage/checkpoints/7").mkdir(parents=True)
    assert stop(begin("wait 7")) == PREEMPTED
    told = "no new checkpoint within --time=1:00: not requeued\n"
    assert (run / "said").read_text().endswith(told)
    assert not (run / "requeued").exists()
