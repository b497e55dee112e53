"""Tables: every form gives the same rows, and what is wrong is named by file and place."""

import json
from pathlib import Path

import pytest
from support.image_files import EXPECTED, contents, folder_of

from vadapter.data import annotation_tables
from vadapter.data.example import Question
from vadapter.data.sources.table import ImageFolder
from vadapter.errors import ConfigError, DataError

CAPTIONS = {f"{i}.png": [f"number {i}", "gray"] for i in range(5)}


def coco(**change) -> dict:
    """The form of captions_val2017.json, its ids in another order than its captions."""
    images = [{"id": 900 - i, "file_name": f"{i}.png", "height": 8, "width": 8} for i in range(5)]
    notes = [
        {"id": 10 * i + n, "image_id": 900 - i, "caption": CAPTIONS[f"{i}.png"][n]}
        for n in range(2)
        for i in range(4, -1, -1)
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": notes} | change


def karpathy(**change) -> dict:
    """The form of dataset_coco.json."""
    splits = ["train", "restval", "val", "test", "train"]
    images = [
        {"filename": name, "split": split, "imgid": i, "cocoid": i,
         "sentences": [{"raw": text, "tokens": text.split(), "imgid": i} for text in said]}
        for i, ((name, said), split) in enumerate(zip(CAPTIONS.items(), splits, strict=True))
    ]  # fmt: skip
    return {"dataset": "coco", "images": images} | change


def as_csv(mark: str, quote: str = "") -> str:
    rows = [(name, f"{quote}{said}{quote}") for name, texts in CAPTIONS.items() for said in texts]
    return "\n".join(mark.join(row) for row in [("image", "caption"), *rows])


FORMS = {
    "t.csv": as_csv(",", '"'),
    "t.tsv": as_csv("\t"),
    "coco.json": json.dumps(coco()),
    "karpathy.json": json.dumps(karpathy()),
    "list.json": json.dumps([{"image": k, "captions": v} for k, v in CAPTIONS.items()]),
    "t.jsonl": "\n".join(json.dumps({"image": k, "captions": v}) for k, v in CAPTIONS.items()),
}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(tmp_path, name):
    folder_of(tmp_path)
    source = ImageFolder(write(tmp_path, name, FORMS[name]))
    assert contents(source) == EXPECTED
    assert source.fingerprint() == ImageFolder(tmp_path / "table.jsonl").fingerprint()


def test_splits_of_karpathy_are_his_and_may_be_joined(tmp_path):
    folder_of(tmp_path)
    path = write(tmp_path, "k.json", json.dumps(karpathy()))
    names = lambda split: [e[0] for e in contents(ImageFolder(path, split=split))]  # noqa: E731
    assert names("train") == ["0.png", "4.png"]
    assert names(("train", "restval")) == ["0.png", "1.png", "4.png"]
    with pytest.raises(DataError, match="no rows of split 'dev'; splits: restval, test, train, v"):
        names("dev")


def test_karpathys_images_are_read_from_their_folders(tmp_path):
    (tmp_path / "val2014").mkdir()
    folder_of(tmp_path / "val2014")
    images = [image | {"filepath": "val2014"} for image in karpathy()["images"]]
    path = write(tmp_path, "k.json", json.dumps(karpathy(images=images)))
    assert contents(ImageFolder(path))[2][:2] == ("val2014/2.png", 40)


def test_columns_have_the_names_of_the_table(tmp_path):
    folder_of(tmp_path)
    path = write(tmp_path, "t.csv", "filepath,title,part\n1.png,one,train\n2.png,two,val\n")
    columns = {"image": "filepath", "caption": "title", "split": "part"}
    assert contents(ImageFolder(path, columns=columns, split="val")) == [
        ("2.png", 40, ("two",), ())
    ]
    row = {"file": "1.png", "qa": [{"q": "who?", "a": ["x", "y"]}, {"q": "why?", "a": ["z"]}]}
    path = write(tmp_path, "t.jsonl", json.dumps(row))
    columns = {"image": "file", "question": "qa.q", "answers": "qa.a"}
    assert ImageFolder(path, columns=columns)[0].qa == (
        Question("who?", ("x", "y")),
        Question("why?", ("z",)),
    )
    with pytest.raises(ConfigError, match="columns: unknown key 'text'; known: image, clip"):
        ImageFolder(path, columns={"text": "title"})


def test_csv_cells_may_hold_marks_and_lines_and_tsv_cells_quotes(tmp_path):
    folder_of(tmp_path)
    path = write(tmp_path, "t.csv", 'image,caption\r\n1.png,"a, ""b""\nc"\r\n2.png,größe\r\n')
    assert [c for _, _, c, _ in contents(ImageFolder(path))] == [('a, "b"\nc',), ("größe",)]
    path = write(tmp_path, "t.tsv", '\ufeffimage\tcaption\n1.png\t12" tall\n')
    assert contents(ImageFolder(path))[0][2] == ('12" tall',)


def test_an_empty_cell_says_nothing(tmp_path):
    folder_of(tmp_path)
    text = "image,question,answer,question_id\n1.png,who?,,7\n2.png,who?,me,8\n"
    source = ImageFolder(write(tmp_path, "t.csv", text))
    assert [source[i].qa[0] for i in range(2)] == [
        Question("who?", (), "", "7"),
        Question("who?", ("me",), "", "8"),
    ]


BAD = [
    ("t.csv", "image,caption\n1.png,x\n2.png\n", r"t\.csv, line 3: not as many cells"),
    ("t.csv", "image,caption\n1.png,x,y\n", r"line 2: not as many cells"),
    ("t.csv", "image,caption\n1.png,\n", r"line 2: no captions and no question"),
    ("t.csv", b"image,caption\n1.png,\xff\n", r"line 2: not UTF-8"),
    ("t.csv", "file,caption\n1.png,x\n", r"line 2: none of the keys image, clip, video; it has f"),
    ("t.csv", "image,caption\n", r"t\.csv: no rows"),
    ("t.csv", "image,caption\n9.png,x\n", r"line 2: no file .*9\.png"),
    ("t.csv", "image,caption\n../1.png,x\n", r"line 2: .* leaves the folder"),
    ("t.csv", "image,caption\n1.png," + "x" * 200_000, r"line 2: .*field larger"),
    ("c.json", "{", r"c\.json: not JSON"),
    ("c.json", "3", r"c\.json: expected a JSON object, got int"),
    ("c.json", "{}", r"c\.json: no list 'images'; expected COCO captions"),
    ("c.json", "[3]", r"item 1: expected a JSON object"),
    ("c.json", json.dumps(coco(annotations={})), r"c\.json: no list 'annotations'"),
    ("c.json", json.dumps(coco(annotations=[])), r"image 1, id 900: no captions and no question"),
    ("c.json", json.dumps(coco(images=coco()["images"] * 2)), r"image 6: duplicate id 900"),
    (
        "c.json",
        json.dumps(coco(images=coco()["images"][1:])),
        r"captions of 900, which is not an ima",
    ),
    ("c.json", json.dumps(coco(annotations=[{"image_id": 900}])), r"annotation 1: no 'caption'"),
    ("c.json", json.dumps(coco(annotations=[{"image_id": 900, "caption": 3}])), r"id 900: caption"),
    ("k.json", json.dumps(karpathy(images=[{"filename": "1.png"}])), r"image 1: no list 'sentenc"),
    ("k.json", json.dumps(karpathy(images=[{"sentences": []}])), r"image 1: no 'filename'"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_a_bad_table_is_named_by_file_and_place(tmp_path, name, text, message):
    folder_of(tmp_path)
    with pytest.raises(DataError, match=message):
        ImageFolder(write(tmp_path, name, text))


def test_an_image_with_captions_in_two_places_is_an_error_but_in_csv(tmp_path):
    folder_of(tmp_path)
    images = [*coco()["images"], {"id": 7, "file_name": "0.png"}]
    notes = [*coco()["annotations"], {"image_id": 7, "caption": "again"}]
    path = write(tmp_path, "c.json", json.dumps(coco(images=images, annotations=notes)))
    with pytest.raises(DataError, match=r"image 6, id 7: '0\.png' has captions already \(.*id 900"):
        ImageFolder(path)


def test_a_question_id_occurs_in_one_row_only(tmp_path):
    folder_of(tmp_path)
    rows = [{"image": f"{i}.png", "question": "?", "question_id": 5} for i in range(2)]
    path = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"line 2: question_id 5 is in .*line 1 too"):
        ImageFolder(path)


def test_questions_of_one_row_are_lists_of_one_length():
    row = {"question": ["a?", "b?"], "answers": [["x"]]}
    with pytest.raises(DataError, match="here: question, answers are not lists of equal length"):
        annotation_tables.texts("here", row)
    row = {"question": ["a?", "b?"], "answer": ["x", "y"], "question_id": [1, 2]}
    assert annotation_tables.texts("here", row)[1] == (
        Question("a?", ("x",), "", "1"),
        Question("b?", ("y",), "", "2"),
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [("a", 1), ("b.c", 2), ("d.e", [3, 4]), ("d.f", [None, 5]), ("x", None), ("a.b", None)],
)
def test_pick_reaches_into_objects_and_lists(path, value):
    row = {"a": 1, "b": {"c": 2}, "d": [{"e": 3}, {"e": 4, "f": 5}]}
    assert annotation_tables.pick(row, path) == value
