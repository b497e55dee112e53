"""Probes read what tokens hold by construction, no more than chance of noise, and whole runs."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from support.patches import use_devices

from vadapter.cli.main import main
from vadapter.data.scenes.source import ScenesSource
from vadapter.data.scenes.world import COLORS, SHAPES, phases
from vadapter.errors import USER_ERROR
from vadapter.inspect import token_probes
from vadapter.inspect.probe_encoder import COLUMNS, FACTS, PROBES, find
from vadapter.inspect.scene_labels import CLASSES, UNKNOWN, labels
from vadapter.inspect.token_probes import (
    Tokens,
    attention,
    linear_clip,
    linear_image,
    rescale,
    scale_of,
)

GRID = (5, 5)
CHANNELS = len(COLORS) + len(SHAPES) + 8


def scenes(media, split, count):
    source = ScenesSource(media, split, count=count, seed=3)
    return [source.scene(i) for i in range(count)]


@pytest.fixture
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def scaled(*sets):
    """Tokens as an encoder's are before they are probed."""
    scale = scale_of(sets[0].tokens)
    for each in sets:
        rescale(each.tokens, scale)
    return sets


def planted(media, split, count):
    """Tokens with the number of things, and where one is its color, shape, size, place, radius.

    Motion follows from the places in all frames alone.
    """
    made = scenes(media, split, count)
    at = phases(media)
    tokens = np.zeros((count, len(at), GRID[0] * GRID[1], CHANNELS), np.float16)
    for i, scene in enumerate(made):
        tokens[i, :, :, -len(scene.things)] = 1
        for thing in scene.things:
            for frame, phase in enumerate(at):
                x, y, radius = thing.at(phase)
                column, row = (min(int(v * 5), 4) for v in (x, y))
                token = tokens[i, frame, row * 5 + column]
                token[[*COLORS].index(thing.color)] = 1
                token[7 + SHAPES.index(thing.shape)] = 1
                size = {"small": -1, "large": 1, "": 0}[thing.size]
                token[13:18] = 1, size, 5 * x - column, 5 * y - row, math.log(radius / 0.12)
    return Tokens(tokens, labels(made))


def noise(media, split, count):
    """Tokens that know nothing of their scenes."""
    made = scenes(media, split, count)
    rng = np.random.default_rng(len(split))
    shape = (count, len(phases(media)), GRID[0] * GRID[1], 8)
    return Tokens(rng.normal(size=shape).astype(np.float16), labels(made))


@pytest.fixture
def halved(monkeypatch):
    """Probes are trained for half of their steps, which small tokens without noise allow."""
    for table in (token_probes.LINEAR, token_probes.ATTENTION):
        for key, schedule in table.items():
            monkeypatch.setitem(table, key, schedule._replace(steps=schedule.steps // 2))


@pytest.mark.usefixtures("halved")
def test_facts_are_read_from_tokens_that_hold_them():
    images = planted("image", "train", 800), planted("image", "val", 150)
    clips = planted("clip", "train", 1000), planted("clip", "val", 150)
    scaled(*images, *clips)
    attended, layer = attention(*images, GRID)
    for found in (linear_image(*images, GRID), attended):
        assert set(found) == {"color", "shape", "size", "place", "count"}
        for fact, each in found.items():
            assert each.sample.value > 0.95, fact
            assert each.majority < 0.85, fact
    found, _ = attention(*clips, GRID, layer)
    assert set(found) == {"motion"}
    assert found["motion"].majority < 0.4
    assert found["motion"].sample.value > 0.7  # from places in a grid of five, of 1,000 clips


@pytest.fixture
def short(monkeypatch):
    """Probes are trained for a few steps."""
    for table in (token_probes.LINEAR, token_probes.ATTENTION):
        for key, schedule in table.items():
            monkeypatch.setitem(table, key, schedule._replace(steps=60))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("media", ["image", "clip"])
def test_nothing_is_read_from_noise(media):
    train, held = noise(media, "train", 300), noise(media, "val", 300)
    linear = linear_image(train, held, GRID) if media == "image" else linear_clip(train, held)
    for fact, each in [*linear.items(), *attention(train, held, GRID)[0].items()]:
        assert each.sample.value < each.majority + 0.1, fact


def test_labels_are_the_facts_of_things_whose_color_is_unique():
    for media in ("image", "clip"):
        made = scenes(media, "train", 60)
        found = labels(made)
        for i, scene in enumerate(made):
            assert found.count[i] == len(scene.things) - 1
            for c, color in enumerate(COLORS):
                own = [thing for thing in scene.things if thing.color == color]
                assert found.of_colors["present"][i, c] == bool(own)
                for fact in found.of_colors.keys() - {"present"}:
                    label = found.of_colors[fact][i, c]
                    assert label < CLASSES[fact]
                    assert len(own) == 1 or label == UNKNOWN
                    if len(own) == 1 and fact == "place":
                        assert label == own[0].cell
            if media == "image":
                assert set(np.flatnonzero(found.cells[i])) == {t.cell for t in scene.things}
        assert len(found.centers) == sum(len(scene.things) for scene in made)


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(chain, tmp_path_factory):
    """A run that trained an encoder, with scenes in place of its images."""
    run = tmp_path_factory.mktemp("seeing") / "run"
    shutil.copytree(chain / "run", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["images"]["source"] = {"kind": "scenes", "media": "image", "split": "train"}
    (run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(run / "perceiver" / "checkpoints")
    return run


@pytest.mark.usefixtures("short", "one_device")
def test_the_encoders_of_runs_are_probed_and_recorded_with_their_digests(seeing, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "seen.json"
    shutil.copytree(seeing, other)
    words = ["--probe", "--scenes=24", "--stage=vision", "--steps=all", f"--out={out}"]
    assert main(["inspect", str(seeing), str(other), *words]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [each["label"] for each in record["encoders"]] == ["run", "other"]
    done = json.loads((seeing / "vision" / "done.json").read_text())
    for each in record["encoders"]:
        assert each["step"] == done["steps"]
        assert each["digest"] == done["components"]["encoder"]
        assert each["scenes"] == {
            "image train": 24, "image val": 6, "clip train": 12, "clip val": 3
        }  # fmt: skip
        for probe in PROBES:
            assert set(each["probes"][probe]) == set(FACTS)
            for fact, found in each["probes"][probe].items():
                low, high = found["interval"] or (found["accuracy"],) * 2
                assert 0 <= low <= found["accuracy"] <= high <= 1, fact
    assert record["encoders"][0]["probes"] == record["encoders"][1]["probes"]
    assert all(fact in printed for fact in FACTS)
    with out.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert len(table) == 2 * len(PROBES) * len(FACTS)


@pytest.mark.usefixtures("short", "one_device")
def test_a_frozen_encoder_is_that_of_the_stage_that_trained_it(seeing):
    assert main(["inspect", str(seeing), "--probe", "--scenes=8"]) == 0
    (found,) = json.loads((seeing / "probe.json").read_text())["encoders"]
    done = json.loads((seeing / "vision" / "done.json").read_text())
    assert (found["stage"], found["trained"]) == ("vadapter", False)
    assert found["digest"] == done["components"]["encoder"]
    assert (seeing / "probe.csv").exists()


def test_all_checkpoints_or_some_of_them_are_probed(tmp_path):
    for step in (20, 5, 100):
        (tmp_path / "vision" / "checkpoints" / str(step)).mkdir(parents=True)
    for which, expected in (("all", [5, 20, 100]), ("20,5", [20, 5]), ("", [None])):
        assert [each.step for each in find([tmp_path], "vision", which)] == expected


def test_data_without_known_facts_is_refused(chain, capsys):
    assert main(["inspect", str(chain / "run"), "--probe"]) == USER_ERROR
    error = capsys.readouterr().err
    assert "--probe needs images whose facts are known" in error
    assert "folder" in error or "table" in error


MISTAKES = {
    "a step that is not there": (["--probe", "--stage=vision", "--steps=7"], "there are steps"),
    "steps of no stage": (["--probe", "--steps=all"], "--stage=vision"),
    "steps that are no numbers": (["--probe", "--stage=vision", "--steps=x"], "--steps=x"),
    "an unknown stage": (["--probe", "--stage=visoin"], "did you mean 'vision'"),
    "a stage that sees nothing": (["--probe", "--stage=llm"], "--stage='llm'"),
    "a stage that is not trained": (
        ["--probe", "--stage=perceiver"],
        "no checkpoint yet of perceiver",
    ),
    "steps without a probe": (["--steps=all"], "only with --probe"),
    "options of the page": (["--probe", "--top=3"], "--top: not with --probe"),
    "a page": (["--probe", "--out=x.html"], "ends in .json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_explained(seeing, case, capsys):
    words, expected = MISTAKES[case]
    assert main(["inspect", str(seeing), *words]) == USER_ERROR
    assert expected.replace("'", "") in capsys.readouterr().err.replace("'", "")
