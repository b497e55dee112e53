"""Several processes on this machine as the hosts of one run.

    job = Job(folder, recipe, n=2)
    assert job.start().wait() == [0, 0]
    assert "resumed" in job.log(0)

Each host has two devices, so that arrays are split within hosts and between them.
"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from support import runs
from support.xla_flags import xla_flags

DEVICES = 2
DEADLINE = 60  # seconds; heartbeats are lost after a third of it
MARGIN = 20  # seconds, for a busy machine, on top of whatever ends a host
FLAGS = xla_flags(DEVICES)
LIMIT = 240  # seconds until a job is taken to hang: far more than any deadline in the tests

# What a script begins with that takes part in `Job.start(detected=True)`: JAX finds its job.
CLUSTER = """
import os
from jax._src.clusters import ClusterEnv
class Cluster(ClusterEnv):
    name = "test"
    @classmethod
    def is_env_present(cls):
        return True
    @classmethod
    def get_coordinator_address(cls, timeout_secs, override_coordinator_port):
        return os.environ["CLUSTER_COORDINATOR"]
    @classmethod
    def get_process_count(cls):
        return int(os.environ["CLUSTER_PROCESSES"])
    @classmethod
    def get_process_id(cls):
        return int(os.environ["CLUSTER_PROCESS"])
ClusterEnv._cluster_types[:] = [Cluster]
"""


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Watcher(threading.Thread):
    """Notes when a process ends, whatever else is waited for meanwhile."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self._process, self._end = process, 0.0
        self.start()

    def run(self) -> None:
        self._process.wait()
        self._end = time.time()

    def end(self) -> float:
        self.join()
        return self._end


class Job:
    """A run on several hosts.

    Args:
      folder: for the logs, and the run directory, `run`.
      recipe: file of the recipe, from `runs.write_recipe`.
      n: hosts.
      overrides: `a.b=VALUE`, of the recipe.
    """

    def __init__(self, folder: Path, recipe: Path, *overrides: str, n: int = 2):
        self.folder, self.recipe, self.n, self.overrides = folder, recipe, n, overrides
        self.workdir = folder / "run"
        self.processes: list[subprocess.Popen] = []
        self.hosts: tuple[int, ...] = ()  # that were started
        self.last = 0.0  # when the last of the hosts that `wait` waited for had ended
        self._watchers: list[_Watcher] = []
        folder.mkdir(parents=True, exist_ok=True)

    def _train(self, workdir: Path, own: tuple[str, ...]) -> tuple[str, ...]:
        items = [f"--config.{item}" for item in (*self.overrides, *own)]
        return (*runs.VADAPTER, "train", f"--config={self.recipe}", f"--workdir={workdir}", *items)

    def start(
        self,
        *,
        command: tuple[str, ...] = (),
        faults: Mapping[int, str] = {},
        own: Mapping[int, tuple[str, ...]] = {},
        workdirs: Mapping[int, Path] = {},
        variables: Mapping[int, Mapping[str, str]] = {},
        only: tuple[int, ...] = (),
        detected: bool = False,
        deadline: float = DEADLINE,
        **env: str,
    ) -> "Job":
        """Start `vadapter train`, or another command, on every host.

        Args:
          faults: host -> its fault, see `support.faults`.
          own: host -> overrides of this one alone; workdirs: host -> its run directory.
          variables: host -> variables of this one alone.
          only: hosts to start; the others stay away. (): all.
          detected: JAX is to find the job itself; the command begins with `CLUSTER`.
          deadline: VADAPTER_DEADLINE; env: other variables of all.
        """
        port, self.hosts = free_port(), only or tuple(range(self.n))
        told = "CLUSTER" if detected else "VADAPTER"
        for i in self.hosts:
            joined = {
                f"{told}_COORDINATOR": f"127.0.0.1:{port}",
                f"{told}_PROCESSES": str(self.n),
                f"{told}_PROCESS": str(i),
                "VADAPTER_DISTRIBUTED": "auto" if detected else "",
                "VADAPTER_DEADLINE": str(deadline),
                "XLA_FLAGS": FLAGS,
                **env,
                **variables.get(i, {}),
            }
            with open(self.folder / f"host-{i}.log", "w") as log:
                self.processes.append(
                    runs.launch(
                        command or self._train(workdirs.get(i, self.workdir), own.get(i, ())),
                        fault=faults.get(i, ""),
                        more=joined,
                        stdout=log,
                    )
                )
            self._watchers.append(_Watcher(self.processes[-1]))
        return self

    def wait(self, only: tuple[int, ...] = ()) -> list[int]:
        """Wait until all hosts that were started, or these, have ended; their exit codes."""
        try:
            chosen = only or range(len(self.processes))
            codes = [self.processes[i].wait(timeout=LIMIT) for i in chosen]
            self.last = max(self._watchers[i].end() for i in chosen)
            return codes
        finally:
            self.stop()

    def took(self, mark: Path) -> float:
        """Seconds from when that file was last written until the last of them had ended."""
        return self.last - mark.stat().st_mtime

    def stop(self) -> None:
        """Kill what is left of it."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        self.processes, self._watchers = [], []

    def log(self, host: int) -> str:
        """Both streams of a host."""
        return (self.folder / f"host-{host}.log").read_text()

    def logs(self) -> str:
        """Of all hosts, for messages of assertions."""
        paths = sorted(self.folder.glob("host-*.log"))
        return "\n".join(f"--- {path.stem}\n{path.read_text()}" for path in paths)


def run_python(script: str, *arguments: str, n: int = 2, deadline: float = DEADLINE) -> list[str]:
    """Run a script on several hosts, after `hosts.start()`; return what each of them prints.

    Lines of XLA's own log, such as those of jax 0.10.0 about cached programs, are left out.
    """
    port = free_port()
    begin = "from vadapter.distributed import hosts\nhosts.start()\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", begin + script, *arguments],
            env=runs.environment(
                DEVICES, VADAPTER_COORDINATOR=f"127.0.0.1:{port}", VADAPTER_PROCESSES=str(n),
                VADAPTER_PROCESS=str(i), VADAPTER_DEADLINE=str(deadline),
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(n)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
        return [re.sub(r"^[EWI]\d{4} .*\n", "", text, flags=re.MULTILINE) for text in printed]
    finally:
        for process in processes:
            process.kill()
