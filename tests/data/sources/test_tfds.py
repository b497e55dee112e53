"""TFDS data sets in array_record: read by index, without TensorFlow, under the project's keys."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module as module
from support.image_files import contents, image
from support.paths import ROOT

from vadapter.data.config import DataConfig
from vadapter.data.example import Question
from vadapter.data.open import describe, make_source
from vadapter.data.sources.tfds import TfdsSource
from vadapter.errors import ConfigError, DataError

COUNT = 7


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Images with an id, captions, and a question; record 5 has a blank caption."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "photo": tfds.features.Image(shape=(None, None, 3)),
            "key": np.int64,
            "said": tfds.features.Sequence(text),
            "qa": tfds.features.Sequence({"q": text, "a": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(), "val": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            said = [" "] if i == 5 else [f"number {i}", "größe"]
            asked = [{"q": "what?", "a": f"{i}"}, {"q": "why?", "a": "so"}]
            yield i, {"photo": io.BytesIO(image(i)), "key": i, "said": said, "qa": asked}


COLUMNS = {"image": "photo", "id": "key", "captions": "said", "question": "qa.q", "answer": "qa.a"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_records_come_by_index_under_our_keys(prepared):
    source = TfdsSource("tiny", "train", data_dir=prepared, columns=COLUMNS)
    assert (len(source), source.kind) == (COUNT, "image")
    found = {id_: rest for id_, *rest in contents(source)}
    for i in (0, 1, 2, 3, 4, 6):  # TFDS shuffles them by their keys
        qa = (Question("what?", (f"{i}",)), Question("why?", ("so",)))
        assert found[str(i)] == [i, (f"number {i}", "größe"), qa]
    assert source[3] == source[3]
    for i in (-1, COUNT):
        with pytest.raises(IndexError):
            source[i]


def test_images_come_encoded(prepared):
    source = TfdsSource("tiny", "train", data_dir=prepared, columns=COLUMNS)
    assert {source[i].media for i in range(COUNT)} == {image(i) for i in range(COUNT)}


def test_splits_may_be_cut(prepared):
    whole = TfdsSource("tiny", "train", data_dir=prepared, columns=COLUMNS)
    part = TfdsSource("tiny", "train[2:5]", data_dir=prepared, columns=COLUMNS)
    assert contents(part) == contents(whole)[2:5]
    assert part.fingerprint() != whole.fingerprint()


def test_a_record_without_usable_text_is_masked_and_named(prepared):
    spec = {"kind": "tfds", "name": "tiny", "split": "val", "data_dir": str(prepared)}
    source = make_source("x", DataConfig({**spec, "columns": COLUMNS}, "caption", 9))
    (bad,) = (i for i in range(COUNT) if not source[i].captions)
    assert source[bad].id == "5"
    assert f"record {bad}: caption: expected a text" in describe("x", source, bad)


def test_a_source_is_picklable(prepared):
    source = TfdsSource("tiny", "train", data_dir=prepared, columns=COLUMNS)
    copied = pickle.loads(pickle.dumps(source))
    assert contents(copied) == contents(source)
    assert copied.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("name", "split", "columns", "error", "message"),
    [
        ("tiny", "dev", COLUMNS, DataError, "tiny, split 'dev': not readable in .*Unknown split"),
        ("nosuch", "train", COLUMNS, DataError, "nosuch, split 'train': .*file_format=array_rec"),
        ("mnist", "train", {"image": "image"}, DataError, "mnist, split 'train': not readable"),
        (
            "tiny",
            "train",
            {},
            DataError,
            "no column image, clip or video.* Columns: key, photo, qa",
        ),
        ("tiny", "train", {"image": "x"}, ConfigError, "no column 'x'; columns: key, photo"),
        ("tiny", "train", {"picture": "photo"}, ConfigError, "unknown key 'picture'"),
        ("tiny", "train[:0]", COLUMNS, DataError, "0 usable examples"),
    ],
)
def test_unreadable_input_is_one_clear_line(prepared, name, split, columns, error, message):
    with pytest.raises(error, match=message) as caught:
        TfdsSource(name, split, data_dir=prepared, columns=columns)
    assert "\n" not in str(caught.value)
    assert not (prepared / "mnist").exists()  # nothing is downloaded


def test_a_corrupt_record_is_refused_by_its_position(prepared, tmp_path):
    folder = tmp_path / "tiny" / "1.2.0"
    folder.mkdir(parents=True)
    for path in (prepared / "tiny" / "1.2.0").iterdir():
        raw = bytearray(path.read_bytes())
        if "train.array_record" in path.name:
            raw[300] ^= 1
        (folder / path.name).write_bytes(raw)
    source = TfdsSource("tiny", "train", data_dir=tmp_path, columns=COLUMNS)
    with pytest.raises(DataError, match=r"tiny, split 'train': record \d cannot be read"):
        contents(source)


def nested(folder: Path) -> None:
    """A data set whose questions have many answers each: TFDS needs TensorFlow to write one."""
    from tensorflow_datasets.proto import tf_example_pb2 as proto

    root = folder / "nested" / "1.0.0"
    root.mkdir(parents=True)
    text = tfds.features.Text()
    answers = tfds.features.Sequence(text)
    features = tfds.features.FeaturesDict({
        "clip": text,
        "qa": tfds.features.Sequence({"question": text, "answers": answers}),
    })  # fmt: skip
    features.save_config(root)
    example = proto.Example()
    put = example.features.feature
    put["clip"].bytes_list.value.append(image(9))
    put["qa/question"].bytes_list.value.extend([b"who?", b"why?"])
    put["qa/answers/ragged_flat_values"].bytes_list.value.extend([b"me", b"I", b"so"])
    put["qa/answers/ragged_row_lengths_0"].int64_list.value.extend([2, 1])
    writer = module.ArrayRecordWriter(
        str(root / "nested-train.array_record-00000-of-00001"), "group_size:1"
    )
    writer.write(example.SerializeToString())
    writer.close()
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train", "numBytes": "1", "shardLengths": ["1"],
    }  # fmt: skip
    info = {"fileFormat": "array_record", "name": "nested", "version": "1.0.0", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))


def test_questions_with_many_answers_and_clips_as_bytes_are_read(tmp_path):
    nested(tmp_path)
    columns = {"question": "qa.question", "answers": "qa.answers"}
    source = TfdsSource("nested", "train", data_dir=tmp_path, columns=columns)
    assert source.kind == "clip"
    assert source[0].media == image(9)
    assert source[0].qa == (Question("who?", ("me", "I")), Question("why?", ("so",)))


def test_reading_imports_no_tensorflow(prepared):
    code = (
        "import sys\n"
        "from vadapter.data.sources.tfds import TfdsSource\n"
        f"s = TfdsSource('tiny', 'train', data_dir={str(prepared)!r}, columns={COLUMNS!r})\n"
        "print(len(s), len(s[0].media) > 9, 'tensorflow' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["7", "True", "False"], done.stderr
