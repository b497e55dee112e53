"""A chain of a single component from beginning to end: LLaVA's linear layer, a projection."""

import json

import jax.numpy as jnp
import pytest
from support import runs, tiny
from support.patches import use_devices

from vadapter import VAdapter
from vadapter.hub.write import export
from vadapter.models.registry import make_module
from vadapter.recipe.schema import read
from vadapter.stages.restore import open_run
from vadapter.train.loop import train

VOCAB = 320


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What `runs.prepare` draws, and a run in it: images and clips through `fc_out` alone."""
    folder = runs.prepare(tmp_path_factory.mktemp("linear"))
    config = runs.small(folder)
    outside = folder / "outside"
    with config.unlocked():
        config.components.llm.update(vocab_size=VOCAB, dropout=0.0, max_len=256)
        llm = make_module("llm", config.components.llm.to_dict())
        params = {"llm": tiny.init(llm, jnp.zeros((1, 2), jnp.int32))}
        runs.finish_stage(outside / "llm", params)
        stage = config.stages.vadapter
        stage.update(chain=("fc_out",), data={"images": 1.0, "clips": 1.0}, loss=("held",))
        stage.start = {"encoder": str(outside / "vision"), "llm": str(outside / "llm")}
        stage.update(steps=4, eval_every=0, eval_limit=4, exit_layer=0)
        stage.optim.lr_mults = {}
        config.evals.captions.limit = 4
        config.tokenizer.data = ("images", "clips")
        config.chain, config.stages = ("linear",), {"linear": stage}
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(read(config), folder / "run")
    return folder


def test_it_trains_evaluates_and_writes_captions_of_images_and_clips(world, tmp_path):
    done = json.loads((world / "run" / "linear" / "done.json").read_text())
    assert set(done["components"]) == {"fc_out"}
    assert {"captions/cider", "held/loss"} <= set(done["scores"])
    loaded = open_run(world / "run")
    media = [world / "shapes" / name for name in ("02.png", "02.gif")]
    captions = VAdapter(loaded).caption(media, max_new=3)
    export(loaded, tmp_path / "adapter")
    assert VAdapter.from_pretrained(tmp_path / "adapter").caption(media, max_new=3) == captions
