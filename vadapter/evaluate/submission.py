"""Predictions in the format of a benchmark's evaluation server, or else in a plain one.

vqav2, okvqa, textvqa   submission.json  [{"question_id": 1, "answer": "…"}]
vizwiz                  submission.json  [{"image": "VizWiz_test_00000000.jpg", "answer": "…"}]
coco                    submission.json  [{"image_id": 1, "caption": "…"}]
other captions          submission.json  [{"image_id": "…", "caption": "…"}]
other questions         submission.csv   question_id,answer
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # of predictions.jsonl


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _questions(row: Row) -> dict[str, Any]:
    return {"question_id": _number(row["question_id"]), "answer": row["prediction"]}


def _images(row: Row) -> dict[str, Any]:
    return {"image": row["id"], "answer": row["prediction"]}


def _coco(row: Row) -> dict[str, Any]:
    return {"image_id": _number(row["id"]), "caption": row["prediction"]}


def _captions(row: Row) -> dict[str, Any]:
    return {"image_id": row["id"], "caption": row["prediction"]}


_OFFICIAL: dict[str, Callable[[Row], dict[str, Any]]] = {
    "vqav2": _questions,
    "okvqa": _questions,
    "textvqa": _questions,
    "vizwiz": _images,
    "coco": _coco,
}


def submission(benchmark: str, task: str, rows: Sequence[Row]) -> tuple[str, str]:
    """The name of the file to send in, and its content.

    Args:
      benchmark: its name; task: caption | question.
      rows: predictions as in predictions.jsonl.
    """
    entry = _OFFICIAL.get(benchmark)
    if entry is None and task == "question":
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("question_id", "answer"))
        table.writerows((row.get("question_id", row["index"]), row["prediction"]) for row in rows)
        return "submission.csv", out.getvalue()
    text = json.dumps([(entry or _captions)(row) for row in rows], ensure_ascii=False)
    return "submission.json", text + "\n"
