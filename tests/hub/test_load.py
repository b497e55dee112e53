"""A faulty export is refused with the name of the fault; one of 0.1.0 is read."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.paths import TESTS

from vadapter import VAdapter
from vadapter.cli import main
from vadapter.errors import CheckpointError, ConfigError, UserError
from vadapter.evaluate.describe import Describer
from vadapter.hub.load import open_export
from vadapter.hub.record import read
from vadapter.hub.write import export
from vadapter.stages.restore import open_run


@pytest.fixture(scope="module")
def intact(exported):
    """The export, which can be opened."""
    open_export(exported)
    return exported


@pytest.fixture
def copy(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "adapter")


def tensors(change, name="model.safetensors"):
    """Rewrite a file with other tensors."""

    def spoil(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)

    return spoil


def flip(name, at):
    """Flip a bit of one byte."""

    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def record(**keys):
    """Change keys of config.json."""

    def spoil(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | keys))

    return spoil


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 5)


KERNEL = "fc_out/out/kernel"
FAULTS = {
    "no record": (lambda f: (f / "config.json").unlink(), "no exported adapter in .*config.json"),
    "a record cut short": (cut("config.json"), r"config\.json is corrupt"),
    "another record": (record(format="x"), r"config\.json is not the record of an exported"),
    "a newer version": (record(version=2, vadapter="9.1"), "version 2, written by vadapter 9.1;"),
    "an unknown key": (record(chian=[]), r"config\.json\.chian: unknown key; did you mean 'chain'"),
    "a key of another type": (record(step="two"), r"config\.json\.step: expected int"),
    "another prompt": (record(prompts={}), "trained with prompts other .*install vadapter 0.1"),
    "another view": (record(view={"size": 32, "crop_pct": 0.5}), "transform does not match"),
    "an unknown component": (record(chain=["front", "nose"]), "unknown 'nose'"),
    "a component without weights": (record(trained={}), "trained and frozen components are not"),
    "a text-only kind": (record(kind="lm"), "does not generate text about images"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "weights cut short": (cut("model.safetensors"), r"model\.safetensors: it is truncated"),
    "a changed bit": (flip("model.safetensors", -1), r"model\.safetensors is corrupt: \w+ does"),
    "no frozen part": (lambda f: (f / "frozen-llm.safetensors").unlink(), "n-llm.* is missing"),
    "a frozen part cut short": (cut("frozen-llm.safetensors"), "llm.safetensors: it is truncated"),
    "a changed frozen bit": (flip("frozen-encoder.safetensors", -1), "encoder does not match"),
    "a tensor too few": (tensors(lambda t: t.pop(KERNEL)), rf"{KERNEL} +\| \[16, 24\] +\| —"),
    "a tensor too many": (tensors(lambda t: t.update(a=np.zeros(3))), r"a +\| — +\| \[3\]"),
    "another shape": (
        tensors(lambda t: t.update({KERNEL: t[KERNEL][1:]})), r"\[16, 24\] \| \[15, 24\]",
    ),
    "another dtype": (
        tensors(lambda t: t.update({KERNEL: t[KERNEL].astype(np.float16)})), "fc_out does not",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "a tokenizer cut short": (cut("tokenizer.json"), r"tokenizer file .*tokenizer\.json"),
    "another tokenizer": (record(tokenizer="0" * 64), r"tokenizer\.json is not the tokeniz"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupt_export_is_refused_by_name(copy, fault):
    spoil, words = FAULTS[fault]
    spoil(copy)
    with pytest.raises(UserError, match=f"(?s){words}"):
        open_export(copy)


def test_a_moved_base_model_is_named_and_a_changed_one_is_refused(public, folder, tmp_path):
    export(open_run(public), tmp_path / "adapter")
    values = (tmp_path / "adapter" / "config.json").read_text()
    values = values.replace(str(public.parent), "/nowhere")
    (tmp_path / "adapter" / "config.json").write_text(values)
    with pytest.raises(CheckpointError, match=r"(?s)no folder '/nowhere/clip'.*\{'encoder': FOLD"):
        VAdapter.from_pretrained(tmp_path / "adapter")
    places = {"encoder": str(public.parent / "clip"), "llm": public.parent / "llm"}
    model = VAdapter.from_pretrained(tmp_path / "adapter", weights=places)
    image = folder / "shapes" / "02.png"
    assert model.caption(image) == VAdapter(open_run(public)).caption(image)

    other = shutil.copytree(public.parent / "llm", tmp_path / "llm")
    flip("model.safetensors", -1)(other)
    with pytest.raises(CheckpointError, match=r"(?s)llm: .*/llm has changed .*weights=\{'llm': F"):
        VAdapter.from_pretrained(tmp_path / "adapter", weights=places | {"llm": str(other)})
    with pytest.raises(ConfigError, match=r"'lm'.*did you mean 'llm'"):
        VAdapter.from_pretrained(tmp_path / "adapter", weights={"lm": str(other)})
    with pytest.raises(ConfigError, match=r"'tlm'.*not a frozen component with public weights"):
        VAdapter.from_pretrained(tmp_path / "adapter", weights={"tlm": str(other)})


def test_the_verbs_accept_an_export_instead_of_a_run(
    own, exported, public, folder, tmp_path, capsys
):
    image = str(folder / "shapes" / "02.png")

    def say(*argv):
        code = main.main([str(item) for item in argv])
        return code, *capsys.readouterr()

    for argv in (("caption", image), ("ask", image, "what is it?")):
        verb, *rest = argv
        assert say(verb, exported, *rest) == say(verb, own, *rest)
    assert "has only stage vadapter" in say("caption", exported, image, "--stage=llm")[2]
    export(open_run(public), tmp_path / "adapter")
    place = "--config.components.llm.weights="
    code, out, _ = say("caption", tmp_path / "adapter", image, f"{place}{public.parent / 'llm'}")
    assert (code, out) == say("caption", public, image)[:2]
    assert say("caption", tmp_path / "adapter", image, f"{place}/nowhere")[0] == 78
    assert (
        "only components.NAME.weights can be changed"
        in say("caption", exported, image, "--config.seed=1")[2]
    )


def test_an_export_of_version_0_1_0_loads_and_is_written_again_with_the_same_bytes(tmp_path):
    with tarfile.open(TESTS / "fixtures" / "export_0_1_0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    old = tmp_path / "export"
    loaded = open_export(old)
    assert read(old).vadapter == "0.1.0"
    (reply,) = Describer(loaded).replies([tmp_path / "image.png"])
    assert reply.text == (tmp_path / "caption.txt").read_text()
    export(loaded, tmp_path / "again")
    for name in ("model.safetensors", "frozen-encoder.safetensors", "frozen-llm.safetensors",
                 "tokenizer.json"):  # fmt: skip
        assert (tmp_path / "again" / name).read_bytes() == (old / name).read_bytes()
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (old, tmp_path / "again")
    )
    assert after == before | {"vadapter": after["vadapter"]}
