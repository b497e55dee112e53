"""The benchmarks by name, and the two ways in: a source to score, and questions for prompts."""

from pathlib import Path

from vadapter.config import nearest
from vadapter.data.benchmarks import (
    coco,
    daquar,
    flickr8k,
    ivqa,
    msrvtt,
    msrvtt_qa,
    msvd_qa,
    okvqa,
    textvqa,
    vatex,
    vizwiz,
    vqav2,
)
from vadapter.data.benchmarks.benchmark import Benchmark
from vadapter.data.benchmarks.source import BenchmarkSource, check
from vadapter.data.example import Question
from vadapter.errors import ConfigError

_MODULES = (coco, msrvtt, vatex, vqav2, textvqa, vizwiz, okvqa, msrvtt_qa, msvd_qa, ivqa)
_MODULES += (flickr8k, daquar)

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
      ConfigError: there is none; tells the nearest.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"benchmark {name!r}: unknown{nearest(name, BENCHMARKS)}; "
            f"there are {', '.join(BENCHMARKS)}"
        )
    return BENCHMARKS[name]


def open_benchmark(name: str, directory: str | Path, split: str = "") -> BenchmarkSource:
    """A split of a benchmark, read from the folder of its official files.

    Args:
      name: of the benchmark.
      directory: holds the official files under their official names.
      split: the one that is scored by default if "".

    Raises:
      ConfigError: no benchmark or split of that name.
      DataError: a file is missing, or not in the official format.
    """
    return BenchmarkSource(find_benchmark(name), directory, split)


def training_questions(name: str, directory: str | Path) -> list[Question]:
    """The questions of the training split with their answers, in the order of the official files.

    Only annotation files are read: neither images nor clips have to be there. A question that most
    annotators left without an answer is left out.

    Raises:
      ConfigError: no benchmark of that name, or one without training questions.
      DataError: a file is missing, or not in the official format.
    """
    benchmark = find_benchmark(name)
    if not benchmark.training:
        raise ConfigError(f"benchmark {name!r}: a {benchmark.task} benchmark has no questions")
    records = check(benchmark, Path(directory), benchmark.training)
    return [question for record in records for question in record.qa if question.answer.strip()]
