"""Rows of a first caption: the whole process `vadapter caption`, beside a BLIP of equal size.

The run is the quickstart's recipe after a few steps, so that its words mean nothing; both sides
write at most 32 tokens.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.bench_input import photos
from benches.peer import blip
from benches.peer.measure import Options, alternate, cpu_of_all, summary

ROUNDS = 5
# The stages that the last one needs; only what is frozen there must come from another stage.
STAGES = ("llm", "vision", "vadapter")
OVERRIDES = (
    f"chain={','.join(STAGES)}", "stages.vadapter.start={'encoder':'vision','llm':'llm'}",
    *(f"stages.{stage}.loss=()" for stage in ("llm", "vadapter")), "stages.vadapter.evals=()",
)  # fmt: skip


def measure(options: Options, *, cold: bool) -> dict[str, Any]:
    """Return the times of whole processes, in CPU seconds of all their threads.

    Args:
      cold: with an empty compilation cache; else with that of an earlier caption.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (image,) = photos(folder / "image", 1)
        blip.make(folder / "blip")
        ours = Caption(folder, image, cold)
        sides = {
            "ours": ours,
            "transformers": lambda: _run([sys.executable, "-m", "benches.peer.blip",
                                          str(folder / "blip"), str(image)]),
        }  # fmt: skip
        for run in sides.values():
            run()
        times = alternate(sides, min(options.rounds, ROUNDS), calls=1, clock=cpu_of_all)
    state = "empty compilation cache" if cold else "captioned before"
    return {"what": f"1 image, {state}", "same": "equal sizes", "sides": summary(times)}


class Caption:
    """`vadapter caption` of one image; when cold, with a new compilation cache every time."""

    def __init__(self, folder: Path, image: Path, cold: bool):
        self.folder, self.image, self.cold = folder, image, cold
        self.caches = 0
        overrides = [f"--config.{item}" for item in OVERRIDES]
        self._vadapter("train", "--config=configs/quickstart.py:scale=0.01,weights=",
                       f"--workdir={folder / 'run'}", *overrides)  # fmt: skip
        self.caches += 1

    def _vadapter(self, *words: str) -> None:
        cache = self.folder / f"compiled{self.caches}"
        _run([sys.executable, "-m", "vadapter", *words], VADAPTER_COMPILE_CACHE=str(cache))

    def __call__(self) -> None:
        self.caches += self.cold
        self._vadapter("caption", str(self.folder / "run"), str(self.image))


def _run(command: list[str], **variables: str) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
