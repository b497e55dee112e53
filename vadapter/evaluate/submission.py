"""Predictions in the format of a benchmark's evaluation server, or in a plain one.

vqav2, okvqa, textvqa   submission.json  [{"question_id": 1, "answer": "…"}]
vizwiz                  submission.json  [{"image": "VizWiz_test_00000000.jpg", "answer": "…"}]
coco                    submission.json  [{"image_id": 1, "caption": "…"}]
other captions          submission.json  [{"image_id": "…", "caption": "…"}]
other questions         submission.csv   question_id,answer
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Benchmark -> (key of the id, field of the prediction, whether the server expects a number).
_ANSWERS = {
    "vqav2": ("question_id", "question_id", True),
    "okvqa": ("question_id", "question_id", True),
    "textvqa": ("question_id", "question_id", True),
    "vizwiz": ("image", "id", False),
}


def submission(benchmark: str, task: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the name of the file to submit, and its content, for rows of predictions.jsonl."""
    if task == "question" and benchmark not in _ANSWERS:
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("question_id", "answer"))
        table.writerows((row.get("question_id", row["index"]), row["prediction"]) for row in rows)
        return "submission.csv", out.getvalue()
    captions = ("image_id", "id", benchmark == "coco")
    key, field, numeric = _ANSWERS.get(benchmark, captions)
    value = "caption" if task == "caption" else "answer"
    entries = [
        {key: _number(row[field]) if numeric else row[field], value: row["prediction"]}
        for row in rows
    ]
    return "submission.json", json.dumps(entries, ensure_ascii=False) + "\n"


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
