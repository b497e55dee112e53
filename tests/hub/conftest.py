"""Two trained runs to export: one whose frozen parts are its own, one of public checkpoints."""

import json
from pathlib import Path

import pytest
from support import runs
from support.patches import use_devices
from support.public_models import write_model
from support.public_tokenizers import llama2, neox
from support.shared import make_once

from vadapter.hub.write import export
from vadapter.recipe.schema import read
from vadapter.stages.restore import open_run
from vadapter.train.loop import train

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 8}  # fmt: skip
LM = {"intermediate_size": 32, "num_hidden_layers": 1,
      "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """shapes/ with images and clips, and an encoder that another run has trained."""
    return make_once(tmp_path_factory, "exports", runs.prepare)


@pytest.fixture(scope="session")
def own(folder, tmp_path_factory) -> Path:
    """A run of the chain llm → decoder → vadapter: nothing in it is public."""
    root = make_once(tmp_path_factory, "own", lambda root: _train(runs.small(folder), root / "own"))
    return root / "own"


@pytest.fixture(scope="session")
def public(folder, tmp_path_factory) -> Path:
    """A run whose encoder, tiny LM and LLM are folders beside it: clip/, tlm/ and llm/."""
    root = make_once(tmp_path_factory, "public", lambda root: _train_public(folder, root))
    return root / "public"


def _train_public(shapes: Path, folder: Path) -> None:
    write_model(folder / "clip", {"model_type": "clip_vision_model", **CLIP}, "vision_model.")
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32,
              "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    for name, tokenizer, kind, width in (
        ("tlm", neox, "gpt_neox", 16), ("llm", llama2, "llama", 24),
    ):  # fmt: skip
        config = json.loads((tokenizer(folder / name) / "config.json").read_text())
        keys = {**LM, "hidden_size": width, "model_type": kind}
        write_model(folder / name, {**config, **keys})
    config = runs.small(shapes)
    with config.unlocked():
        for part, name in (("encoder", "clip"), ("tlm", "tlm"), ("llm", "llm")):
            config.components[part] = {"weights": str(folder / name)}
        config.chain = ("vadapter",)
        config.stages = {"vadapter": config.stages.vadapter}
        config.stages.vadapter.start = {}
        config.tokenizer.data = ()
        config.data.images.update(text_len=80, target_len=78, fit="pad")
    _train(config, folder / "public")


def _train(config, workdir: Path) -> None:
    with config.unlocked():
        for stage in config.stages.values():
            stage.update(steps=2, save_every=2, eval_every=0, eval_limit=4)
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(read(config), workdir)


@pytest.fixture(scope="session", params=["own", "public"])
def pair(request, tmp_path_factory):
    """(the stage opened from its run, its export), of either run."""
    loaded = open_run(request.getfixturevalue(request.param))
    target = tmp_path_factory.mktemp(request.param) / "adapter"
    export(loaded, target)
    return loaded, target


@pytest.fixture(scope="session")
def exported(own, tmp_path_factory) -> Path:
    """The export of `own`; tests leave it as it is."""
    target = tmp_path_factory.mktemp("whole") / "adapter"
    export(open_run(own), target)
    return target
