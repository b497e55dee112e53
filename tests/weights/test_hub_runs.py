"""A recipe that names a hub id: the commit is pinned in the run's record, and the cache is enough.

Each case runs in a process of its own, as in test_hub.
"""

import json
import subprocess
import sys

import pytest
from support.hub_server import NEW, OLD
from support.paths import TESTS
from support.public_models import write_model
from support.public_tokenizers import llama2
from support.recipes import draw

LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
# As `vadapter train` reads a recipe, up to the first stage; then as `vadapter eval` reads the run.
SCRIPT = """
import sys
from pathlib import Path
from absl import flags
flags.FLAGS.mark_as_parsed()
import jax
from support.runs import text_only
from vadapter.errors import CheckpointError
from vadapter.distributed.mesh import make_mesh
from vadapter.stages import run
from vadapter.train.host_agreement import write_record
from vadapter.recipe.schema import read
from vadapter.stages.restore import read_run

folder, weights = Path(sys.argv[1]), sys.argv[2]
try:
    if weights:
        config = text_only(folder)
        with config.unlocked():
            config.components.llm = {"weights": weights}
            config.tokenizer.data = ()
        made = run.Run(read(config), folder / "run")
        made.check()
        write_record(made.recipe, made.workdir)
    print(read_run(folder / "run").components["llm"]["width"])
except CheckpointError as error:
    print(error)
"""


@pytest.fixture
def world(hub, env, tmp_path):
    """A hub that has a tiny Llama: (hub, environment, folder with a recipe's data)."""
    config = json.loads((llama2(tmp_path / "model") / "config.json").read_text())
    write_model(tmp_path / "model", {**config, **LLAMA})
    hub.files = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    draw(tmp_path / "shapes")
    paths = f"{TESTS.parent}:{TESTS}"
    return hub, {**env, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": paths}, tmp_path


def ask(world, weights: str, **env) -> str:
    """What the script prints."""
    _, base, folder = world
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), weights],
        env={**base, **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def recorded(world) -> str:
    config = json.loads((world[2] / "run" / "config.json").read_text())
    return config["components"]["llm"]["weights"]


def test_a_run_records_the_commit_of_a_hub_id_and_is_read_again_offline(world):
    hub = world[0]
    assert ask(world, "owner/model") == "24"
    assert recorded(world) == f"owner/model@{NEW}"
    assert any(path.endswith("model.safetensors") for _, path in hub.asked)
    hub.asked.clear()
    assert ask(world, "", HF_HUB_OFFLINE="1") == "24"
    assert ask(world, "owner/model", HF_HUB_OFFLINE="1") == "24"
    assert recorded(world) == f"owner/model@{NEW}"
    assert not hub.asked


@pytest.mark.slow
def test_a_branch_that_moves_does_not_move_the_run(world):
    hub = world[0]
    assert ask(world, "owner/model") == "24"
    hub.main, before = OLD, recorded(world)
    assert ask(world, "") == "24"
    assert ask(world, before) == "24"
    assert recorded(world) == before == f"owner/model@{NEW}"
    assert ask(world, "owner/model") == "24"
    assert recorded(world) == f"owner/model@{OLD}", "it was read where it stands now"


def test_a_run_whose_weights_are_not_in_the_cache_names_the_key_and_the_command(world):
    message = ask(world, "owner/model", HF_HUB_OFFLINE="1")
    assert message.startswith("components.llm.weights: owner/model at revision 'main' is not in")
    assert "hf download owner/model" in message
