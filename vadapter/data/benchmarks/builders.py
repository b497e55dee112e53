"""TensorFlow Datasets builders of the benchmarks, which work without TensorFlow.

Each prepares the splits whose official files are in `manual_dir` as array_record files, which
`tfds.data_source` reads with random access:

  builder = make_builder("coco", data_dir)  # or BUILDERS["coco"](data_dir=…, file_format=…)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=FOLDER))
  builder.as_data_source("test")[0]

An example is an image or clip with its captions or questions:

  id           its name in the official files
  image, clip  one of them: encoded bytes, unchanged
  captions     [text]
  qa           [{"text", "answer", "kind", "id", "answers"}]: the most frequent answer, and the
               number of answers
  all_answers  [text], those to the first question, then those to the second, …: lists of lists
               would need TensorFlow

`to_example` converts one to a `vadapter.data.example.Example`. `builder.info.metadata[split]` says
how the split differs from the official one, "" if it does not. To train on one with `TfdsSource`,
pass `COLUMNS` for questions, nothing for captions.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vadapter.data.benchmarks.benchmark import Benchmark
from vadapter.data.benchmarks.files import is_present
from vadapter.data.benchmarks.source import BenchmarkSource, NoMediaError
from vadapter.data.benchmarks.table import BENCHMARKS, find_benchmark
from vadapter.data.example import Example, Question

# The argument `columns` of `TfdsSource`, to train on questions.
COLUMNS = {"question": "qa.text", "answer": "qa.answer", "question_id": "qa.id", "kind": "qa.kind"}


class BenchmarkBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base class of the builders; each adds the benchmark that it reads."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Official files as they were published."}  # noqa: RUF012
    BENCHMARK: Benchmark

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        question = dict.fromkeys(("text", "answer", "kind", "id"), text)
        features = {
            "id": text,
            self.BENCHMARK.media: tfds.features.Scalar(np.object_),
            "captions": tfds.features.Sequence(text),
            "qa": tfds.features.Sequence(question | {"answers": tfds.features.Scalar(np.int32)}),
            "all_answers": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.BENCHMARK.name}, read by vadapter from its official files.",
            homepage=self.BENCHMARK.homepage,
            metadata=tfds.core.MetadataDict(),
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        folder, benchmark = Path(dl_manager.manual_dir), self.BENCHMARK
        sources = {}
        for split in benchmark.splits:
            if is_present(benchmark, folder, split):
                with contextlib.suppress(NoMediaError):  # annotations alone, for prompts
                    sources[split] = BenchmarkSource(benchmark, folder, split)
        if not sources:  # raises the error that names what is missing
            sources[benchmark.default_split] = BenchmarkSource(benchmark, folder)
        for split, source in sources.items():
            self.info.metadata[split] = source.note  # type: ignore  # `_info` sets it
        # TFDS allows no hyphens in the names of splits.
        return {
            split.replace("-", "_"): self._generate_examples(source)
            for split, source in sources.items()
        }

    def _generate_examples(self, source: BenchmarkSource) -> Iterator[tuple[str, dict[str, Any]]]:
        for n in range(len(source)):
            example = source[n]
            yield example.id, to_row(example, source.kind)


def to_row(example: Example, kind: str) -> dict[str, Any]:
    """Return an example as it is stored; `kind` is image or clip."""
    media, qa = example.media, example.qa
    return {
        "id": example.id,
        kind: media.read_bytes() if isinstance(media, Path) else media,
        "captions": list(example.captions),
        "qa": [{**q._asdict(), "answer": q.answer, "answers": len(q.answers)} for q in qa],
        "all_answers": [answer for question in qa for answer in question.answers],
    }


def to_example(row: dict[str, Any]) -> Example:
    """Return a row of a prepared data set as an example."""
    qa, answers = row["qa"], iter(_texts(row["all_answers"]))
    columns = (_texts(qa["text"]), _texts(qa["kind"]), _texts(qa["id"]), qa["answers"])
    questions = tuple(
        Question(text, tuple(itertools.islice(answers, int(count))), kind, key)
        for text, kind, key, count in zip(*columns, strict=True)
    )
    media = row["image"] if "image" in row else row["clip"]
    return Example(row["id"].decode(), media, tuple(_texts(row["captions"])), questions)


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode() for value in values]


def _class(benchmark: Benchmark) -> type[BenchmarkBuilder]:
    # Prefixed: TFDS has a `coco` and others of its own, with other splits.
    name = "Vadapter" + "".join(part.capitalize() for part in benchmark.name.split("_"))
    files = [f"{file.name} from {file.page}" for file in benchmark.files]
    files += [f"{' or '.join(each.folders)} from {each.page}" for each in benchmark.media_sets]
    instructions = "manual_dir holds the official files under their official names: "
    members = {
        "__module__": __name__,
        "__doc__": f"{benchmark.name} from its official files.",
        "BENCHMARK": benchmark,
        "MANUAL_DOWNLOAD_INSTRUCTIONS": instructions + "; ".join(files),
    }
    return type(name, (BenchmarkBuilder,), members)


BUILDERS = {name: _class(benchmark) for name, benchmark in BENCHMARKS.items()}


def make_builder(name: str, data_dir: str | Path) -> BenchmarkBuilder:
    """Return the builder of a benchmark that writes array_record files under `data_dir`.

    Raises:
      ConfigError: no benchmark of that name.
    """
    find_benchmark(name)
    return BUILDERS[name](data_dir=str(data_dir), file_format="array_record")


def prepare(name: str, folder: str | Path, out: str | Path) -> Path:
    """Write the splits of a benchmark whose official files are in `folder`.

    This is `vadapter data prepare`. Splits that are already in `out`, TFDS's `data_dir`, are kept.
    Returns the folder for `tfds.builder_from_directory`.

    Raises:
      ConfigError: no benchmark of that name.
      DataError: all splits are missing, or one cannot be read.
    """
    benchmark, folder = find_benchmark(name), Path(folder)
    if not any(is_present(benchmark, folder, split) for split in benchmark.splits):
        BenchmarkSource(benchmark, folder)  # raises the error that names what is missing
    builder = make_builder(name, out)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)
