"""The benchmark beside PyTorch: the torch models compute what ours do, and the table is right."""

import csv
import json
import os
import subprocess

import jax
import numpy as np
import pytest
from support.original import imported
from support.patches import use_clock

from benches.peer import __main__ as command
from benches.peer import measure, one, table
from benches.peer.case import Case
from benches.peer.decoding import LLAMA, NEW, OurDecoding
from benches.peer.rows import ROWS
from vadapter.errors import ConfigError

LLM = ("width=16", "depth=2", "heads=4", "mlp_dim=24", "head_dim=4")
TLM = ("width=12", "depth=2", "heads=3", "mlp_dim=20", "head_dim=4")
VIT = ("image_size=16", "patch=8", "width=12", "depth=2", "heads=3", "mlp_dim=16")
QUERIES = ("queries=3", "query_dim=8", "hidden_dim=8", "heads=2")
SIZES = {"llm": LLM, "tlm": TLM, "encoder": VIT, "resampler": QUERIES, "perceiver": QUERIES}
# The others differ from these in their sizes alone, or by components that are both in one of these.
TRAINED = ["nano-lm", "nano-decoder", "s30m-perceiver", "flickr8k-vadapter"]


def sizes(case):
    """Overrides for tiny components and a batch of two rows."""
    left_out = "encoder" if case.features else ""
    parts = (f"components.{name}.{s}" for name in SIZES for s in SIZES[name] if name != left_out)
    return [*parts, "tokenizer.vocab_size=40", f"stages.{case.stage}.batch=2"]


@pytest.mark.parametrize("row", TRAINED)
def test_the_torch_model_has_the_loss_and_the_gradients_of_ours(row):
    torch = imported("torch")
    from benches.peer.torch_layers import tensor
    from benches.peer.torch_model import Model

    case = Case(**ROWS[row].settings)
    stage = case.open(sizes(case))
    batch = case.batch(stage)
    state, frozen = case.parameters(stage)
    _, metrics = jax.jit(stage.train_step)(state, frozen, batch)
    params = jax.tree.map(np.asarray, state.params | frozen)
    model = Model(stage.adapter_model, params, stage.trained)
    tensors = {key: tensor(value) for key, value in batch.items()}
    loss = model(tensors, model.encode(tensors))
    assert float(loss.detach()) == pytest.approx(float(metrics["loss"]), abs=1e-5)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    assert norm == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
    count = sum(g.numel() for g in gradients)
    assert count == sum(x.size for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("row", ["flickr8k-decode-1", "smol-decode-1", "smol-bf16-decode-1"])
def test_transformers_generates_the_tokens_of_ours(row):
    imported("transformers")
    from benches.peer import decode_rows

    settings = dict(ROWS[row].settings)
    dtype = settings.pop("dtype", "float32")
    case = Case(settings["recipe"], settings["stage"], settings.get("features"))
    overrides = [*LLAMA, f"dtype={dtype}", "components.llm.kv_heads=2", *sizes(case)]
    ours = OurDecoding(case, 2, overrides)
    theirs = decode_rows.Generate(ours)
    tokens = ours()
    assert tokens.shape == (2, NEW)
    exact = dtype == "float32"
    assert decode_rows.compare(tokens, theirs(), None if exact else theirs.gap)
    wrong = (tokens + 1) % 40
    with pytest.raises(ValueError, match="the sides do different things"):
        decode_rows.compare(wrong, theirs(), None if exact else theirs.gap)


# -- the clock and the table -------------------------------------------------------------------


def test_sides_take_turns_and_a_ratio_is_their_time_over_ours_in_the_same_round(monkeypatch):
    cpu, wall = (use_clock(monkeypatch, name=name) for name in ("process_time", "perf_counter"))
    turns = []

    def side(name, seconds):
        def run():
            turns.append(name)
            cpu[0] += next(seconds)
            wall[0] += 1.0

        return run

    sides = {"ours": side("ours", iter([1.0, 2.0])), "torch": side("torch", iter([3.0, 4.0]))}
    found = measure.summary(measure.alternate(sides, 2, calls=1, clock=lambda: cpu[0]))
    assert turns == ["ours", "torch"] * 2
    assert found["ours"]["cpu"][0] == pytest.approx(1500)
    assert found["torch"]["wall"] == pytest.approx([1000] * 3)
    assert found["torch"]["ratio"] == pytest.approx([2.5, 2.1, 2.9])  # of 3 / 1 and 4 / 2
    assert "ratio" not in found["ours"]


def test_a_turn_has_as_many_calls_as_the_slowest_side_makes_in_half_a_second(monkeypatch):
    wall, calls = use_clock(monkeypatch, name="perf_counter"), {"fast": 0, "slow": 0}

    def side(name, seconds):
        def run():
            calls[name] += 1
            wall[0] += seconds

        return run

    measure.alternate({"fast": side("fast", 0.01), "slow": side("slow", 0.1)}, 1)
    assert calls == {"fast": 6, "slow": 6}  # one to choose the number, then five


def result(row, **values):
    return {"row": row, "threads": 1, **values}


@pytest.fixture
def results():
    ours = {"cpu": [1.5, 1.0, 2.0], "wall": [1.5, 1.0, 2.0]}
    torch = {"cpu": [3.0, 2.0, 4.0], "wall": [6.0, 5.0, 7.0]}
    ratios = {"ratio": [2.0, 1.9, 2.1], "ratio_wall": [4.0, 3.0, 5.0]}
    sides = {"ours": ours, "torch": torch | ratios}
    return [
        result("a", sides=sides, same="losses to 1e-06", compile_seconds={"ours": 7.0}),
        result("b", error="ValueError: losses differ"),
    ]


def test_the_csv_has_a_line_per_side_and_one_for_a_row_that_failed(results, tmp_path):
    table.write_csv(tmp_path / "out.csv", results)
    with (tmp_path / "out.csv").open(newline="") as file:
        ours, torch, failed = csv.DictReader(file)
    assert (ours["row"], ours["side"], ours["cpu"], ours["ratio"]) == ("a", "ours", "1.5", "")
    assert (torch["ratio"], torch["ratio_p10"], torch["wall_p90"]) == ("2.0", "1.9", "7.0")
    assert (ours["compile_seconds"], torch["compile_seconds"]) == ("7.0", "")
    assert (failed["row"], failed["error"]) == ("b", "ValueError: losses differ")


def test_the_table_shows_ratios_with_their_spread_and_errors(results):
    _, _, ours, torch, failed = table.as_text(results).splitlines()
    assert ours.split()[:5] == ["a", "1", "ours", "1.5", "1.5"]
    assert ours.endswith("losses to 1e-06")
    assert "2.00 (1.90–2.10)  4.00 (3.00–5.00)" in torch
    assert "losses differ" in failed


# -- the command -------------------------------------------------------------------------------


def test_every_row_is_listed_with_its_recipe_and_has_a_function(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in listed] == list(ROWS)


def test_rows_are_chosen_by_name_or_pattern_and_an_unknown_one_names_the_nearest(capsys):
    assert command.chosen(["nano-*", "s30m-decoder"])[-1] == "s30m-decoder"
    assert command.chosen([]) == list(ROWS)
    with pytest.raises(SystemExit):
        command.main(["nano-vadaptr"])
    assert "did you mean 'nano-vadapter'?" in capsys.readouterr().err


def test_rows_run_in_processes_of_their_own_and_one_that_fails_does_not_stop_the_others(
    monkeypatch, capsys, tmp_path
):
    started = []

    def run(args, env, **kwargs):
        started.append((args[3:], env["OMP_NUM_THREADS"], env["JAX_PLATFORMS"]))
        good = {"sides": {"ours": {"cpu": [1.0] * 3, "wall": [1.0] * 3}}, "same": "yes"}
        if "nano-lm" in args:
            return subprocess.CompletedProcess(args, 1, "", "trace\nValueError: losses differ\n")
        return subprocess.CompletedProcess(args, 0, "noise\n" + json.dumps(good) + "\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    rows = ["nano-lm", "nano-decoder"]
    out = tmp_path / "out.csv"
    assert command.main([*rows, "--threads=1,2", "--rounds=3", "--no-compile", f"--out={out}"]) == 1
    options = ["--rounds=3", "--no-compile"]
    assert started == [
        ([row, f"--threads={n}", *options], str(n), "cpu") for row in rows for n in (1, 2)
    ]
    assert capsys.readouterr().out.count("ValueError: losses differ") == 2
    assert len(out.read_text().splitlines()) == 5


def test_a_row_needs_as_many_cores_as_it_has_threads(monkeypatch):
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3, 4})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    one.pin(2)
    assert pinned == [[3, 4]]
    with pytest.raises(ConfigError, match="4 threads need as many cores; this process has 3"):
        one.pin(4)
