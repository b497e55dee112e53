"""A run whose encoder sees clips as a whole, on cached tokens, stopped and resumed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support import faults, runs, tiny
from support.patches import use_devices
from support.public_models import write_model
from support.recipes import FRAMES, SIZE

from vadapter import VAdapter
from vadapter.cli import main
from vadapter.errors import ConfigError, Preempted
from vadapter.io.json_files import rows
from vadapter.models.registry import make_module
from vadapter.recipe.schema import read
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import open_run
from vadapter.train.loop import train

VOCAB = 320
VIDEOMAE = {"model_type": "videomae", "hidden_size": 24, "num_attention_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 32, "patch_size": 8, "image_size": SIZE,
            "num_frames": FRAMES}  # fmt: skip


def recipe(world):
    """decoder → vadapter over clips and images, the tokens of both cached."""
    config = runs.small(world)
    with config.unlocked():
        config.components.encoder = {"weights": str(world / "videomae")}
        config.components.front = config.components.resampler
        config.components.llm.vocab_size = VOCAB
        config.chain = ("decoder", "vadapter")
        config.stages = {name: config.stages[name] for name in config.chain}
        for name in config.chain:
            stage = config.stages[name]
            stage.update(data={"images": 1.0, "clips": 1.0}, steps=4, eval_every=0, eval_limit=4)
        config.stages.decoder.start = {}
        config.stages.vadapter.start = {
            "front": "decoder",
            "tlm": "decoder",
            "llm": str(world / "outside" / "llm"),
        }
        config.data.clips.update(cache=True)
        config.evals.captions.update(data="held_clips", limit=4, max_new=3)
        config.tokenizer.data = ("images", "clips")
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What `runs.prepare` draws, a random VideoMAE, a random LLM, and a run that was stopped."""
    folder = runs.prepare(tmp_path_factory.mktemp("video"))
    write_model(folder / "videomae", VIDEOMAE)
    llm = make_module("llm", recipe(folder).components.llm.to_dict())
    params = {"llm": tiny.init(llm, jnp.zeros((1, 2), jnp.int32))}
    runs.finish_stage(folder / "outside" / "llm", params)
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        with faults.injected("TERM:vadapter:step:2"), pytest.raises(Preempted):
            train(read(recipe(folder)), folder / "run")
        train(read(recipe(folder)), folder / "run")
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def test_both_stages_train_resume_and_evaluate_on_clips(world):
    for name in ("decoder", "vadapter"):
        losses = [row["loss"] for row in rows(world / "run" / name / "metrics.jsonl")
                  if "loss" in row]  # fmt: skip
        assert np.isfinite(losses).all()
    done = json.loads((world / "run" / "vadapter" / DONE).read_text())
    assert "captions/cider" in done["scores"]


def test_probes_of_frames_are_refused(world, capsys):
    assert main.main(["inspect", str(world / "run"), "--probe"]) == ConfigError.exit_code
    assert "sees clips as a whole" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_it_captions_images_and_clips(world):
    media = [world / "shapes" / name for name in ("02.png", "02.gif")]
    assert len(VAdapter(open_run(world / "run")).caption(media, max_new=3)) == 2


@pytest.mark.slow
def test_the_resumed_run_ends_bit_equal_to_one_that_was_not_stopped(world, tmp_path):
    train(read(recipe(world)), tmp_path)
    for name in ("decoder", "vadapter"):
        whole, cut = (json.loads((root / name / DONE).read_text()) for root in
                      (world / "run", tmp_path))  # fmt: skip
        assert whole["components"] == cut["components"]


def test_check_shows_time_positions_and_a_clip_of_other_frames_is_refused(world, capsys):
    file = world / "recipe.py"
    file.write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(p) for p in (runs.TESTS, runs.TESTS / 'train')]!r}\n"
        "from pathlib import Path\nimport test_video_encoder\n"
        "def get_config(arg):\n"
        f"    config = test_video_encoder.recipe(Path({str(world)!r}))\n"
        "    config.data.clips.frames = int(arg)\n    return config\n"
    )
    assert main.main(["check", f"--config={file}:{FRAMES}"]) == 0
    shown = capsys.readouterr().out
    assert f"[B,{FRAMES},{SIZE},{SIZE},3]" in shown.replace(" ", "")
    assert f"[B,{FRAMES // 2},16,24]" in shown.replace(" ", "")
    assert main.main(["check", f"--config={file}:4"]) == ConfigError.exit_code
    assert "a clip has 4 frames, but the encoder takes 8" in "".join(capsys.readouterr())
