"""`vadapter data prepare`: array_record files of TensorFlow Datasets from official files."""

from pathlib import Path

from vadapter.data.benchmarks.files import is_present
from vadapter.data.benchmarks.source import BenchmarkSource
from vadapter.data.benchmarks.table import find_benchmark


def prepare(name: str, folder: str | Path, out: str | Path) -> Path:
    """Write the splits of a benchmark whose official files are present.

    Splits that are already prepared are kept.

    Args:
      name: name of the benchmark.
      folder: folder of its official files.
      out: the `data_dir` of TFDS.

    Returns:
      The folder for `tfds.builder_from_directory`.

    Raises:
      ConfigError: no benchmark of that name.
      DataError: all splits are missing, or one cannot be read.
    """
    benchmark, folder = find_benchmark(name), Path(folder)
    if not any(is_present(benchmark, folder, split) for split in benchmark.splits):
        BenchmarkSource(benchmark, folder)  # raises the error that names what is missing

    import tensorflow_datasets as tfds  # slow to import: only once the files are complete

    from vadapter.data.benchmarks.builders import make_builder

    builder = make_builder(name, out)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)
