"""Which stage reads a data set; opening it never trains a tokenizer."""

import numpy as np
import pytest
from support.opened import opened, prepare, recipe

from vadapter.data.pipeline import make_loader
from vadapter.errors import ConfigError
from vadapter.inspect.open_data import open_data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("open"))


def test_rows_are_those_that_the_stage_trains_on(root):
    data = opened(root, "images", "vadapter", flip=True)
    made = make_loader(
        {"images": (data.items, data.transform, 1.0)}, global_batch=8, seed=data.seed
    )
    batch = next(made)
    for n in range(8):
        index, row = data.row(n)
        assert index == batch["id"][n]
        for key, value in row.items():
            np.testing.assert_array_equal(value, batch[key][n])


def test_held_out_rows_come_in_order(root):
    data = opened(root, "held")
    assert not data.trains
    assert [data.row(n)[0] for n in range(4)] == [0, 1, 2, 3]
    assert data.row(999)[0] == len(data.source) - 1


def test_the_stage_is_the_first_that_trains_on_it_or_evaluates_on_it_else_the_last(root):
    assert opened(root, "images").stage == "vision"
    assert opened(root, "clips").stage == "vadapter"
    assert opened(root, "held").stage == "decoder"
    assert opened(root, "images", "perceiver").stage == "perceiver"
    every = open_data(recipe(root), root / "run", "vadapter", [])
    assert [(d.name, d.stage) for d in every] == [("clips", "vadapter"), ("images", "vadapter")]
    assert {d.stage for d in open_data(recipe(root), root / "run", "", [])} == {"perceiver"}


@pytest.mark.parametrize(
    ("stage", "names", "message"),
    [
        ("", ["image"], r"config\.data: unknown 'image'; did you mean 'images'"),
        ("visio", [], r"config\.stages: unknown 'visio'; did you mean 'vision'"),
        ("", ["questions"], r"config\.data\.questions: no stage .* reads it; .*--stage"),
    ],
)
def test_unknown_names_are_reported(root, stage, names, message):
    with pytest.raises(ConfigError, match=message):
        open_data(recipe(root), root / "run", stage, names)


def test_a_tokenizer_is_never_trained(root, tmp_path):
    (data,) = open_data(recipe(root), tmp_path, "", ["images"])
    assert data.tokenizer is None
    assert not list(tmp_path.iterdir())
