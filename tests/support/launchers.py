"""Launchers in processes of their own, where neither clouds nor clusters are.

    done = launch("gke.sh", "--dry-run", *GKE, *TRAIN)

`put` makes commands that stand in for those of a cloud or a cluster.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from support.paths import ROOT

LAUNCH = ROOT / "launch"
TRAIN = ("--", "train", "--config=configs/paper.py:stage=2,encoder=l", "--workdir=gs://bucket/run")
VM = ("--name=pod", "--project=p-1", "--zone=us-west4-a")
SLICE = ("--type=v5litepod-64", "--runtime=v2-alpha-tpuv5-lite", "--provision=spot",
         "--install=vadapter[tpu,gs]==0.1")  # fmt: skip
GKE = ("--context=gke_p-1_us-west4_c", "--namespace=ml", "--account=trainer", "--name=pod",
       "--image=reg.io/p/vadapter:tpu", "--accelerator=tpu-v5-lite-podslice", "--topology=8x8",
       "--hosts=16", "--chips=4", "--restarts=20")  # fmt: skip
SLURM = ("--nodes=4", "--gpus=8", "--time=24:00:00", "--partition=gpu", "--logs=/shared/logs")


def launch(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **env},
    )  # fmt: skip


def dry_run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same with --dry-run among its options."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return launch(script, *arguments[:at], "--dry-run", *arguments[at:])


def put(folder: Path, **scripts: str) -> str:
    """Write commands in bash, by name; returns a PATH that begins with them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def session_members(session: int) -> list[str]:
    """Return `pid command` of every live process of a session, read from /proc (no `ps` needed)."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid, _, rest = path.read_text().partition(" (")
            name, _, rest = rest.rpartition(") ")
            state, _, _, sid = rest.split()[:4]
            if int(sid) == session and state != "Z":
                members.append(f"{pid} {name}")
    return members


def kill_session(process: subprocess.Popen) -> None:
    """Kill whatever is left of the session that a process leads."""
    for member in session_members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(member.split()[0]), signal.SIGKILL)
