"""What an evaluation keeps while it runs, and what it says."""

import json

import pytest

from vadapter.evaluate.partial_results import PartialResults

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
