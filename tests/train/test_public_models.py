"""Runs whose parts are public checkpoints: folders with config.json, safetensors and tokenizers."""

import hashlib
import io
import json
import re
import shutil
import tarfile

import jax
import numpy as np
import pytest
from support import guides, runs
from support.patches import use_devices
from support.paths import ROOT
from support.public_models import write_model
from support.public_tokenizers import llama2, neox

from vadapter.cli import main
from vadapter.errors import CheckpointError
from vadapter.io.json_files import rows
from vadapter.recipe.schema import read
from vadapter.stages import run
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import open_run
from vadapter.train.loop import train
from vadapter.weights.hf_checkpoint import Checkpoint
from vadapter.weights.safetensors import TensorFiles

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 8}  # fmt: skip
LM = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
      "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
MEAN = [0.1, 0.2, 0.3]


def clip(folder):
    """As the hub has them: two towers in one file, the encoder's keys nested, a preprocessor."""
    write_model(
        folder, {"model_type": "clip_vision_model", **CLIP}, "vision_model.",
        **{"logit_scale": 0.0, "text_model.embeddings.token_embedding.weight": np.zeros((7, 16))},
    )  # fmt: skip
    config = {"model_type": "clip", "vision_config": CLIP, "text_config": {"hidden_size": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32,
              "resample": 3, "image_mean": MEAN, "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def language_model(folder, tokenizer, model_type, **keys):
    """A tokenizer's folder with a model in it."""
    config = json.loads((tokenizer(folder) / "config.json").read_text())
    return write_model(folder, {**config, **LM, "model_type": model_type, **keys})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP; a tiny LM whose BOS and EOS are id 0; an LLM with a SentencePiece tokenizer."""
    folder = runs.prepare(tmp_path_factory.mktemp("public"))
    clip(folder / "clip")
    language_model(folder / "tlm", neox, "gpt_neox", hidden_size=16)
    language_model(folder / "llm", llama2, "llama")
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run directory."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(read(runs.public(world)), root / "run")
    return root / "run"


def test_sizes_follow_from_the_checkpoint_and_keys_of_the_recipe_override_them(world):
    components = read(runs.public(world, tap="penultimate")).components
    spec = components["encoder"]
    assert (spec["kind"], spec["width"], spec["depth"], spec["patch"]) == ("vit", 16, 2, 8)
    assert (spec["mlp"], spec["pre_norm"], spec["mean"]) == ("quick_gelu", True, tuple(MEAN))
    assert spec["tap"] == "penultimate"
    assert components["llm"]["kind"] == "lm"
    assert components["llm"]["width"] == 24


def test_each_language_model_reads_and_writes_with_its_own_tokenizer(world, trained):
    assert not (trained / "tokenizer.json").exists()
    decoder, vadapter = (open_run(trained, name) for name in ("decoder", "vadapter"))
    assert decoder.tokenizer.bos_id == decoder.tokenizer.eos_id == 0
    assert vadapter.tokenizer.eos_id == 2
    assert decoder.tokenizer.digest != vadapter.tokenizer.digest
    for name in ("decoder", "vadapter"):
        losses = [row["loss"] for row in rows(trained / name / "metrics.jsonl") if "loss" in row]
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]


def test_frozen_parts_are_the_checkpoints_and_trained_ones_have_moved(world, trained):
    loaded = open_run(trained, "vadapter")
    name = "mlp.down_proj.weight"
    theirs = Checkpoint.open(world / "llm").files.read(f"model.layers.1.{name}")
    kernel = loaded.params["llm"]["stack"]["blocks"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel[1], theirs.T)
    theirs = Checkpoint.open(world / "clip").files.read("vision_model.pre_layrnorm.weight")
    np.testing.assert_array_equal(loaded.params["encoder"]["pre_norm"]["scale"], theirs)
    moved = loaded.params["tlm"]["stack"]["blocks"]["mlp"]["down"]["kernel"]
    theirs = Checkpoint.open(world / "tlm").files.read("gpt_neox.layers.0.mlp.dense_4h_to_h.weight")
    assert 0 < np.abs(moved[0] - theirs.T).max() < 0.5


def test_a_run_captions_and_answers(world, trained, capsys):
    image = str(world / "shapes" / "00.png")
    assert main.main(["caption", str(trained), image, "--max-new=5"]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: ")
    assert main.main(["ask", str(trained), image, "what is it?", "--stage=decoder"]) == 0


def test_frozen_weights_are_neither_copied_nor_hashed_twice(world, trained, monkeypatch):
    stored = {path.name.partition("-")[0] for path in (trained / "components").iterdir()}
    assert stored.isdisjoint({"encoder", "llm"})  # but for the records of their digests
    monkeypatch.setattr(TensorFiles, "digest", lambda files: pytest.fail(f"{files.path} is read"))
    loaded = open_run(trained, "vadapter")
    llm = (world / "llm" / "model.safetensors").read_bytes()
    assert loaded.digests["llm"] == f"sha256:{hashlib.sha256(llm).hexdigest()}"


def test_weights_may_move_but_must_have_the_recorded_digests(world, trained, tmp_path, capsys):
    for name in ("clip", "llm"):
        shutil.copytree(world / name, tmp_path / name)
    moved = shutil.copytree(trained, tmp_path / "run")
    config = (moved / "config.json").read_text().replace(str(world), "/nowhere")
    (moved / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"components\.encoder\.weights: There is no folder"):
        open_run(moved, "vadapter")
    places = [f"components.{part}.weights={tmp_path / name}"
              for part, name in (("encoder", "clip"), ("llm", "llm"))]  # fmt: skip
    same = open_run(moved, "vadapter", overrides=places).params
    jax.tree.map(np.testing.assert_array_equal, same, open_run(trained, "vadapter").params)
    weights = tmp_path / "llm" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one tensor
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)components\.llm\.weights=.*not the weights of"):
        open_run(moved, "vadapter", overrides=places)
    command = ["caption", str(moved), str(world / "shapes" / "00.png"), "--max-new=2"]
    assert main.main(command) == 78
    capsys.readouterr()
    (weights).write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
    assert main.main([*command, *(f"--config.{place}" for place in places)]) == 0


def test_a_finished_run_is_recognized_and_a_changed_checkpoint_is_not(world, tmp_path, capsys):
    copy = shutil.copytree(world, tmp_path / "copy")
    config = runs.public(copy)
    with config.unlocked():
        config.chain = ("decoder",)
        config.stages.decoder.steps = 2
    train(read(config), tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"/clip \[\w{12}\] 21 tensors; dropped: logit_scale, text_model\.emb", told)
    train(read(config), tmp_path / "run")
    assert "decoder: already finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/decoder" / DONE).read_text())["steps"] == 2
    weights = copy / "clip" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one tensor
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"another configuration:\n.*\n +start\.encoder"):
        train(read(config), tmp_path / "run")


def test_the_tokenizer_of_another_model_is_not_taken_for_this_ones(world, tmp_path):
    first, second = runs.public(world), runs.public(world)
    with second.unlocked():
        second.components.tlm.weights = str(world / "llm")
    run.Run(read(first), tmp_path).check()
    with pytest.raises(CheckpointError, match=r"tlm\.json is not the tokenizer of components\.tlm"):
        run.Run(read(second), tmp_path).check()


def test_a_folder_that_is_missing_or_no_model_is_named_by_its_key(world, tmp_path):
    for folder, message in (
        (tmp_path / "nowhere", r"components\.encoder\.weights: There is no folder"),
        (tmp_path, r"components\.encoder\.weights: .* is empty: give a Hugging Face model folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(runs.public(world, weights=str(folder)))


@pytest.mark.data
def test_a_published_llama2c_file_is_an_llm(world, data_root, tmp_path, capsys):
    folder = data_root / "weights" / "stories260k"
    config = runs.public(world)
    with config.unlocked():
        config.components.llm.weights = str(folder)
        config.chain = ("vadapter",)
        config.stages = {"vadapter": config.stages.vadapter}
        config.stages.vadapter.start = {}
        config.stages.vadapter.evals = ()
    train(read(config), tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run/vadapter/metrics.jsonl") if "loss" in row]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    loaded = open_run(tmp_path / "run", "vadapter")
    theirs = Checkpoint.open(folder).files.read("layers.4.feed_forward.w2.weight")
    kernel = loaded.params["llm"]["stack"]["blocks"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel[4], theirs.T)
    binary = (folder / "stories260K.bin").read_bytes()
    assert loaded.digests["llm"] == f"sha256:{hashlib.sha256(binary).hexdigest()}"
    image = str(world / "shapes" / "00.png")
    capsys.readouterr()
    assert main.main(["caption", str(tmp_path / "run"), image, "--max-new=5"]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: ")


@pytest.mark.parametrize(("kind", "group", "near"), [("int8", 0, 0.02), ("int4", 8, 0.1)])
def test_an_llm_of_integers_trains_and_resumes_like_its_bfloat16_source(
    world, trained, tmp_path, kind, group, near
):
    config = runs.public(world)
    with config.unlocked():
        config.components.llm[kind] = True
        config.components.llm.scale_group = group
        config.stages.vadapter.start = {"front": f"{trained}/decoder", "tlm": f"{trained}/decoder"}
        config.chain = ("vadapter",)
    train(read(config), tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run/vadapter/metrics.jsonl") if "loss" in row]
    whole = [row["loss"] for row in rows(trained / "vadapter/metrics.jsonl") if "loss" in row]
    np.testing.assert_allclose(losses, whole, rtol=near)
    assert losses != whole
    loaded = open_run(tmp_path / "run")
    down = loaded.params["llm"]["stack"]["blocks"]["mlp"]["down"]
    theirs = Checkpoint.open(world / "llm").files.read("model.layers.1.mlp.down_proj.weight")
    assert down["kernel"].dtype.name == kind
    step = np.asarray(down["kernel_scale"][1])
    steps = np.repeat(step, len(theirs.T) // len(step), 0)
    kernel = np.asarray(down["kernel"][1], np.float32)
    assert np.abs(kernel * steps - theirs.T).max() <= step.max() / 2 * 1.001
    assert loaded.digests["llm"] == open_run(trained, "vadapter").digests["llm"]


def tar(path, images):
    """Shards as img2dataset writes them: key.png and key.txt."""
    with tarfile.open(path, "w") as shard:
        for i, image in enumerate(images):
            for end, data in (("png", image.read_bytes()), ("txt", b"a shape on a ground")):
                member = tarfile.TarInfo(f"{i:05d}.{end}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


@pytest.mark.slow
def test_readmes_commands_check_and_train_generated_models(world, tmp_path, monkeypatch, capsys):
    images = sorted((world / "shapes").glob("*.png"))[:12]
    (tmp_path / "pairs").mkdir()
    for split, part in (("train", images[:8]), ("val", images[8:])):
        tar(tmp_path / "pairs" / f"{split}-000.tar", part)
    block = guides.blocks(
        guides.section("vadapter/weights/README.md", "Use your own models"), "bash"
    )[0]
    names, *commands = block.splitlines()
    models = names.removeprefix("MODELS=")
    for there, here in (
        ("openai/clip-vit-large-patch14", world / "clip"),
        ("HuggingFaceTB/SmolLM2-135M", world / "tlm"),
        ("/models/gemma-2-2b", world / "llm"),
        ("/data/pairs", tmp_path / "pairs"),
    ):
        assert there in models
        models = models.replace(there, str(here))
    monkeypatch.chdir(ROOT)
    sizes = {"queries": 4, "query_dim": 16, "hidden_dim": 16, "heads": 2}
    short = {"batch": 8, "steps": 2, "optim.warmup": 0}
    small = ["--config.dtype=float32", "--config.workers=0", "--config.chain=decoder,vadapter"]
    for part in ("resampler", "perceiver"):
        small += [f"--config.components.{part}.{key}={n}" for key, n in sizes.items()]
    for stage in ("decoder", "vadapter"):
        small += [f"--config.stages.{stage}.{key}={n}" for key, n in short.items()]
    assert [command.split()[1] for command in commands] == ["check", "train"]
    for command in commands:
        line = command.replace("$MODELS", models).replace("runs/mine", str(tmp_path / "run"))
        assert main.main([*line.split()[1:], *small]) == 0
    out = capsys.readouterr().out
    assert str(world / "llm") in out
    assert (tmp_path / "run" / "gallery.html").is_file()
    done = json.loads((tmp_path / "run/vadapter" / DONE).read_text())
    assert "val/cider" in done["scores"]


def test_readmes_components_are_a_recipes(world):
    section = guides.section("vadapter/weights/README.md", "Use your own models")
    code = guides.blocks(section, "python")[0].replace("    ...\n", "")
    found = {}
    exec(code, found)
    config = runs.public(world)
    with config.unlocked():
        for name, folder in (("encoder", "clip"), ("tlm", "tlm"), ("llm", "llm")):
            spec = found["components"][name] | {"weights": str(world / folder)}
            spec = {k: "last" if v == "queries" else v for k, v in spec.items()}
            config.components[name] = spec
    assert read(config).components["llm"]["int8"]
