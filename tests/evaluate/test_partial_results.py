"""Generations of an interrupted evaluation are kept, as far as they are complete."""

import json

import pytest

from vadapter.evaluate.partial_results import PartialResults
from vadapter.metrics.scoring import Generation

GENERATIONS = [
    Generation(0, "a dog", True),
    Generation(1, "", False),
    Generation(2, "zwei\nHunde \u2028 \ud800", True, "tree of\tnight"),
    Generation(3, "b", True),
]


def test_generations_are_read_back_unchanged(tmp_path):
    kept = PartialResults(tmp_path / "deep" / "p.part", "key")
    assert kept.read(2) == []
    kept.append(GENERATIONS[:2])
    kept.append(GENERATIONS[2:])
    assert PartialResults(tmp_path / "deep" / "p.part", "key").read(2) == GENERATIONS
    kept.remove()
    assert not (tmp_path / "deep" / "p.part").exists()
    kept.remove()


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (2, 2), (3, 3), (4, 0)])
def test_an_incomplete_batch_is_truncated_as_a_whole(tmp_path, batch, count):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(batch)
    kept.append(GENERATIONS)
    path.write_bytes(path.read_bytes()[:-4])  # a kill in the middle of the last line
    assert PartialResults(path, "key").read(batch) == GENERATIONS[:count]
    kept.append(GENERATIONS[count:])
    assert PartialResults(path, "key").read(1) == GENERATIONS, (
        "what is appended follows what was kept"
    )


@pytest.mark.parametrize("torn", [b"", b'{"ke', b"\x00" * 40, b"[1,2,3]\n"])
def test_a_file_without_a_header_is_discarded(tmp_path, torn):
    path = tmp_path / "p.part"
    path.write_bytes(torn)
    kept = PartialResults(path, "key")
    assert kept.read(1) == []
    kept.append(GENERATIONS)
    assert PartialResults(path, "key").read(1) == GENERATIONS


def test_generations_with_another_key_are_discarded(tmp_path):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(1)
    kept.append(GENERATIONS)
    assert PartialResults(path, "other").read(1) == []
    assert len(path.read_text().splitlines()) == 1
    assert PartialResults(path, "key").read(1) == []


def test_reading_stops_at_a_line_that_is_out_of_order(tmp_path):
    path = tmp_path / "p.part"
    kept = PartialResults(path, "key")
    kept.read(1)
    kept.append([GENERATIONS[0], GENERATIONS[2], GENERATIONS[1]])
    assert PartialResults(path, "key").read(1) == GENERATIONS[:1]
    assert json.loads(path.read_text().splitlines()[-1])[0] == 0
