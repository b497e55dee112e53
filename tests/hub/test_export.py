"""An export equals its stage bit for bit and never replaces anything but an export."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import runs
from support.patches import with_recipe

from vadapter import VAdapter, console
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.cli import main
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate.describe import Describer
from vadapter.hub import write as module
from vadapter.hub.load import open_export
from vadapter.hub.record import read
from vadapter.hub.write import export, report
from vadapter.stages.restore import open_run


def digests(loaded):
    return {name: combined(tree_digests(tree)) for name, tree in loaded.params.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_has_the_parameters_of_the_run_and_generates_the_same(pair, folder):
    loaded, target = pair
    model = VAdapter.from_pretrained(target)
    assert digests(model.loaded) == digests(loaded)
    paths = [folder / "shapes" / name for name in ("02.png", "03.png", "07.gif")]
    describer = Describer(loaded)
    said = [reply.text for reply in describer.replies(paths)]
    assert any(said)
    assert model.caption(paths) == said
    question = "what colour is it?"
    said = [reply.text for reply in describer.replies(paths[:2], [question] * 2)]
    assert model.ask(paths[:2], question) == said


def test_an_export_is_not_a_run_and_training_leaves_it_as_it_is(exported, folder, capsys):
    before = contents(exported)
    recipe = runs.write_recipe(folder)
    assert main.main(["train", f"--config={recipe}", f"--workdir={exported}"]) == 78
    said = capsys.readouterr().err
    assert said.endswith(f"--workdir={exported} is an exported adapter; choose another directory\n")
    for verb in (["eval"], ["export", "DIR"], ["rewind", "--step=1"]):
        assert main.main([verb[0], str(exported), *verb[1:]]) == 78
        assert f"{exported} is an exported adapter, not a run: give" in capsys.readouterr().err
    assert contents(exported) == before


def test_trained_components_are_stored_in_float32_under_their_names(own, exported):
    loaded, tensors = open_run(own), load_file(exported / "model.safetensors")
    assert {name.partition("/")[0] for name in tensors} == {"front", "tlm", "fc_out"}
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    kernel = loaded.params["tlm"]["stack"]["blocks"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(tensors["tlm/stack/blocks/mlp/down/kernel"], kernel)
    done = json.loads((own / "vadapter" / "done.json").read_text())["components"]
    assert read(exported).trained == done


def test_only_frozen_components_without_public_weights_are_included(own, public, tmp_path):
    export(open_run(own), tmp_path / "own")
    export(open_run(public), tmp_path / "public")
    same = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    frozen = {"frozen-encoder.safetensors", "frozen-llm.safetensors"}
    assert contents(tmp_path / "own").keys() == same | frozen
    assert contents(tmp_path / "public").keys() == same
    reference = read(tmp_path / "public").frozen["llm"]
    assert reference.weights == str(public.parent / "llm")
    assert re.fullmatch("sha256:[0-9a-f]{64}", reference.digest)


def test_two_exports_of_a_stage_are_the_same_bytes(own, exported, tmp_path):
    export(open_run(shutil.copytree(own, tmp_path / "moved")), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(exported)


def test_frozen_components_of_a_bfloat16_stage_stay_in_bfloat16(own, folder, tmp_path):
    loaded = open_run(own)
    recipe = dataclasses.replace(loaded.recipe, dtype="bfloat16")
    cast = {name: jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params[name])
            for name in loaded.digests}  # fmt: skip
    loaded = with_recipe(loaded, recipe)
    loaded.params |= cast
    export(loaded, tmp_path / "adapter")
    again = open_export(tmp_path / "adapter")
    assert digests(again) == digests(loaded)
    image = [folder / "shapes" / "02.png"]
    assert next(Describer(again).replies(image)) == next(Describer(loaded).replies(image))


def test_a_stage_before_the_last_can_be_exported(own, folder, tmp_path):
    loaded = open_run(own, "decoder")
    export(loaded, tmp_path / "adapter")
    again = open_export(tmp_path / "adapter")
    assert again.model.names() == ("encoder", "front", "tlm")
    assert digests(again) == digests(loaded)
    with pytest.raises(ConfigError, match=r"llm is text-only; choose .* decoder, vadapter"):
        export(open_run(own, "llm"), tmp_path / "text")


def test_the_card_has_components_data_recipe_scores_and_usage(own, exported):
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "vadapter"
    assert card.data.base_model is None
    assert "| `llm` | lm |" in card.text
    assert "`frozen-llm.safetensors`: trained in an earlier stage" in card.text
    assert "the last of `llm → decoder → vadapter`" in card.text
    assert "step 2 of 2, batches of 8, seed 0" in card.text
    assert "| images | folder | caption | 1 |" in card.text
    record = json.loads((own / "vadapter/eval/captions/score.json").read_text())
    rows = re.findall(r"^\| (\w+) \| (\d.*) \|$", card.text.split("| score | captions |")[1], re.M)
    assert [name for name, _ in rows] == ["n", *sorted(record["scores"].keys() - {"n"})]
    assert dict(rows)["n"] == f"{record['scores']['n']:.0f}"
    ends = ", ".join(f"{100 * end:.1f}" for end in record["intervals"]["bleu4"])
    assert dict(rows)["bleu4"] == f"{100 * record['scores']['bleu4']:.1f} [{ends}]"
    assert "VAdapter.from_pretrained(" in card.text
    assert "The base models remain under their own\nlicenses" in card.text
    assert str(own.parents[1]) not in card.content


def test_a_card_of_hub_models_names_them_with_their_commits(public, tmp_path, monkeypatch):
    loaded = open_run(public)
    commit = "c" * 40
    snapshot = module.locate(str(public.parent / "llm"), "")
    found = {"encoder": "openai/clip", "llm": "meta/llama"}
    ids = {loaded.recipe.components[name]["weights"]: repo for name, repo in found.items()}
    monkeypatch.setattr(
        module, "locate",
        lambda weights, *_: dataclasses.replace(snapshot, repo_id=ids[weights], revision=commit),
    )  # fmt: skip
    export(loaded, tmp_path / "adapter")
    card = huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == ["openai/clip", "meta/llama"]
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert f"| frozen | meta/llama at `{commit}` |" in card.text
    assert "| trained | `model.safetensors`, initialized from tlm |" in card.text
    llm = read(tmp_path / "adapter").frozen["llm"]
    assert (llm.weights, llm.revision, llm.digest) == ("meta/llama", commit, loaded.digests["llm"])
    assert "hub id" not in report(tmp_path / "adapter")


def test_an_earlier_export_is_replaced_and_nothing_else_ever(own, exported, tmp_path):
    loaded, target = open_run(own), tmp_path / "adapter"
    export(open_run(own, "decoder"), target)
    export(loaded, target)
    assert contents(target) == contents(exported)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"not part of the export and would be lost \(notes\.txt\)"
    ):
        export(loaded, target)
    (target / "notes.txt").unlink()
    for folder in (own, tmp_path):
        with pytest.raises(ConfigError, match="exists and is not an export"):
            export(loaded, folder)
    assert contents(target) == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_export_that_fails_leaves_the_earlier_one(own, exported, tmp_path, monkeypatch):
    def full(path, *_):
        if str(path).endswith(".part") or not isinstance(path, Path):
            raise OSError(28, "full")
        os.rename(path, *_)

    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    (tmp_path / ".adapter.part").mkdir()  # of an export that was killed
    loaded = open_run(own)
    for place, name in ((module, "model_card"), (Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OSError, match="full"):
                export(loaded, target)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert contents(target) == contents(exported)


def test_an_export_killed_between_its_renames_is_not_lost(own, exported, tmp_path):
    shutil.copytree(exported, tmp_path / ".adapter.old")
    run = shutil.copytree(own, tmp_path / "run")
    (run / "vadapter/eval/captions/score.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"captions/score\.json is corrupt"):
        export(open_run(run), tmp_path / "adapter")
    assert contents(tmp_path / "adapter") == contents(exported)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "run"}


def test_the_verb_prints_the_files_and_the_source_of_the_rest(public, tmp_path, capsys):
    target = tmp_path / "adapter"
    assert main.main(["export", str(public), str(target)]) == 0
    out, err = capsys.readouterr()
    assert "vadapter: using stage vadapter, step 2\n" in err
    size = (target / "model.safetensors").stat().st_size
    assert out.startswith(f"{target}\n")
    assert re.search(rf"model\.safetensors +{console.size(size)}\n", out)
    assert f"llm: not included, public weights {public.parent / 'llm'}\n" in out
    assert "--config.components.llm.weights=OWNER/NAME" in out
    assert main.main(["export", str(public), str(public)]) == 78
