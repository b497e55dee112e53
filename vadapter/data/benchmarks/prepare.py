"""From official files to array_record files, through the builders of TensorFlow Datasets."""

from pathlib import Path

from vadapter.data.benchmarks.files import is_there
from vadapter.data.benchmarks.registry import find_benchmark
from vadapter.data.benchmarks.source import BenchmarkSource
from vadapter.errors import ConfigError


def prepare(name: str, folder: str | Path, out: str | Path) -> Path:
    """Writes the splits of a benchmark whose official files are there.

    What is prepared already is left as it is.

    Args:
      name: of the benchmark.
      folder: of its official files.
      out: the `data_dir` of tfds.

    Returns:
      The folder for `tfds.builder_from_directory`.

    Raises:
      ConfigError: no benchmark of that name, or tensorflow-datasets is not installed.
      DataError: no split is there, or one cannot be read.
    """
    benchmark, folder = find_benchmark(name), Path(folder)
    if not any(is_there(benchmark, folder, split) for split in benchmark.splits):
        BenchmarkSource(benchmark, folder)  # tells what is missing
    try:
        import tensorflow_datasets as tfds

        from vadapter.data.benchmarks.builders import make_builder
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; pip install 'vadapter[tfds]'") from error
    builder = make_builder(name, out)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)
