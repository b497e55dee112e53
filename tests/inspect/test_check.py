"""`vadapter check`: what a recipe trains and what would stop it, from headers alone."""

import functools
import itertools
import json
import re

import jax
import numpy as np
import pytest
from support import runs, tiny
from support.mobilenet_files import write_mobilenet
from support.public_models import write_model
from support.public_tokenizers import llama2, neox

from vadapter import config
from vadapter.cli.main import main
from vadapter.errors import CheckpointError, ConfigError, Problems, UserError
from vadapter.inspect.check import check
from vadapter.inspect.check_text import as_text
from vadapter.models.mobilenet import MobileNetConfig
from vadapter.models.registry import make_module
from vadapter.recipe.schema import read
from vadapter.stages.run import Run
from vadapter.weights import mobilenet, npz
from vadapter.weights.mobilenet import MobileNetFiles
from vadapter.weights.safetensors import TensorFiles

CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "image_size": 32, "num_attention_heads": 2,
        "patch_size": 8}  # fmt: skip
LM = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
      "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip


def language_model(folder, tokenizer, model_type, **keys):
    written = json.loads((tokenizer(folder) / "config.json").read_text())
    return write_model(folder, {**written, **LM, "model_type": model_type, **keys})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP, a tiny LM, an LLM and images."""
    folder = tmp_path_factory.mktemp("check")
    runs.prepare(folder)
    left_out = {"logit_scale": np.zeros(()), "visual_projection.weight": np.zeros((7, 16))}
    write_model(folder / "clip", CLIP, "vision_model.", **left_out)
    language_model(folder / "tlm", neox, "gpt_neox", hidden_size=16)
    language_model(folder / "llm", llama2, "llama")
    return folder


def forbid_reading(monkeypatch):
    """Let the test fail if a tensor or a digest is read, or an array is put on a device."""

    def fail(*args, **kwargs):
        pytest.fail("a tensor was read")

    for owner, name in (
        (TensorFiles, "read"), (TensorFiles, "digest"), (npz, "read_npz"),
        (mobilenet, "load_mobilenet"), (MobileNetFiles, "digest"), (jax, "device_put"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, fail)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    forbid_reading(monkeypatch)


@pytest.fixture(scope="module")
def public(world):
    """The facts of the recipe of public checkpoints, and the names of JAX's compilation events."""
    events = []

    def listen(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            forbid_reading(monkeypatch)
            facts = checked(runs.public(world))
    finally:
        jax.monitoring.clear_event_listeners()
    return facts, [name for name in events if "compile" in name]


ONE = "--config.stages.llm.accumulate=1"  # eight devices share a batch of eight


def small(world):
    """llm → decoder → vadapter of `runs`, with a tokenizer that is trained on texts."""
    made = runs.small(world)
    made.stages.llm.accumulate = 1
    return made


def checked(config, workdir=None):
    """Facts and problems of a ConfigDict."""
    return check(lambda: read(config), workdir)[0]


def stages(facts):
    return {stage["name"]: stage for stage in facts["stages"]}


def parts(stage):
    return {part["name"]: part for part in stage["components"]}


def shapes(part):
    """Shapes of one row of a component's input (of a language model: by name) and output."""

    def row(leaf):
        return leaf and leaf["shape"][1:]

    enters = part["enters"]
    inputs = row(enters) if "shape" in enters else {k: row(leaf) for k, leaf in enters.items()}
    return inputs, row(part["leaves"])


# -- what it tells -----------------------------------------------------------------------------


def test_the_quickstart_is_described_from_pixels_to_words_without_a_problem():
    recipe = config.load("configs/quickstart.py:weights=")
    facts = checked(recipe)
    assert facts["problems"] == []
    assert [s["name"] for s in facts["stages"]] == list(recipe.chain)
    stage = stages(facts)["vadapter"]
    flow = {name: shapes(part) for name, part in parts(stage).items()}
    lm = {"prompt": [24], "prefix": [64, 128], "tokens": [76]}
    assert flow == {
        "encoder": ([8, 64, 64, 3], [8, 64, 128]),
        "resampler": ([8, 64, 128], [64, 96]),
        "fc_in": ([64, 96], [64, 96]),
        "tlm": ([64, 96], [64, 96]),
        "fc_out": ([64, 96], [64, 128]),
        "llm": (lm, [72, 512]),
    }
    assert [p["name"] for p in stage["components"] if not p["trained"]] == ["encoder", "llm"]
    assert parts(stage)["tlm"]["start"]["from"] == "stage decoder"
    assert parts(stage)["tlm"]["start"]["left_out"] == ["embedding.embedding"]
    assert parts(stage)["fc_out"]["start"]["from"] == "random"
    data = {d["name"]: (d["task"], d["examples"], d["use"]) for d in stage["data"]}
    assert data["images"] == ("caption", 8640, ["train 4"])
    assert data["held_images"] == ("caption", 200, ["loss", "eval captions"])
    vision = {name: shapes(part) for name, part in parts(stages(facts)["vision"]).items()}
    assert vision["pooler"] == ([1, 64, 128], [33, 128])
    assert vision["fusion"][1] == [46, 512]


@pytest.mark.parametrize(("encoder", "llm"), [("b", "1b"), ("l", "1b"), ("g", "8b")])
def test_the_papers_scales_are_reported_and_only_missing_files_are_problems(
    encoder, llm, tmp_path, monkeypatch
):
    monkeypatch.delenv("VADAPTER_DATA", raising=False)
    arg = f"encoder={encoder},llm={llm}"
    facts = checked(config.load(f"configs/paper.py:{arg}"), tmp_path)
    stage = stages(facts)["vadapter"]
    frozen = {"b": 0.087, "l": 0.304, "g": 1.01}[encoder] + {"1b": 1.6, "8b": 9.64}[llm]
    assert stage["parameters"]["frozen"] / 1e9 == pytest.approx(frozen, rel=0.02)
    assert stage["memory"]["frozen"] == 2 * stage["parameters"]["frozen"]  # bfloat16
    trainable = stage["parameters"]["trained"]
    assert (stage["memory"]["trained"], stage["memory"]["moments"]) == (
        4 * trainable,
        8 * trainable,
    )
    assert shapes(parts(stage)["encoder"])[0] == [8, 288, 288, 3]
    assert shapes(parts(stage)["llm"])[0]["prefix"][0] == 256
    problems = "\n".join(facts["problems"])
    missing = ("pretrained/encoder", "pretrained/llm", "stage1/decoder")
    assert len(facts["problems"]) == len(missing) + 2
    assert all(f"stage {name} is not finished" in problems for name in missing)
    assert all(f"data.{name}.source" in problems for name in ("pairs", "clips"))


@pytest.mark.parametrize("arg", ["stage=1", "adapter=resampler", "adapter=mlp", "front=pooler"])
def test_the_papers_other_rows_go_through_their_models(arg, tmp_path, monkeypatch):
    monkeypatch.delenv("VADAPTER_DATA", raising=False)
    facts = checked(config.load(f"configs/paper.py:{arg}"), tmp_path)
    for stage in facts["stages"]:
        assert all(part["leaves"] for part in stage["components"])
    assert all("not finished" in p or "source" in p for p in facts["problems"])


def test_public_checkpoints_are_described_by_their_headers(world, public):
    facts, _ = public
    assert facts["problems"] == []
    stage = stages(facts)["vadapter"]
    start = parts(stage)["encoder"]["start"]
    assert start["weights"] == str(world / "clip")
    weights = world / "clip" / "model.safetensors"
    assert (start["files"], start["bytes"]) == (1, weights.stat().st_size)
    assert start["tensors"] == 5 + 2 * 16
    assert start["left_out"] == ["logit_scale", "visual_projection.weight"]
    tokenizer = stage["tokenizer"]
    assert tokenizer["of"] == "llm"
    assert tokenizer["bos"] == [{"id": 1, "token": "<s>"}]
    assert tokenizer["eos"] == tokenizer["stop"] == [{"id": 2, "token": "</s>"}]
    assert tokenizer["padding_rows"] == 7
    assert stages(facts)["decoder"]["tokenizer"]["bos"] == [{"id": 0, "token": "<|endoftext|>"}]


def test_the_text_is_aligned_narrow_and_has_the_same_facts(public):
    text = as_text(public[0])
    assert max(map(len, text.splitlines())) < 100
    assert re.search(r"\n  encoder +vit +u8\[B,1,32,32,3\] +[\d,]+ +frozen +…?\S+clip\n", text)
    assert re.search(r"\n +→ \[B,1,16,16\] +1 file, \d+\.?\d* kB\n", text)
    assert "37 tensors" in text
    assert "2 unused" in text
    assert re.search(r"eos 2 </s>, stop 2 </s>; llm has \d+ rows, 7\s+unused", text)
    assert re.search(r"\n  images +caption +train 1 +24  1 × 32 px, prompt \d+, text 80", text)


def test_fast_decoding_is_stated_beside_the_size_of_the_images(world):
    made = runs.public(world)
    with made.unlocked():
        made.data.images.decode = "fast"
    facts = checked(made)
    assert {d["name"]: d["decode"] for d in stages(facts)["vadapter"]["data"]}["images"] == "fast"
    assert " 1 × 32 px, JPEGs fast, prompt" in as_text(facts)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.65), ("int4", 0.58)])
def test_integers_take_a_share_of_the_memory_of_the_frozen_llm(world, public, kind, share):
    made = runs.public(world)
    whole = stages(public[0])["vadapter"]["memory"]["frozen"]
    with made.unlocked():
        made.components.llm[kind] = True
    facts = checked(made)
    assert facts["problems"] == []
    stage = stages(facts)["vadapter"]
    assert parts(stage)["llm"]["integers"] == kind
    assert stage["memory"]["frozen"] < share * whole
    assert f"float32 and {kind}" in as_text(facts)


def test_memory_is_also_reported_per_device(world):
    made = runs.public(world)
    with made.unlocked():
        made.chain = ("decoder",)
        made.mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    memory = stages(checked(made))["decoder"]["memory"]
    assert memory["moments"] / 8 < memory["per_device"]["moments"] < memory["moments"] / 2
    with made.unlocked():
        made.mesh = {"data": 3, "fsdp": 1, "tensor": 1}
    facts = checked(made)
    assert "per_device" not in stages(facts)["decoder"]["memory"]
    assert facts["mesh"] is None
    assert ["does not cover 8 devices" in p for p in facts["problems"]] == [True]


@pytest.fixture(scope="module")
def untrained(world, tmp_path_factory):
    """A run directory without a tokenizer, and the facts of a recipe that will train one."""
    workdir = tmp_path_factory.mktemp("untrained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        forbid_reading(monkeypatch)
        return workdir, checked(small(world), workdir)


def test_an_untrained_tokenizer_is_reported_as_a_bound(untrained):
    workdir, facts = untrained
    assert facts["problems"] == []
    assert not list(workdir.iterdir()), "it was trained"
    tokenizer = stages(facts)["vadapter"]["tokenizer"]
    assert (tokenizer["of"], tokenizer["exact"], tokenizer["vocab_size"]) == ("run", False, 320)
    assert "tokenizer of the run, not trained yet: at most 320 ids" in as_text(facts)


def test_the_multiplier_of_a_components_learning_rate_is_shown(untrained):
    facts = untrained[1]
    stage = stages(facts)["vadapter"]
    assert {name: part["lr_mult"] for name, part in parts(stage).items() if part["trained"]} == {
        "front": 1, "tlm": 0.5, "fc_out": 1
    }  # fmt: skip
    assert sum("lr × 0.5" in line for line in as_text(facts).splitlines()) == 1


# -- side effects ----------------------------------------------------------------------


def finished_llm(folder, world):
    """Its tokenizer has reached 300 ids of the 320 that it may have."""
    spec = {**small(world).components.llm.to_dict(), "vocab_size": 300}
    runs.finish_stage(folder, {"llm": tiny.init(make_module("llm", spec), np.zeros((1, 2), int))})


def state(folder):
    """The files of a folder with their contents and times."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_nothing_is_written_anywhere(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VADAPTER_COMPILE_CACHE", str(tmp_path / "compiled"))
    recipe, before = runs.write_recipe(world), state(world)
    finished_llm(tmp_path / "run" / "llm", world)
    there = state(tmp_path)
    assert main(["check", f"--config={recipe}", ONE, f"--workdir={tmp_path / 'run'}"]) == 0
    assert main(["check", f"--config={recipe}", ONE, "--config.chain=llm"]) == 0
    made = runs.public(world)
    with made.unlocked():
        made.chain = ("decoder",)
    checked(made, tmp_path / "other")
    assert (state(world), state(tmp_path)) == (before, there)
    assert "llm: lm, 6 steps of 8, float32, mesh data=8 fsdp=1 tensor=1, finished" in (
        capsys.readouterr().out
    )


def test_no_program_is_compiled(public):
    _, compilations = public
    assert [name for name in compilations if "backend" in name] == []


@pytest.mark.parametrize("source", ["drawn", pytest.param("real", marks=pytest.mark.data)])
def test_mobilenet_is_matched_by_its_graph_and_headers_alone(request, source, tmp_path):
    abstract = mobilenet.abstract_params(MobileNetConfig())
    if source == "real":
        folder = request.getfixturevalue("data_root") / "weights/mobilenet"
    else:
        folder = write_mobilenet(tmp_path)
    found = MobileNetFiles.open(folder).match(abstract)
    assert (found.tensors, found.parameters) == (104, 2_223_872 - 17_056)
    assert found.unused == ("head",)
    small = mobilenet.abstract_params(MobileNetConfig(width_mult=0.5))
    with pytest.raises(CheckpointError, match="mismatched: block_00"):
        MobileNetFiles.open(folder).match(small)


# -- problems -----------------------------------------------------------------------------


def spoil_weights(made, world, tmp_path):
    def drop(tensors):
        del tensors["vision_model.pre_layrnorm.bias"]

    write_model(tmp_path / "clip", CLIP, "vision_model.", spoil=drop)
    made.components.encoder.weights = str(tmp_path / "clip")


def small_vocabulary(made, world, tmp_path):
    made.components.tlm.vocab_size = 300


def no_images(made, world, tmp_path):
    made.data.images.source = made.data.documents.source


def another_llm(made, world, tmp_path):
    made.components.other = made.components.llm.to_dict() | {"depth": 2}
    vadapter = made.stages.vadapter
    del vadapter.start["llm"]
    vadapter.start.other = "llm"
    vadapter.update(lm="other", rename={"other": "llm"})


def elsewhere(made, world, tmp_path):
    made.stages.decoder.start.encoder = str(tmp_path / "nowhere" / "vision")


def no_table(made, world, tmp_path):
    made.data.images.source.table = str(tmp_path / "nowhere.jsonl")


FAULTS = {
    "a frozen component without a source": (
        lambda m, w, t: m.stages.decoder.start.__delitem__("encoder"),
        r"encoder is frozen .* no source of weights"),
    "a stage elsewhere that is not there": (elsewhere, r"nowhere/vision is not finished"),
    "a vocabulary below the tokenizer's": (
        small_vocabulary, r"tlm\.vocab_size=300 is smaller than the tokenizer's 320"),
    "widths": (
        lambda m, w, t: m.components.front.update(width=20), r"gives width 20, but tlm reads 16"),
    "heads": (lambda m, w, t: m.components.tlm.update(heads=3), r"its model cannot be built"),
    "rows past max_len": (
        lambda m, w, t: m.components.llm.update(max_len=50),
        r"56 tokens in a row .*components\.llm has max_len=50"),
    "rows past learned positions": (
        lambda m, w, t: m.components.llm.update(positions="learned", max_len=50),
        r"56 tokens in a row .*components\.llm has max_len=50"),
    "data that is not there": (no_table, r"nowhere\.jsonl"),
    "a source of another kind": (
        lambda m, w, t: m.data.images.source.update(kind="folders"), r"kind='folders': unknown"),
    "an image of another size than the positions": (
        lambda m, w, t: m.data.images.update(size=40), r"row of data 'images' does not go"),
    "a batch that does not divide": (
        lambda m, w, t: m.stages.decoder.update(batch=12), r"batch=12 does not divide over 8"),
    "data without images": (no_images, r"data 'images' has no images"),
    "a tokenizer without texts": (
        lambda m, w, t: m.tokenizer.update(data=()), r"config\.tokenizer\.data: empty"),
    "a tokenizer too small for the bytes": (
        lambda m, w, t: m.tokenizer.update(vocab_size=100), r"vocab_size=100 is too small"),
    "a stage before that has other leaves": (another_llm, r"other from stage llm does not fit"),
}  # fmt: skip


# Faults that do not hide each other are in one recipe, which is checked once.
TOGETHER = (
    ("data that is not there", "a batch that does not divide",
     "a vocabulary below the tokenizer's"),
    ("rows past max_len", "a stage elsewhere that is not there"),
    ("rows past learned positions", "a frozen component without a source"),
    ("a stage before that has other leaves", "data without images"),
    ("an image of another size than the positions", "a tokenizer without texts"),
    ("widths", "a tokenizer too small for the bytes"),
    ("heads", "a source of another kind"),
)  # fmt: skip
PUBLIC_TOGETHER = (
    ("a tensor that is missing", "a batch larger than the data"),
    ("weights that are not there",),
    ("a pickle",),
    ("no room for a text",),
)


@pytest.fixture(scope="module")
def check_faults(world, tmp_path_factory):
    """Return a function that checks a recipe with faults, the same ones only once."""

    @functools.cache
    def check_once(recipe, names):
        faults, folder = FAULTS | PUBLIC_FAULTS, tmp_path_factory.mktemp("faults")
        made = recipe(world)
        with made.unlocked():
            for name in names:
                spoil, _ = faults[name]
                spoil(made, world, folder)
        return check(lambda: read(made), folder / "run")

    return check_once


def test_every_fault_is_checked():
    assert sorted(itertools.chain(*TOGETHER)) == sorted(FAULTS)
    assert sorted(itertools.chain(*PUBLIC_TOGETHER)) == sorted(PUBLIC_FAULTS)


@pytest.mark.parametrize(
    ("names", "name"),
    [pytest.param(names, name, id=name) for names in TOGETHER for name in names],
)
def test_faults_of_a_recipe_are_reported(names, name, check_faults):
    facts, problems = check_faults(small, names)
    message = FAULTS[name][1]
    assert re.search(message, "\n".join(facts["problems"]), re.DOTALL), facts["problems"]
    as_text(facts)
    with pytest.raises(UserError, match=f"(?s){message}") as met:
        problems.settle()
    assert met.value.exit_code == 78


PUBLIC_FAULTS = {
    "a tensor that is missing": (spoil_weights, r"missing: .*pre_layrnorm\.bias"),
    "weights that are not there": (
        lambda m, w, t: m.components.llm.update(weights=str(t / "gone")),
        r"llm\.weights: There is no folder"),
    "a batch larger than the data": (
        lambda m, w, t: m.stages.decoder.update(batch=32), r"24 usable examples in 'images'"),
    "no room for a text": (
        lambda m, w, t: m.data.images.update(text_len=3, target_len=1), r"are too small"),
    "a pickle": (
        lambda m, w, t: (
            (t / "pt").mkdir(), (t / "pt" / "config.json").write_text(json.dumps(CLIP)),
            (t / "pt" / "pytorch_model.bin").write_bytes(b"\x80"),
            m.components.encoder.update(weights=str(t / "pt"))), r"only \.safetensors is supp"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "name"),
    [pytest.param(names, name, id=name) for names in PUBLIC_TOGETHER for name in names],
)
def test_faults_of_public_checkpoints_are_reported(names, name, check_faults):
    facts, _ = check_faults(runs.public, names)
    message = PUBLIC_FAULTS[name][1]
    assert re.search(message, "\n".join(facts["problems"]), re.DOTALL), facts["problems"]


def test_all_problems_are_reported_once_and_the_command_exits_with_78(world, tmp_path, capsys):
    recipe = runs.write_recipe(world)
    spoil = ("stages.decoder.batch=12", "data.images.source.table=/nowhere.jsonl",
             "components.llm.max_len=50",
             "stages.vadapter.start.encoder=/nowhere/vision")  # fmt: skip
    code = main(["check", f"--config={recipe}", ONE, *(f"--config.{item}" for item in spoil)])
    out, err = capsys.readouterr()
    assert code == 78
    assert "vadapter: adapter, 6 steps of 8" in out
    assert "vadapter: 4 problems:\n" in err
    assert len(re.findall(r"nowhere\.jsonl", err)) == 1
    assert re.search(r"\n- decoder, vadapter: .*nowhere\.jsonl", err)
    assert "\n- vadapter/encoder: stage /nowhere/vision is not finished" in err
    assert "Traceback" not in err


def test_a_problem_is_reported_once_with_every_component_that_has_it():
    problems = Problems()
    for where in ("tlm", "llm", "tlm"):
        with problems.gather(where):
            raise ConfigError("it is gone")
    assert problems.lines() == ["tlm, llm: it is gone"]
    outer = Problems()
    with outer.gather("arm a"):
        problems.settle()
    for settled, message in ((problems, "tlm, llm: it is gone"), (outer, "arm a: it is gone")):
        with pytest.raises(ConfigError) as raised:
            settled.settle(placed=True)
        assert str(raised.value) == message


def test_several_invalid_components_are_reported_together(world):
    made = runs.public(world)
    with made.unlocked():
        made.components.encoder.weights = "/nowhere/clip"
        made.components.llm.weights = "/nowhere/llm"
    facts = checked(made)
    assert len(facts["problems"]) == 2
    assert facts["stages"] == []


def test_json_has_the_same_facts(world, untrained, capsys):
    recipe = runs.write_recipe(world)
    workdir, facts = untrained
    assert main(["check", f"--config={recipe}", ONE, "--json", f"--workdir={workdir}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(facts))
    batch = ("--config.chain=llm", "--config.stages.llm.batch=12")
    assert main(["check", f"--config={recipe}", ONE, "--json", *batch]) == 78
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


def test_training_checks_the_same(world, tmp_path):
    made = runs.public(world)
    with made.unlocked():
        made.components.llm.max_len = 96
    (problem,) = checked(made)["problems"]
    with pytest.raises(ConfigError) as met:
        Run(read(made), tmp_path).check()
    assert str(met.value) in problem
