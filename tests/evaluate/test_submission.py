"""The files that evaluation servers take."""

import csv
import io
import json

import pytest

from vadapter.evaluate.submission import submission

ROW = {"id": "VizWiz_test_00000000.jpg", "index": 0, "question_id": "262148000", "prediction": "é"}


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa"])
def test_answers_by_the_number_of_the_question(name):
    assert submission(name, "question", [ROW]) == (
        "submission.json",
        '[{"question_id": 262148000, "answer": "é"}]\n',
    )


def test_answers_by_the_name_of_the_image():
    name, text = submission("vizwiz", "question", [ROW])
    assert json.loads(text) == [{"image": "VizWiz_test_00000000.jpg", "answer": "é"}]
    assert name == "submission.json"


def test_captions_by_the_number_or_the_name_of_the_image():
    rows = [{"id": "391895", "index": 0, "prediction": "a man"}]
    assert json.loads(submission("coco", "caption", rows)[1]) == [
        {"image_id": 391895, "caption": "a man"}
    ]
    for name in ("msrvtt", "vatex", "flickr8k"):
        rows = [{"id": "0123", "index": 0, "prediction": "a man"}]
        assert json.loads(submission(name, "caption", rows)[1]) == [
            {"image_id": "0123", "caption": "a man"}
        ]


@pytest.mark.parametrize("name", ["msrvtt_qa", "msvd_qa", "ivqa", "daquar"])
def test_other_answers_as_a_table(name):
    rows = [ROW | {"prediction": 'a "big", dog'}, {"id": "x", "index": 1, "prediction": ""}]
    file, text = submission(name, "question", rows)
    assert file == "submission.csv"
    table = list(csv.reader(io.StringIO(text)))
    assert table == [["question_id", "answer"], ["262148000", 'a "big", dog'], ["1", ""]]
