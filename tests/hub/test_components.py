"""Exported components are the run's own, bit for bit, and start other runs wherever they are."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.patches import use_devices
from support.recipes import tiny_recipe

from vadapter import VAdapter, config
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.cli.main import main
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.errors import CheckpointError, ConfigError, DataError
from vadapter.hub import write
from vadapter.hub.components import export
from vadapter.hub.load import open_export
from vadapter.models.paths import flatten
from vadapter.recipe.schema import read
from vadapter.stages.restore import open_run
from vadapter.train.loop import train
from vadapter.weights import hub
from vadapter.weights.hf_checkpoint import complete
from vadapter.weights.reference import Reference

NAMES = {"encoder": "vision/encoder", "tlm": "tlm/tlm", "llm": "llm/llm"}


@pytest.fixture(scope="module")
def packaged(chain, tmp_path_factory):
    """encoder/, tlm/ and llm/ in bfloat16, in a folder that is taken for that of the package."""
    folder = tmp_path_factory.mktemp("packaged")
    words = ["export", chain / "run", folder / "tiny", "--dtype=bfloat16"]
    assert main([*map(str, words), f"--components={','.join(NAMES.values())}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "PACKAGE", folder)
        yield folder / "tiny"


@pytest.fixture
def copy(packaged, tmp_path):
    """The three components in a folder that the test may write to."""
    return shutil.copytree(packaged, tmp_path / "copy")


def recipe(chain, weights: str):
    """The chain of stages after the pretraining, two steps each, over components of `weights`."""
    values = tiny_recipe(chain / "shapes", steps=2)
    with values.unlocked():
        for name in NAMES:
            values.components[name] = {"weights": f"{weights}/{name}"}
        values.chain = ("decoder", "vadapter")
        values.stages = {name: values.stages[name] for name in values.chain}
        values.stages.decoder.start = {}
        values.stages.vadapter.start = dict.fromkeys(("resampler", "fc_in", "tlm"), "decoder")
        values.stages.vadapter.evals = ()
        values.stages.vadapter.eval_every = 0
    return values


def stored(chain, name):
    """Return the leaves of a component of the run, by path."""
    stage = NAMES[name].partition("/")[0]
    done = json.loads((chain / "run" / stage / "done.json").read_text())
    store, digest = ComponentStore(chain / "run" / "components"), done["components"][name]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for path, (shape, dtype) in store.describe(name, digest).items()
    }
    leaves = store.get(name, digest, abstract)
    return {path.replace(".", "/"): leaf for path, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_the_run_rounded_once(chain, tmp_path, name, dtype):
    export(chain / "run", [NAMES[name]], tmp_path / "out", dtype)
    spec = complete({"weights": str(tmp_path / "out" / name)}, "weights")
    expected = stored(chain, name)
    abstract = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in expected.items()}
    found = dict(Reference.of(name, spec).open().leaves(abstract))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected[path].astype(dtype).astype(jnp.float32))
    assert spec["kind"] == ("vit" if name == "encoder" else "lm")
    if name != "encoder":
        tokenizer = load_tokenizer(tmp_path / "out" / name)
        assert tokenizer.digest == load_tokenizer(chain / "run" / "tokenizer.json").digest
        assert spec["vocab_size"] == tokenizer.vocab_size


def test_the_recipe_in_the_folder_makes_the_same_bytes_again(chain, tmp_path, monkeypatch):
    export(chain / "run", ["tlm/tlm"], tmp_path / "first")
    use_devices(monkeypatch, 1)
    words = ["train", f"--config={tmp_path / 'first' / 'recipe.json'}"]
    assert main([*words, f"--workdir={tmp_path / 'again'}"]) == 0
    assert not (tmp_path / "again" / "llm").exists()
    export(tmp_path / "again", ["tlm/tlm"], tmp_path / "second")
    for name in ("recipe.json", "tlm/model.safetensors", "tlm/tokenizer.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.fixture(scope="module")
def started(chain, packaged, tmp_path_factory):
    """A finished run that started from packaged components."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(read(recipe(chain, "packaged:tiny")), workdir)
    return workdir


def test_a_run_of_packaged_components_records_where_they_came_from(started, packaged):
    done = json.loads((started / "vadapter" / "done.json").read_text())
    for name in ("encoder", "llm"):
        record = json.loads((started / "components" / f"{name}.json").read_text())
        assert record["weights"] == f"packaged:tiny/{name}"
        sha256 = json.loads((packaged / name / "config.json").read_text())["sha256"]
        assert record["digest"] == done["identity"]["start"][name] == f"sha256:{sha256}"
    leaves = flatten(open_run(started).params["llm"])
    spec = complete({"weights": str(packaged / "llm")}, "weights")
    read_again = dict(Reference.of("llm", spec).open().leaves(leaves))
    assert combined(tree_digests(leaves)) == combined(tree_digests(read_again))


def test_an_export_of_such_a_run_refers_to_the_packaged_components(started, chain, tmp_path):
    loaded = open_run(started)
    write.export(loaded, tmp_path / "adapter")
    said = write.report(tmp_path / "adapter")
    assert "llm: not included, public weights packaged:tiny/llm" in said
    assert "OWNER/NAME" not in said
    assert "packaged:tiny/llm" in (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model" not in (tmp_path / "adapter" / "README.md").read_text()
    model = VAdapter.from_pretrained(tmp_path / "adapter")
    for name, tree in loaded.params.items():
        assert combined(tree_digests(model.loaded.params[name])) == combined(tree_digests(tree))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit of a tensor": (
        lambda folder: flip(folder / "model.safetensors", -1),
        r"corrupt: their SHA-256 is .*reinstall it: pip install",
    ),
    "a truncated file": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-2]
        ),
        r"model\.safetensors: it is truncated or corrupt",
    ),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace("false", "true", 1)
        ),
        r"tokenizer .*tokenizer\.json is corrupt",
    ),
    "no digest": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"sha256"', '"sha1"')
        ),
        r"config\.json has no 'sha256'",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_corrupt_component_starts_no_run(chain, copy, tmp_path, monkeypatch, case):
    change, words = DAMAGES[case]
    change(copy / "tlm")
    use_devices(monkeypatch, 1)
    with pytest.raises((CheckpointError, DataError), match=words):
        train(read(recipe(chain, str(copy))), tmp_path / "run")
    assert not (tmp_path / "run" / "decoder" / "checkpoints").exists()


def test_a_finished_run_refuses_components_that_have_changed(started, packaged, tmp_path):
    run = shutil.copytree(started, tmp_path / "run")
    write.export(open_run(run), tmp_path / "adapter")
    good = (packaged / "llm" / "model.safetensors").read_bytes()
    try:
        flip(packaged / "llm" / "model.safetensors", -1)
        with pytest.raises(CheckpointError, match=r"corrupt: their SHA-256"):
            open_run(run)
        with pytest.raises(CheckpointError, match=r"corrupt: their SHA-256"):
            open_export(tmp_path / "adapter")
    finally:
        (packaged / "llm" / "model.safetensors").write_bytes(good)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("packaged:tiny/lm", r"not in this package; did you mean 'tiny/[tl]lm'\?"),
        ("packaged:", "not in this package; known: tiny/encoder, tiny/llm, tiny/tlm"),
        ("packaged:../tiny/llm", "not in this package"),
    ],
)
def test_what_is_not_packaged_is_refused_with_the_nearest_name(packaged, spec, words):
    with pytest.raises(CheckpointError, match=words):
        hub.resolve(spec)
    assert hub.resolve("packaged:tiny/llm").path == packaged / "llm"


MISTAKES = {
    "encoder": "expected STAGE/NAME, such as vision/encoder",
    "visoin/encoder": "did you mean 'vision'",
    "vision/tlm": "'tlm' of vision: unknown; known: encoder, fusion, pooler, text",
    "vadapter/fc_out": "for mobilenet, video_vit, vit, lm, qformer, not for kind fc",
    "tlm/tlm,decoder/tlm": "--components: tlm twice",
}


@pytest.mark.parametrize("names", MISTAKES)
def test_what_cannot_be_exported_is_explained(chain, tmp_path, names):
    with pytest.raises(ConfigError, match=MISTAKES[names]):
        export(chain / "run", names.split(","), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_components_replace_earlier_ones_and_nothing_else(chain, copy, tmp_path, capsys):
    export(chain / "run", ["tlm/tlm"], copy)
    assert sorted(path.name for path in copy.iterdir()) == ["recipe.json", "tlm"]
    (copy / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    words = ["export", str(chain / "run"), str(copy), "--components=llm/llm"]
    assert main(words) == 78
    assert "not a folder of components alone (notes.txt)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    for option in ("--stage=vadapter", "--config.components.llm.weights=x"):
        assert main([*words, option]) == 78
    assert main([*words[:3], "--dtype=bfloat16"]) == 78


def test_the_quickstart_over_components_leaves_their_pretraining_out(packaged):
    whole, rest = (
        read(config.load(f"configs/quickstart.py{arg}"))
        for arg in (":weights=", f":weights={packaged}")
    )
    assert whole.chain == ("tlm", "llm", "vision", *rest.chain)
    for name in rest.chain:
        start = rest.stages[name].start
        assert {start[part] for part in NAMES if part in start} <= {"weights", "decoder"}
    assert {n: rest.components[n]["weights"] for n in NAMES} == {
        n: f"{packaged}/{n}" for n in NAMES
    }
