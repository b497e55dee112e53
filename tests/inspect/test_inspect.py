"""`vadapter inspect` on trained runs, on files, on comparisons, and with mistakes."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from support import tiny
from support.patches import use_devices
from support.recipes import tiny_recipe

from vadapter.cli.main import main
from vadapter.data.items import items_of
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.inspect import look
from vadapter.inspect.held_out import Encoded, batches, choose, open_held_out
from vadapter.inspect.inspection import Settings, inspect_files, inspect_held_out, open_probe
from vadapter.inspect.look_page import inspection_page
from vadapter.inspect.words import Vocabulary
from vadapter.io.json_files import write_json
from vadapter.recipe.schema import read
from vadapter.stages.restore import open_run
from vadapter.stages.stage import Stage

MARKUP = "a <b>שלום<i> &amp; red.png"


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    return shutil.copytree(chain / "run", tmp_path_factory.mktemp("inspect") / "run")


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The page and the JSON file of both adapters of a run, of all items."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        assert main(["inspect", str(run), "--limit=0", "--show=2", "--top=3", "--layer=1"]) == 0
    return run / "inspect.html", json.loads((run / "inspect.json").read_text())


def subject(written, label):
    (found,) = (each for each in written[1]["subjects"] if each["label"] == label)
    return found


# -- held-out items --------------------------------------------------------------------------------


def test_all_adapter_stages_are_looked_at_in_the_order_of_the_chain(written):
    assert [each["label"] for each in written[1]["subjects"]] == ["vadapter", "perceiver"]


@pytest.mark.parametrize("name", ["captions", "answers", "clips"])
def test_scores_with_the_right_image_are_those_of_the_evaluation_in_training(run, written, name):
    facts = subject(written, "vadapter")["evals"][name]
    before = json.loads((run / "vadapter" / "eval" / name / "score.json").read_text())
    right = facts["inputs"]["score"]["right"]
    assert right["value"] == pytest.approx(before["scores"][facts["score"]], abs=1e-9)
    assert right["interval"] == pytest.approx(before["intervals"][facts["score"]], abs=1e-9)
    assert facts["generations"]["ended"] == pytest.approx(before["scores"]["ended"])


def test_every_input_has_a_loss_and_a_score_and_only_clips_have_shuffled_frames(written):
    for name, facts in subject(written, "vadapter")["evals"].items():
        inputs = {"right", "wrong", "blank"} | ({"shuffled"} if name == "clips" else set())
        for measured in facts["inputs"].values():
            assert measured.keys() == inputs
            for key in inputs - {"right"}:
                minus = measured[key]["minus_right"]
                expected = measured[key]["value"] - measured["right"]["value"]
                assert minus["value"] == pytest.approx(expected)
                assert minus["interval"][0] <= minus["value"] <= minus["interval"][1]
        for item in facts["items"]:
            assert item["wrong"] != item["id"]
            assert item["inputs"].keys() == inputs
    loss = subject(written, "vadapter")["evals"]["captions"]["inputs"]["loss"]
    assert len({round(loss[key]["value"], 6) for key in ("right", "wrong", "blank")}) == 3


def test_shares_count_the_nearest_words_that_occur_in_the_captions(written):
    facts = subject(written, "perceiver")["evals"]["captions"]
    references = {item["id"]: item["references"] for item in facts["items"]}
    for key, items in (("nearest", "soft_tokens"), ("lens_1", "lens_1")):
        for whose, name in (("own", "id"), ("other", "wrong")):
            shares = [
                Vocabulary(references[item[name]]).share([token[0][0] for token in item[items]])
                for item in facts["items"]
            ]
            assert facts[key][whose]["value"] == pytest.approx(np.mean(shares))
        best = [token[0][1] for item in facts["items"] for token in item[items]]
        assert facts[key]["similarity"] == pytest.approx(np.mean(best))
    assert all(len(token) == 3 for item in facts["items"] for token in item["soft_tokens"])
    norms = subject(written, "perceiver")["norms"]
    ratio = norms["soft_tokens"]["mean"] / norms["words"]["mean"]
    assert norms["ratio"] == pytest.approx(ratio)


def test_shown_items_have_attention_maps_of_the_encoders_grid(written):
    for label, component in (("vadapter", "resampler"), ("perceiver", "perceiver")):
        for name in {"captions", "clips"} & subject(written, label)["evals"].keys():
            frames = 8 if name == "clips" else 1
            items = subject(written, label)["evals"][name]["items"]
            shown = [item["attention"][component] for item in items if "attention" in item]
            assert len(shown) == 2
            assert all(np.shape(each["mean"]) == (frames, 4, 4) for each in shown)
            assert all(np.sum(each["mean"]) == pytest.approx(1, abs=2e-3) for each in shown)


def test_the_page_loads_nothing_and_shows_every_caption(written):
    page, facts = written
    text = page.read_text()
    assert not re.search(r"<(script|link|iframe|object)|https?://|@import", text)
    for source in re.findall(r"(?:src=\"?|url\()([^\")> ]*)", text):
        assert source.startswith("data:image/")
    for each in facts["subjects"]:
        for evaluation in each["evals"].values():
            shown = [item for item in evaluation["items"] if "attention" in item]
            assert all(item["inputs"]["right"]["text"] in text for item in shown)


# -- inputs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(run):
    stage = open_run(run, "vadapter")
    held = open_held_out(stage, "clips", stage.recipe.evals["clips"], 6)
    probe = open_probe(stage, Settings())
    (rows,) = batches(held, stage)
    return held, probe, rows, Encoded(probe, held).inputs(rows)


def test_the_wrong_input_is_that_of_the_partner_and_shuffled_frames_are_the_same_frames(clips):
    held, probe, rows, inputs = clips
    right = probe.encode(rows.frames)
    gray = probe.encode(np.full_like(rows.frames[:1], 127))
    for row in np.flatnonzero(rows.usable):
        partner = int(inputs.partner[row])
        assert held.example(partner).id != held.example(int(rows.index[row])).id
        (place,) = np.flatnonzero(rows.index == partner)
        np.testing.assert_array_equal(inputs.of["right"][row], right[row])
        np.testing.assert_array_equal(inputs.of["wrong"][row], right[place])
        np.testing.assert_array_equal(inputs.of["blank"][row], gray[0])
        shuffled = inputs.of["shuffled"][row]
        assert not np.array_equal(shuffled, right[row])
        order = lambda x: sorted(frame.tobytes() for frame in x)  # noqa: E731
        assert order(shuffled) == order(right[row])


def test_questions_about_one_image_are_apart_and_evenly_drawn(run):
    stage = open_run(run, "vadapter")
    held = open_held_out(stage, "answers", stage.recipe.evals["answers"], 0)
    ids = [held.example(i).id for i in range(len(held.items))]
    half = len(set(ids))
    assert len(ids) == 2 * half
    assert len(set(ids[:half])) == half  # every image once, before any comes again
    few = choose(items_of(held.source, "question"), 4)
    assert len({few[i][0].id for i in range(len(few))}) == 4


# -- connectors of other kinds ---------------------------------------------------------------------

CONNECTORS = {
    "words": ({"words": {"kind": "words"}}, ("perceiver", "fc_out", "words")),
    "cross": ({"cross": {"kind": "cross_attention", "heads": 2, "head_dim": 8}},
              ("perceiver", "cross")),
    "mlp": ({"mlp": {"kind": "mlp", "hidden_dim": 8, "width": 0}}, ("mlp",)),
}  # fmt: skip


def untrained(run, chain, name):
    """A stage with a connector and random parameters, over the data of the run."""
    config = tiny_recipe(chain / "shapes")
    components, names = CONNECTORS[name]
    with config.unlocked():
        config.components.update(components)
    config.stages.perceiver.chain = names
    before = open_run(run, "perceiver")
    mesh = make_mesh(MeshConfig())
    stage = Stage(read(config), "perceiver", mesh, workdir=run, tokenizer=before.tokenizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, stage.abstract)
    stage.params = jax.device_put(tiny.filled(stage.abstract), shardings)
    return stage


def test_with_gated_cross_attention_there_are_no_soft_tokens_but_all_the_rest(run, chain):
    stage = untrained(run, chain, "cross")
    settings = Settings(limit=4, show=1)
    evals = {"captions": stage.recipe.evals["captions"]}
    found = inspect_held_out("cross", open_probe(stage, settings), evals, settings)
    facts = found.facts["evals"]["captions"]
    assert "cross-attention" in found.facts["no_soft_tokens"]
    assert facts["inputs"]["loss"].keys() == facts["inputs"]["score"].keys()
    assert facts["inputs"]["loss"]["wrong"]["value"] != facts["inputs"]["loss"]["right"]["value"]
    assert "nearest" not in facts
    (shown,) = found.shown["captions"]
    assert shown.maps[0].maps.shape == (4, 1, 4, 4)
    assert "cross-attention" in inspection_page("cross", [found])


@pytest.mark.parametrize("name", ["words", "mlp"])
def test_words_are_printed_and_connectors_without_attention_have_no_maps(
    run, chain, tmp_path, name
):
    stage = untrained(run, chain, name)
    file = shutil.copy(chain / "shapes" / "00.png", tmp_path / "00.png")
    probe = open_probe(stage, Settings())
    found, errors = inspect_files(name, probe, [file], Settings())
    (shown,) = found.shown["files"]
    assert errors == {}
    tokens = shown.facts["soft_tokens"]
    page = inspection_page(name, [found])
    if name == "words":
        assert shown.facts["prefix_text"]
        assert len(tokens) == len(shown.maps[0].maps) == 4
        assert "reads:" in page
    else:
        assert shown.maps == []
        assert len(tokens) == 16  # one for each visual token
        assert "attention" not in shown.facts
        assert f"{tokens[0][0][0]}</bdi>" in page


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(run, chain, tmp_path_factory):
    """Exit code, output, page and facts for an image, a clip and two files that are none."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(chain / "shapes" / "00.png", folder / MARKUP)
    shutil.copy(chain / "shapes" / "00.gif", folder / "clip.gif")
    (folder / "text.png").write_text("no image")
    names = [MARKUP, "clip.gif", "text.png", "missing.png"]
    paths = [str(folder / name) for name in names]
    out = folder / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        code = main(["inspect", str(run), *paths, "--stage=vadapter", f"--out={out}"])
    return code, out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_unreadable_files_are_reported_and_the_others_looked_at(files):
    code, _, facts = files
    assert code == 78
    reasons = {path.rpartition("/")[2]: why for path, why in facts["unreadable"].items()}
    assert reasons.keys() == {"text.png", "missing.png"}
    assert reasons["missing.png"] == "no such file"
    image, clip = facts["subjects"][0]["files"]
    assert np.shape(image["attention"]["resampler"]["mean"]) == (1, 4, 4)
    assert np.shape(clip["attention"]["resampler"]["mean"]) == (8, 4, 4)
    for each in (image, clip):
        assert len(each["soft_tokens"]) == 4
        assert len(each["lens_1"]) == 4


def test_names_of_files_are_text_and_isolated(files):
    _, page, _ = files
    assert "a &lt;b&gt;שלום&lt;i&gt; &amp;amp; red.png</bdi>" in page
    assert "<b>שלום" not in page


def test_the_caption_of_a_file_is_that_of_the_caption_verb(run, chain, files, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    assert main(["caption", str(run), str(chain / "shapes" / "00.png"), "--stage=vadapter"]) == 0
    caption = capsys.readouterr().out.partition(": ")[2].strip()
    assert files[2]["subjects"][0]["files"][0]["text"] == caption


# -- comparisons and several runs ------------------------------------------------------------------


def comparison(folder, runs):
    """Write a comparison whose arms are stages of runs: name -> (run, stage)."""
    arms = {
        name: {"runs": [{"run": str(path), "stage": stage, "seed": 0, "lr": 1.0, "prior": []}]}
        for name, (path, stage) in runs.items()
    }
    write_json(folder / "compare.json", {"format": "vadapter-comparison", "arms": arms})
    return folder


def test_the_arms_of_a_comparison_are_side_by_side(run, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    shutil.copytree(run, tmp_path / "inside")
    folder = comparison(tmp_path, {"tiny LM": ("inside", "vadapter"), "six": (run, "perceiver")})
    assert main(["inspect", str(folder), "--evals=captions", "--limit=4"]) == 0
    facts = json.loads((folder / "inspect.json").read_text())
    assert [each["label"] for each in facts["subjects"]] == ["tiny LM", "six"]
    items = [each["evals"]["captions"]["items"] for each in facts["subjects"]]
    assert [i["index"] for i in items[0]] == [i["index"] for i in items[1]]
    assert {len(i) for i in items} == {4}
    printed = capsys.readouterr().out
    assert "tiny LM" in printed
    assert str(folder / "inspect.html") in printed


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "unknown stage": (["{run}", "--stage=vadaptr"], "vadapter"),
    "text-only stage": (["{run}", "--stage=llm"], "kind lm says nothing about images"),
    "vision stage": (["{run}", "--stage=vision"], "kind vision says nothing about images"),
    "layer 0": (["{run}", "--layer=0"], "layers 1 to 1"),
    "layer past the end": (["{run}", "--layer=1,9"], "--layer=9"),
    "layer without a number": (["{run}", "--layer=middle"], "--layer=middle"),
    "unknown evaluation": (["{run}", "--evals=caption"], "captions"),
    "one item": (["{run}", "--evals=captions", "--limit=1"], "fewer than two images"),
    "no run": (["{empty}"], "no run in"),
    "export": (["{export}"], "is an exported adapter, not a run"),
    "file as run": (["{file}"], "no run in"),
    "several runs without a page": (["{run}", "{copy}"], "--out=FILE.html"),
    "page of another kind": (["{run}", "--out=page.pdf"], "ends in .html"),
    "image as page": (["{run}", "--out={file}"], "images to look at are given behind the run"),
    "page below a file": (["{run}", "--out={file}/page.html"], "with --out=FILE.html"),
    "page that is a folder": (["{run}", "--out={folder_page}"], "it is a directory"),
    "JSON that is a folder": (["{run}", "--out={folder_json}"], "folder.json cannot be written"),
    "page where nobody may write": (["{run}", "--out=/proc/page.html"], "/proc/page.html cannot"),
    "comparison and run": (["{comparison}", "{run}"], "one directory of a comparison"),
    "stage of a comparison": (["{comparison}", "--stage=vadapter"], "arms of a comparison"),
    "missing run": (["{comparison}"], "gone (" ),
    "corrupt comparison": (["{corrupt}"], "is corrupt"),
    "data that moved": (
        ["{run}", "--evals=captions", "--config.data.held.source.table=/nowhere/images.jsonl"],
        "--config.data.held.source",
    ),
    "unreadable files alone": (["{run}", "{missing}"], "no such file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for name in ("empty", "export", "comparison", "corrupt"):
        (root / name).mkdir()
    write_json(root / "export" / "config.json", {"format": "vadapter-export"})
    comparison(root / "comparison", {"gone": ("nowhere", "vadapter"), "here": (run, "vadapter")})
    (root / "corrupt" / "compare.json").write_text('{"arms": {"a": 1}}')
    (root / "copy").symlink_to(run)
    (root / "photo.png").touch()
    (root / "page.html").mkdir()
    (root / "folder.json").mkdir()
    names = ("empty", "export", "comparison", "corrupt", "copy", "missing")
    others = {"file": "photo.png", "folder_page": "page.html", "folder_json": "folder.html"}
    return (
        {name: root / name for name in names}
        | {k: root / v for k, v in others.items()}
        | {"run": run}
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_in_one_message_with_exit_code_78(
    name, places, monkeypatch, capsys, tmp_path
):
    use_devices(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[name]
    assert main(["inspect", *(word.format(**places) for word in words)]) == 78
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/page.html", "{file}/page.html", "photo.jpg"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(
    out, places, monkeypatch, capsys
):
    monkeypatch.setattr(look, "look", lambda *args: pytest.fail("computed"))
    size = places["file"].stat().st_size
    assert main(["inspect", str(places["run"]), f"--out={out.format(**places)}"]) == 78
    assert "--out=" in capsys.readouterr().err
    assert places["file"].stat().st_size == size


def test_the_check_of_the_place_leaves_nothing_and_keeps_what_is_there(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    assert look.destination(page, [tmp_path], []) == page
    assert look.destination(tmp_path / "new" / "page.html", [tmp_path], []).parent.name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text() == "old"


def test_runs_over_different_data_are_not_shown_together(run, chain, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"]["held"]["source"]["split"] = "train"
    write_json(other / "config.json", config)
    out = tmp_path / "page.html"
    words = [str(run), str(other), "--stage=perceiver", "--evals=captions", "--limit=4"]
    assert main(["inspect", *words, f"--out={out}"]) == 78
    assert "different items in evaluation captions" in capsys.readouterr().err
    assert not out.exists()
