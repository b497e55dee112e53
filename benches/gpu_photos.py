"""Three arms on real photos on one GPU, in ten minutes: `python -m benches.gpu_photos --help`.

The comparison of configs/flickr8k.py with public weights as the tiny language model and as the
frozen one, in bfloat16; then the time of a step of every arm and of stage 1, and its share of the
peak. VADAPTER_DATA is the folder of the photos, and `--lm` that of the weights (default:
HuggingFaceTB/SmolLM2-135M, from the hub).
"""

import argparse
import sys
from pathlib import Path

from benches.gpu import report, run

ARMS = ("vadapter", "perceiver", "mlp")
SHORT = "--config.dtype=bfloat16"


def jobs(lm: str, out: Path, batch: int, steps: int) -> dict[str, list[str]]:
    """Return name -> arguments of Python: the comparison first, then a benchmark of each step.

    Args:
      lm: weights of both language models.
      out: of the comparison.
      batch: images a step, in all stages.
      steps: of the arms and of stage 1.
    """
    base = f"base=flickr8k,llm={lm},tlm={lm},batch={batch},stage1_batch={batch}"
    base += f",steps={steps},stage1_steps={steps}"
    compare = f"--config=configs/compare.py:{base},arms={','.join(ARMS)},lr=0.5"
    found = {
        "comparison": ["-m", "vadapter", "compare", compare, "--seeds=1", f"--workdir={out}", SHORT]
    }
    for arm in ARMS:
        where = [f"--config=configs/ablations.py:{base},row={arm}", f"--stage={arm}"]
        found[arm] = ["-m", "benches.bench_step", *where, SHORT]
    where = [f"--config=configs/ablations.py:{base},row=vadapter", "--stage=decoder"]
    return found | {"stage 1": ["-m", "benches.bench_step", *where, SHORT]}


def main(argv: list[str] | None = None) -> int:
    """Print a JSON object per result and write DIR/gpu_photos.jsonl; return 1 if a job failed."""
    parser = argparse.ArgumentParser("gpu_photos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm", default="HuggingFaceTB/SmolLM2-135M", help="weights, id or folder")
    parser.add_argument("--batch", type=int, default=256, help="images a step (256)")
    parser.add_argument("--steps", type=int, default=300, help="of stage 1 and of an arm (300)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all jobs (9.5)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    planned = jobs(args.lm, args.out / "comparison", args.batch, args.steps)
    return report(run(planned, 60 * args.minutes), args.out / "gpu_photos.jsonl")


if __name__ == "__main__":
    sys.exit(main())
