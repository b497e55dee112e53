"""What an evaluation keeps while it runs, and what it says."""

import io
import json

import pytest

from vadapter.evaluate import partial_results
from vadapter.evaluate.partial_results import PartialResults, Progress

TEXTS = [(0, "a dog", True), (1, "", False), (2, "zwei\nHunde \u2028 \ud800", True), (3, "b", True)]


def test_texts_come_back_as_they_were(tmp_path):
    kept = PartialResults(tmp_path / "deep" / "p.part", "key")
    assert kept.read(2) == []
    kept.append(TEXTS[:2])
    kept.append(TEXTS[2:])
    assert PartialResults(tmp_path / "deep" / "p.part", "key").read(2) == TEXTS
    kept.remove()
    assert not (tmp_path / "deep" / "p.part").exists()
    kept.remove()


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (2, 2), (3, 3), (4, 0)])
def test_a_torn_batch_is_cut_off_as_a_whole(tmp_path, batch, count):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(batch)
    kept.append(TEXTS)
    path.write_bytes(path.read_bytes()[:-4])  # a kill in the middle of the last line
    assert PartialResults(path, "key").read(batch) == TEXTS[:count]
    kept.append(TEXTS[count:])
    assert PartialResults(path, "key").read(1) == TEXTS, "what is appended follows what was kept"


@pytest.mark.parametrize("torn", [b"", b'{"ke', b"\x00" * 40, b"[1,2,3]\n"])
def test_a_file_that_says_nothing_is_begun_anew(tmp_path, torn):
    path = tmp_path / "p.part"
    path.write_bytes(torn)
    kept = PartialResults(path, "key")
    assert kept.read(1) == []
    kept.append(TEXTS)
    assert PartialResults(path, "key").read(1) == TEXTS


def test_texts_of_something_else_are_not_taken_over(tmp_path):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(1)
    kept.append(TEXTS)
    assert PartialResults(path, "other").read(1) == []
    assert len(path.read_text().splitlines()) == 1
    assert PartialResults(path, "key").read(1) == []


def test_a_line_out_of_order_ends_what_is_believed(tmp_path):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(1)
    kept.append([TEXTS[0], TEXTS[2], TEXTS[1]])
    assert PartialResults(path, "key").read(1) == TEXTS[:1]
    assert json.loads(path.read_text().splitlines()[-1])[0] == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_with_the_time_that_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(partial_results.time, "monotonic", lambda: now[0])
    out = Terminal()
    progress = Progress("coco", 5000, out=out)
    for _ in range(2):
        now[0] += 10
        progress(100)
    progress.close()
    assert out.getvalue().endswith("\r\x1b[Kcoco: 200/5000  10/s  8 min 0 s left\n")
    assert out.getvalue().count("\n") == 1


def test_elsewhere_lines_are_rare_and_what_was_done_before_is_no_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(partial_results.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress("coco", 400, 300, out=out)
    for _ in range(10):
        now[0] += 2
        progress(10)
    progress.close()
    assert out.getvalue().splitlines() == [
        "coco: 300 of 400 done before",
        "coco: 350/400  5/s  0 min 10 s left",
        "coco: 400/400  5/s  0 min 0 s left",
    ]
    silent = io.StringIO()
    Progress("", 2, out=silent)(2)
    assert silent.getvalue() == ""
