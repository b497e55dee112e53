"""`vadapter plan`: estimates, the search for a setting that fits, and the command."""

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import guides
from support import planned as planned_table
from support.paths import RECIPES
from support.public_tokenizers import llama2
from support.recipes import tiny_recipe

from vadapter.cli.main import main
from vadapter.console import size
from vadapter.distributed import topology
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.distributed.topology import CHIPS, Topology, parse
from vadapter.errors import USER_ERROR, ConfigError
from vadapter.plan import compiled_stats, estimate, text
from vadapter.plan.compiled_stats import memory_needed
from vadapter.plan.estimate import Setting, estimate_peak, plan
from vadapter.plan.search import Search
from vadapter.recipe.schema import read

HERE = Path(__file__).parent

TINY = f"{RECIPES}:nowhere"
OOM = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.30G) exceeds available HBM (15.75G)."  # noqa: E501 - libtpu 0.0.42


def recipe(**stage):
    made = read(tiny_recipe(Path("nowhere"), batch=16))
    one = dataclasses.replace(made.stages["vadapter"], **stage)
    return dataclasses.replace(made, stages={**made.stages, "vadapter": one})


def planned(name="cpu:1", stage="vadapter", decode=0, **setting) -> Any:
    """Return a plan of the tiny recipe; the same arguments are planned once."""
    return _planned(name, stage, decode, frozenset(setting.items()))


@functools.cache
def _planned(name, stage, decode, setting) -> Any:
    return plan(recipe(), stage, Setting(parse(name), **dict(setting)), decode=decode)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """Set four CPU devices per host; call the fixture to change their memory."""

    def replace(**values):
        monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], **values))

    replace(per_host=4)
    return replace


def with_train(made, train):
    """Return the plan with other stats of its train step."""
    rows = tuple(dataclasses.replace(one, train=train) for one in made.rows)
    return dataclasses.replace(made, rows=rows)


def both() -> tuple[Any, Any]:
    """Return plans of a stage on eight devices, with replicated and with sharded parameters."""
    return planned("cpu:8"), planned("cpu:8", fsdp=4, decode=8)


def test_arguments_are_parameters_optimizer_batch_and_counters():
    for made in both():
        parts = sum(part.bytes for part in made.parts.values())
        counters = 2 * 4  # steps and skipped ones
        (rows,) = made.rows
        assert made.train.arguments == parts + made.optimizer + rows.batch_bytes + counters
        assert made.train.peak == made.train.arguments + made.train.temporaries


def test_sharded_parameters_need_a_share_of_their_bytes_on_each_device():
    whole, split = both()
    assert split.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert whole.parts["llm"].parameters == split.parts["llm"].parameters
    assert split.parts["llm"].bytes < 0.3 * whole.parts["llm"].bytes
    assert split.optimizer < 0.3 * whole.optimizer
    assert whole.rows[0].batch_bytes == split.rows[0].batch_bytes


def test_trained_parts_are_float32_with_two_moments():
    made, _ = both()
    trainable = {name: part for name, part in made.parts.items() if part.trained}
    assert set(trainable) == {"resampler", "fc_in", "tlm", "fc_out"}
    count = sum(part.parameters for part in trainable.values())
    assert sum(part.bytes for part in trainable.values()) == 4 * count
    assert made.optimizer == pytest.approx(8 * count, abs=64)


def test_sharded_parameters_are_gathered_and_replicated_ones_are_not():
    whole, split = (made.train.collectives for made in both())
    assert "all-gather" not in whole
    assert split["all-gather"].bytes > 0
    assert whole["all-reduce"].count > 0
    assert planned().train.collectives == {}


def test_time_follows_from_flops_peak_and_utilization_and_every_host_reads_its_share():
    made, _ = both()
    assert made.flops == made.counted == made.train.flops == made.train.compiled_flops > 0
    seconds = made.flops / (8 * CHIPS["cpu"].peak * 0.4)
    assert made.utilized_ms == pytest.approx(1000 * seconds)
    assert made.step_ms == pytest.approx(0.4 * made.utilized_ms)
    assert made.days == pytest.approx(made.steps * seconds / 86400)
    assert made.chip_hours == pytest.approx(8 * 24 * made.days)
    assert made.hosts == 2
    assert made.rows_s == pytest.approx(16 / seconds / 2)


def test_more_rows_need_more_and_rematerialization_less():
    one, four, full = planned(), planned(batch=64), planned(batch=64, remat="full")
    assert four.train.temporaries > 3 * one.train.temporaries
    assert full.train.temporaries < four.train.temporaries
    assert full.train.flops > full.counted == four.counted


def mixed(frames=0) -> Any:
    """Return a plan of a stage with three steps of four on images and one on clips."""
    made = recipe(data={"images": 3.0, "clips": 1.0})
    data = made.data | {
        "clips": dataclasses.replace(made.data["images"], media="clip", frames=4)
    }  # fmt: skip
    made = dataclasses.replace(made, data=data)
    return plan(made, "vadapter", Setting(parse("cpu:1"), frames=frames))


@pytest.fixture(scope="module")
def images_and_clips() -> Any:
    return mixed()


def test_a_stage_of_images_and_clips_must_fit_with_both_and_takes_the_mean_of_their_time(
    images_and_clips,
):
    made, alone = images_and_clips, planned()
    clips, images = made.rows
    assert (clips.data, clips.frames, clips.share) == (("clips",), 4, 0.25)
    assert (images.data, images.frames, images.share) == (("images",), 1, 0.75)
    assert images.train == dataclasses.replace(alone.train, compile_s=images.train.compile_s)
    assert made.train == clips.train
    assert clips.train.peak > 1.02 * images.train.peak
    assert clips.flops > 1.1 * images.flops
    assert made.flops == 0.25 * clips.flops + 0.75 * images.flops
    assert made.step_ms == pytest.approx(1000 * made.flops / CHIPS["cpu"].peak)
    output = " ".join(text.as_text(made).split())
    assert "train on clips (25%, 4 frames): fits" in output
    assert "train on images (75%): fits" in output
    one = mixed(frames=2).rows
    assert [(rows.data, rows.frames, rows.share) for rows in one] == [(("images", "clips"), 2, 1.0)]


def test_images_are_not_planned_if_clips_do_not_fit(images_and_clips, cpu):
    cpu(hbm=images_and_clips.rows[0].train.peak - 1)
    made = mixed()
    assert not made.fits
    assert [rows.train is None for rows in made.rows] == [False, True]
    assert images_and_clips.decode is not None
    assert made.decode is None
    assert "train on images (75%): not planned" in " ".join(text.as_text(made).split())


def test_generation_is_planned_on_request():
    _, made = both()
    generation = made.decode
    assert generation is not None
    assert (generation.rows, generation.max_new, generation.beams) == (8, 8, 1)
    assert generation.stats.fits
    assert generation.stats.arguments < made.train.arguments  # no optimizer
    assert "generation of 8 tokens for 8 rows: fits" in text.as_text(made)
    assert planned(decode=0).decode is None
    for stage, kind in (("vision", "vision"), ("llm", "lm")):
        with pytest.raises(ConfigError, match=f"kind {kind} does not generate"):
            planned(stage=stage, decode=8)


def test_generation_is_planned_as_the_stages_evaluations_run_it():
    made = recipe(evals=("captions", "beams"))
    beams = dataclasses.replace(made.evals["captions"], max_new=8, batch=12, beams=3)
    made = dataclasses.replace(made, evals={**made.evals, "beams": beams})
    beams_plan = plan(made, "vadapter", Setting(parse("cpu:8")))
    generation = beams_plan.decode
    assert generation is not None
    assert (generation.rows, generation.max_new, generation.beams) == (16, 8, 3)  # multiple of 8
    output = " ".join(text.as_text(beams_plan).split())
    assert "generation of 8 tokens for 16 rows with 3 beams: fits" in output
    greedy = both()[1].decode  # as many tokens for half as many rows
    assert 2 * greedy.stats.flops < generation.stats.flops


def test_the_formula_holds_for_the_training_of_an_encoder_too():
    made = planned(stage="vision")
    assert made.flops == made.counted > 0
    assert made.step_ms == pytest.approx(1000 * made.counted / CHIPS["cpu"].peak)
    assert "ratio 1.0000" in text.as_text(made)


def test_rows_that_do_not_divide_over_the_chips_are_refused():
    with pytest.raises(ConfigError, match="make it a multiple of 8"):
        planned("cpu:8", batch=12)


def test_the_text_has_every_number():
    _, made = both()
    output = text.as_text(made)
    unwrapped = " ".join(output.split())
    for name, part in made.parts.items():
        assert f"{name} " in output
        assert f"{part.parameters:,}" in output
    for words in ("memory estimated from the trace", "collectives from compiling for 8 CPU devices",
                  "fits: peak", "ratio 1.0000", "chip-hours", "rows/s", "all-gather"):  # fmt: skip
        assert words in unwrapped


def test_the_text_is_narrow_and_says_if_jax_must_be_given_more_memory():
    made = dataclasses.replace(both()[0], topology="h100:8")
    lines = text.as_text(made).splitlines()
    estimated = dataclasses.replace(
        made.train, cycles=10**10, estimated_ms=10000.0, kernel_ms=12.34
    )
    timed = dataclasses.replace(with_train(made, estimated), estimated_ms=10000.0, share=0.5)
    more = text.as_text(timed).splitlines()
    assert max(map(len, lines + more)) < 100
    unwrapped = " ".join(" ".join(more).split())
    assert "10,000,000,000 cycles (10,000.0 ms)" in unwrapped
    assert "12.3 ms of it are the bound of kernels without an estimate" in unwrapped
    assert "without collectives: 10,000.0 ms, 50% of the peak" in unwrapped
    assert not any("MEM_FRACTION" in line for line in lines)
    nearly = dataclasses.replace(made.train, limit=int(1.1 * made.train.peak))
    output = text.as_text(with_train(made, nearly))
    assert "fits: peak" in output
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in output


# -- settings that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(("message", "needed"), [
    (OOM, int(16.30 * 2**30)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.",
     int(512.5 * 2**20)),
    ("INVALID_ARGUMENT: (16.30G) exceeds", None),
    ("RESOURCE_EXHAUSTED: something else", None),
])  # fmt: skip
def test_the_compilers_message_says_how_much_is_needed(message, needed):
    assert memory_needed(message) == needed


class Stopped:
    """A traced program that the compiler does not finish."""

    jaxpr = jax.make_jaxpr(lambda: 1)()

    def __init__(self, message):
        self._message = message

    def lower(self):
        return self

    def compile(self, **options):
        raise jax.errors.JaxRuntimeError(self._message)


def tpu_that_stops(message):
    return compiled_stats.tpu_stats(parse("v5e:2x2"), Stopped(message), ())


def test_a_compiler_that_runs_out_of_memory_is_a_row_of_the_table():
    stopped = tpu_that_stops(OOM)
    assert not stopped.fits
    assert (stopped.peak, stopped.temporaries) == (int(16.30 * 2**30), None)
    made = with_train(planned(), stopped)
    assert "train: does not fit: needs 17.5 GB of 16.9 GB" in text.as_text(made)


def test_other_compiler_errors_are_raised_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tpu_that_stops("INTERNAL: a bug")


@pytest.fixture
def qwix(monkeypatch, tmp_path):
    """Make a package of that name importable."""
    (tmp_path / "qwix.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


def tried(stage="vadapter", fits=lambda setting: False, over=False):
    """Return the settings in the order in which they are tried, and the result."""
    setting, order, made = Setting(parse("cpu:8")), [], both()[0]
    train = dataclasses.replace(made.train, limit=0 if over else made.train.arguments + 1)
    made = with_train(dataclasses.replace(made, batch=32), train)
    rest = dataclasses.replace(train, limit=10**12)

    def attempt(change):
        order.append(search.overrides(setting, change))
        return with_train(made, rest if fits(change) else train)

    search = Search(recipe(), stage, attempt)
    return order, search.closest(setting, made)


@pytest.mark.usefixtures("qwix")
def test_settings_are_tried_in_the_order_of_their_cost():
    order, found = tried()
    remat = " ".join(f"--config.components.{n}.remat={{0}}" for n in ("resampler", "tlm", "llm"))
    full, split = remat.format("full"), " --config.mesh.fsdp=8 --config.mesh.data=-1"
    int8 = " --config.components.llm.int8=True"
    assert order == [
        remat.format("names"), full, full + split,
        f"--topology=cpu:16 {full}{split}",
        f"--topology=cpu:32 {full}{split}",
        full + split + int8,
        f"{full}{split}{int8} --config.stages.vadapter.batch=16",
        f"{full}{split}{int8} --config.stages.vadapter.batch=8",
    ]  # fmt: skip
    assert found is None


def test_rematerialization_is_not_tried_if_the_arguments_alone_do_not_fit():
    order, _ = tried(over=True)
    assert not any("remat" in line for line in order)
    assert order


@pytest.mark.usefixtures("qwix")
def test_int8_is_not_tried_for_a_language_model_that_is_trained():
    order, _ = tried(stage="decoder")
    assert not any("int8" in line for line in order)


def test_the_first_that_fits_is_named_and_nothing_is_tried_after_it():
    order, found = tried(fits=lambda setting: setting.fsdp == 8)
    assert len(order) == 3
    assert found is not None
    assert found[0].fsdp == 8
    assert found[1].fits


@pytest.mark.parametrize("nearest", [
    {"remat": "names"}, pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"chips": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_nearest_setting_is_found_by_planning_it(nearest):
    chips, remat = nearest.get("chips", 1), nearest.get("remat", "full")
    limit = planned(f"cpu:{chips}", batch=64, remat=remat).train.peak

    def attempt(setting):
        """Plan the setting on chips with less memory."""
        changes = {"batch": setting.batch, "remat": setting.remat, "fsdp": setting.fsdp}
        made = planned(str(setting.topology), **{k: v for k, v in changes.items() if v})
        return with_train(made, dataclasses.replace(made.train, limit=limit))

    requested = Setting(parse("cpu:1"), batch=64)
    made = attempt(requested)
    assert not made.fits
    closest = Search(recipe(), "vadapter", attempt).closest(requested, made)
    assert closest is not None
    assert closest[0] == Setting(parse(f"cpu:{chips}"), batch=64, remat=remat)
    assert closest[1].fits
    assert closest[1].train.peak == limit


def least(fits, peak=lambda setting: 0, chip="cpu:1", limit=None):
    """Return the smallest slice, and the lines of the attempts before it."""
    order, made = [], both()[0]
    rest = with_train(made, dataclasses.replace(made.train, limit=10**12))
    over = with_train(made, dataclasses.replace(made.train, limit=1))

    def attempt(change):
        return rest if fits(change) else over

    search = Search(recipe(), "vadapter", attempt, order.append)
    setting, _ = search.smallest(Setting(parse(chip)), peak, limit)
    return setting, order


def test_the_smallest_slice_has_replicated_parameters_if_they_fit_or_else_sharded_ones():
    setting, order = least(lambda s: s.topology.chips == 8 and s.fsdp == 8)
    assert (str(setting.topology), setting.fsdp) == ("cpu:8", 8)
    split = ", parameters sharded over {} chips"
    assert order == [
        "trying cpu:1", "trying cpu:2", "trying cpu:4", "trying cpu:4" + split.format(4),
        "trying cpu:8", "trying cpu:8" + split.format(4), "trying cpu:8" + split.format(8),
    ]  # fmt: skip
    assert least(lambda s: s.topology.chips == 4)[0] == Setting(parse("cpu:4"))


def test_settings_that_are_far_too_large_are_not_tried():
    def peak(setting):
        return 10**12 * (setting.topology.chips < 8 or not setting.fsdp)

    setting, order = least(lambda s: True, peak)
    assert order == ["trying cpu:8, parameters sharded over 4 chips"]
    assert setting.fsdp == 4


def test_a_stage_that_fits_no_slice_is_one_line():
    with pytest.raises(ConfigError, match="stage vadapter fits no cpu"):
        least(lambda s: False)


def test_no_more_chips_are_tried_than_allowed():
    order = []
    with pytest.raises(ConfigError, match="stage vadapter fits no cpu"):
        least(lambda s: order.append(s.topology.chips), limit=4)
    assert max(order) == 4


@pytest.mark.parametrize("fsdp", [0, 4])
def test_the_estimated_peak_is_near_the_planned_one(fsdp):
    replicated, sharded = both()
    peak = (sharded if fsdp else replicated).train.peak
    setting = Setting(parse("cpu:8"), fsdp=fsdp)
    assert estimate_peak(recipe(), "vadapter", setting) == pytest.approx(peak, rel=0.25)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def call(capfd):
    def run(*options):
        code = main(["plan", f"--config={TINY}", *map(str, options)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_the_command_prints_and_saves_the_same_numbers(call, tmp_path):
    code, out, err = call(
        "--topology=cpu:1", "--stage=vadapter", "--batch=64", "--utilization=0.5", "--decode=3",
        "--config.components.llm.remat=full", f"--json={tmp_path / 'plan.json'}",
    )  # fmt: skip
    assert (code, err) == (0, "")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["fits"]
    assert saved["batch"] == 64
    assert saved["remat"]["llm"] == "full"
    assert saved["utilization"] == saved["utilisation"] == 0.5
    assert saved["utilized_ms"] == saved["utilised_ms"] == 2 * saved["step_ms"]
    assert saved["decode"]["max_new"] == 3
    assert saved["decode"]["stats"] == saved["decode"]["made"]
    assert saved["nearest"] is None
    (rows,) = saved["rows"]
    assert size(rows["train"]["peak"]) in out
    count = {state: sum(p["parameters"] for p in saved["parts"].values() if p["trained"] == state)
             for state in (True, False)}  # fmt: skip
    assert saved["parameters"] == {
        "total": sum(count.values()), "trained": count[True], "frozen": count[False],
    }  # fmt: skip
    assert f"{saved['parts']['llm']['parameters']:,}" in out


def test_a_recipe_of_public_models_is_planned_from_their_config_json_alone(capfd, tmp_path):
    """Of a CLIP and a Llama whose weights are not there; a batch has the encoder's resolution."""
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    clip = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **shared}
    eyes, words = tmp_path / "clip", llama2(tmp_path / "llama")
    llama = json.loads((words / "config.json").read_text()) | {"model_type": "llama", **shared}
    eyes.mkdir()
    (eyes / "config.json").write_text(json.dumps(clip))
    (words / "config.json").write_text(json.dumps(llama))
    code = main([
        "plan", f"--config=configs/public.py:encoder={eyes},tlm={words},llm={words},batch=4",
        "--topology=cpu:1", "--stage=vadapter", "--decode=0", f"--json={tmp_path / 'plan.json'}",
    ])  # fmt: skip
    assert (code, capfd.readouterr().err) == (0, "")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["fits"]
    # Norms of 2 * 16 numbers, a layer's four projections and two of its feed-forward, all biased.
    layer = 2 * 32 + 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16
    tokens = (32 // 8) ** 2 + 1
    assert saved["parts"]["encoder"]["parameters"] == (
        2 * layer + 16 + 3 * 8 * 8 * 16 + tokens * 16 + 32
    )
    (rows,) = saved["rows"]
    assert rows["batch_bytes"] > 4 * 32 * 32 * 3


def fitting(monkeypatch, fits, made=None):
    """Replace planning by one plan, which fits if the setting does."""
    made = made or both()[0]
    full = with_train(made, dataclasses.replace(made.train, limit=1))

    def answer(recipe, name, setting, **_):
        return made if fits(setting) else full

    monkeypatch.setattr(estimate, "plan", answer)


def test_a_stage_that_does_not_fit_succeeds_with_the_closest_setting_that_does(
    call, monkeypatch, tmp_path
):
    fitting(monkeypatch, lambda setting: setting.fsdp == 8)
    code, out, err = call("--topology=cpu:8", "--stage=vadapter", f"--json={tmp_path / 'p.json'}")
    assert code == 0
    assert "train: does not fit: needs" in out
    change = "--config.mesh.fsdp=8 --config.mesh.data=-1"
    assert f"\nfits with {change}:\n" in out
    assert "train: fits: peak" in out
    assert err == f"vadapter: does not fit; trying {change}\n"
    saved = json.loads((tmp_path / "p.json").read_text())
    assert not saved["fits"]
    assert saved["change"] == change
    assert saved["nearest"]["fits"]


def test_a_generation_alone_is_planned_on_the_smallest_slice_that_fits(call, monkeypatch, tmp_path):
    fitting(monkeypatch, lambda setting: True, planned())
    code, out, err = call("--topology=cpu", "--stage=vadapter", f"--json={tmp_path / 'p.json'}")
    assert code == 0
    assert err == "vadapter: trying cpu:1\n"
    assert "on cpu:1: 1 chip, 1 host" in out
    assert json.loads((tmp_path / "p.json").read_text())["fits"]


def test_the_exit_code_reports_that_nothing_fits(call, monkeypatch, tmp_path):
    fitting(monkeypatch, lambda setting: False)
    code, out, err = call("--topology=cpu:8", "--stage=vadapter", f"--json={tmp_path / 'p.json'}")
    assert code == USER_ERROR
    assert "does not fit" in out
    assert "stage vadapter does not fit cpu:8" in err.splitlines()[-1]
    assert not json.loads((tmp_path / "p.json").read_text())["fits"]


def test_a_tpu_without_its_compiler_is_one_line(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    code, out, err = call("--topology=v5e:4x4")
    assert (code, out) == (USER_ERROR, "")
    assert err.splitlines() == [
        "vadapter: topology v5e:4x4: its compiler is not installed; pip install 'vadapter[tpu]'"
    ]


@pytest.mark.parametrize(("option", "says"), [
    ("--topology=v5e:3x4", "nearest: v5e:2x4"),
    ("--topology=cpu:1 --stage=vadaptr", "did you mean 'vadapter'?"),
])  # fmt: skip
def test_a_user_error_is_one_line(call, option, says):
    code, out, err = call(*option.split())
    assert (code, out) == (USER_ERROR, "")
    assert says in err
    assert len(err.splitlines()) == 1


# -- the TPU's compiler ----------------------------------------------------------------------------


@pytest.mark.libtpu
@pytest.mark.parametrize(("name", "decode"), [("v5e:2x2", 4), ("2*v5p:2x2x1", 0)])
def test_a_small_stage_compiles_for_tpus_that_are_not_present(name, decode):
    made = planned(name, fsdp=2, decode=decode)
    assert made.fits
    assert bool(made.decode) == bool(decode)
    assert made.train.cycles > 0
    assert made.train.collectives["all-gather"].count > 0
    assert made.train.peak <= made.train.arguments + (made.train.temporaries or 0)
    assert "compiled for" in text.as_text(made)


@pytest.mark.libtpu
def test_the_tpu_compilers_message_about_memory_is_parsed():
    device = topology.devices(parse("v5e:2x2")).ravel()[0]
    alone = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**24, 1024), "float32", sharding=alone)
    traced = jax.jit(lambda x: x * x.sum()).trace(x)
    made = compiled_stats.tpu_stats(parse("v5e:2x2"), traced, (x,))
    assert not made.fits
    assert made.peak > 2**36


@pytest.mark.libtpu
def test_products_with_sharded_parameters_are_not_cut_into_one_for_each_chip():
    mesh = make_mesh(MeshConfig(fsdp=4), topology.devices(parse("v5e:2x2")))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    arguments = (jax.ShapeDtypeStruct((8192, 8192), "bfloat16", sharding=sharding),) * 2
    traced = jax.jit(lambda x, w: x @ w, out_shardings=sharding).trace(*arguments)
    sent = compiled_stats.tpu_stats(parse("v5e:2x2"), traced, arguments).collectives
    assert "all-gather" in sent
    assert "collective-permute" not in sent


# -- recorded plans --------------------------------------------------------------------------------


def test_the_readme_has_the_recorded_plans_each_of_which_fits():
    assert planned_table.table() in guides.read("vadapter/plan/README.md")
    there = set()
    for row in planned_table.rows():
        there.add((row["arg"], parse(row["topology"]).chip))
        assert {one["frames"] for one in row["rows"]} == {1, 8}
        assert sum(one["share"] for one in row["rows"]) == 1
        for one in row["rows"]:
            assert one["peak"] <= one["limit"] == int(parse(row["topology"]).row.hbm)
    cells, chips = planned_table.CELLS, planned_table.CHIP
    assert there == set(itertools.product(cells, chips))


RECORDED = json.loads(planned_table.GATE.read_text())
GATE = [
    pytest.param(
        row, marks=[pytest.mark.slow] * row["config"].startswith("configs/"),
        id=f"{row['config']}-{row['topology']}",
    )
    for row in RECORDED["rows"]
]  # fmt: skip


@pytest.mark.libtpu
@pytest.mark.parametrize("row", GATE)
def test_the_compilers_estimate_has_not_grown(row):
    """Another libtpu may count otherwise: then measure all rows again, and say so."""
    with jax.default_matmul_precision(None):  # as in training, not as in these tests
        found = planned_table.gated(row)
    now = planned_table.measured(found)
    assert now["cycles"] == pytest.approx(row["cycles"], rel=0.03)
    assert now["peak"] == pytest.approx(row["peak"], rel=0.03)
    assert now["sent"] == pytest.approx(row["sent"], rel=0.03)
    assert found.compiled_flops == pytest.approx(found.flops, rel=0.05)


def test_the_gate_names_topologies_that_there_are():
    assert RECORDED["libtpu"]
    assert all(isinstance(parse(row["topology"]), Topology) for row in RECORDED["rows"])
