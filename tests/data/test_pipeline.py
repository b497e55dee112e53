"""Pipeline: the stream is a pure function of the step, whoever makes it, wherever it starts."""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from support.cases import some_slow
from support.paths import ROOT

from vadapter.data import cores
from vadapter.data.pipeline import Schedule, Stream, eval_batches, make_loader, require_usable
from vadapter.errors import ConfigError, DataError


@dataclasses.dataclass
class Numbers:
    """A source whose item i is the number i."""

    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return index


def transform(item, *, rng):
    """A row that shows its item and what its generator draws; item 5 is a bad sample."""
    bad = item == 5
    drawn = 0 if rng is None else rng.integers(2**31)
    return {
        "item": np.array(item, np.int32),
        "drawn": np.array(drawn, np.int64),
        "weights": np.full(2, not bad, np.float32),
        "bad": np.array(bad),
    }


STREAMS = {"image": (Numbers(23), transform, 3), "clip": (Numbers(17), transform, 1)}


def load(count, **kwargs):
    kwargs = {"global_batch": 4, "seed": 7, "threads": 0, **kwargs}
    return list(itertools.islice(make_loader(STREAMS, **kwargs), count))


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


GOLDEN_ORDER = [5, 7, 8, 6, 2, 4, 9, 0, 1, 3, 7, 9, 0, 5, 3, 4, 2, 6, 1, 8]
GOLDEN_DRAWS = [1087606330, 390387725, 1412541234]


def test_the_order_is_golden():
    """These numbers are a promise to every run that will resume: a change breaks them all."""
    stream = Stream(Numbers(10), transform, seed=0, name="image")
    assert [stream.index(i) for i in range(20)] == GOLDEN_ORDER
    assert [int(stream[i]["drawn"]) for i in (0, 1, 10)] == GOLDEN_DRAWS


def test_workers_do_not_change_the_stream():
    assert_same(load(12, num_steps=12), load(12, num_steps=12, workers=2, threads=1))


def test_as_many_workers_as_there_are_cores_for_do_not_change_the_stream(monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 2)
    assert_same(load(12, num_steps=12), load(12, num_steps=12, workers=-1, threads=None))
    with pytest.raises(ConfigError, match=r"config\.workers=-2: must be -1 .*, 0 or more"):
        load(2, workers=-2)


def test_threads_do_not_change_the_stream():
    assert_same(load(40), load(40, threads=4))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_make_the_same_global_batch(hosts):
    parts = [load(15, host_index=h, host_count=hosts) for h in range(hosts)]
    joined = [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(load(15), joined)


@pytest.mark.parametrize("start", [1, 5, 6, 29])
def test_a_run_resumes_in_the_middle_of_an_epoch_with_any_workers(start):
    whole = load(40, num_steps=40)
    assert_same(whole[start:], load(40, num_steps=40, start_step=start, threads=2))


def test_the_run_ends_after_its_steps():
    assert len(load(99, num_steps=6)) == 6
    assert len(load(99, num_steps=6, start_step=4)) == 2
    assert load(99, num_steps=6, start_step=6) == []


def test_an_epoch_holds_each_item_once_and_epochs_differ():
    stream = Stream(Numbers(23), transform, seed=7, name="image")
    epochs = [[stream.index(23 * e + i) for i in range(23)] for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_hosts_share_an_epoch_without_duplicates():
    streams = {"image": (Numbers(24), transform, 1.0)}
    ids = [
        np.concatenate([
            batch["id"]
            for batch in make_loader(
                streams, global_batch=4, seed=1, num_steps=6, host_index=h, host_count=2, threads=0
            )
        ])
        for h in range(2)
    ]  # fmt: skip
    assert not set(ids[0]) & set(ids[1])
    assert sorted(np.concatenate(ids)) == list(range(24))


def test_every_sample_has_a_generator_of_its_own():
    """Across rows, hosts, epochs, streams and seeds; one shared draw would undo augmentation."""
    drawn = np.concatenate([b["drawn"] for b in load(60)])
    assert len(set(drawn)) == len(drawn) == 240
    other = np.concatenate([b["drawn"] for b in load(60, seed=8)])
    assert not set(drawn) & set(other)
    same_source = [Stream(Numbers(9), transform, seed=7, name=name) for name in ("a", "b")]
    assert same_source[0][0]["drawn"] != same_source[1][0]["drawn"]


def test_the_id_is_the_index_in_the_source():
    for batch in load(20):
        np.testing.assert_array_equal(batch["id"], batch["item"])
        assert batch["id"].dtype == np.int32


def test_an_unusable_sample_keeps_its_position():
    batches = load(30)
    bad = np.concatenate([b["bad"] for b in batches])
    items = np.concatenate([b["id"] for b in batches])
    assert bad.sum() > 3
    np.testing.assert_array_equal(bad, items == 5)


def test_streams_get_their_share_in_every_stretch():
    schedule = Schedule({"image": 3, "clip": 1})
    names = [schedule(step)[0] for step in range(400)]
    assert all(names[i : i + 4].count("image") == 3 for i in range(0, 400, 4))
    thirds = Schedule({"a": 1, "b": 1, "c": 1})
    assert sorted(thirds(step)[0] for step in range(7, 10)) == ["a", "b", "c"]
    rare = Schedule({"a": 1e6, "b": 1})
    assert sum(rare(step)[0] == "b" for step in range(1001)) == 1


def test_the_schedule_counts_the_steps_of_each_stream():
    schedule = Schedule({"a": 0.55, "b": 0.3, "c": 0.15})
    seen = {"a": 0, "b": 0, "c": 0}
    for step in range(300):
        name, count = schedule(step)
        assert count == seen[name]
        seen[name] += 1
    assert seen == {"a": 165, "b": 90, "c": 45}


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_each_item_once_in_order_and_fills_the_last_batch(hosts):
    parts = [
        list(eval_batches(Numbers(10), transform, 4, host_index=h, host_count=hosts, threads=0))
        for h in range(hosts)
    ]
    joined = [
        {key: np.concatenate([b[key] for b in bs]) for key in bs[0]}
        for bs in zip(*parts, strict=True)
    ]
    ids = np.concatenate([b["id"] for b in joined])
    weights = np.concatenate([b["weights"] for b in joined])
    assert ids.tolist() == [*range(10), -1, -1]
    assert weights[:, 0].tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert not np.concatenate([b["drawn"] for b in joined]).any()
    assert np.concatenate([b["bad"] for b in joined]).sum() == 1


def test_unusable_sources_and_arguments_are_errors_before_the_first_batch():
    def make(source=None, weight=1.0, **kwargs):
        kwargs = {"global_batch": 4, "seed": 0, **kwargs}
        return make_loader({"image": (source or Numbers(9), transform, weight)}, **kwargs)

    with pytest.raises(DataError, match=r"0 usable examples in 'image' \(Numbers\)"):
        make_loader({"image": (Numbers(0), transform, 1)}, global_batch=4, seed=0)
    with pytest.raises(DataError, match=r"3 usable examples .* a batch needs 4"):
        make(Numbers(3))
    with pytest.raises(DataError, match="0 usable examples"):
        eval_batches(Numbers(0), transform, 4)
    with pytest.raises(ConfigError, match="divided among 3 hosts"):
        make(host_count=3)
    with pytest.raises(ConfigError, match="host 2"):
        make(host_count=2, host_index=2)
    with pytest.raises(ConfigError, match="must be above 0"):
        make(weight=0.0)
    with pytest.raises(ConfigError, match="seed=-1"):
        make(seed=-1)
    require_usable(Numbers(4), 4)


def test_workers_end_when_the_trainer_is_killed(tmp_path):
    """They would live on, hold its pipes open and keep its shared memory."""
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, time
            import numpy as np
            from vadapter.data.pipeline import make_loader

            def transform(item, *, rng):
                return {"item": np.array(item)}

            if __name__ == "__main__":
                stream = {"image": (range(8), transform, 1)}
                batches = make_loader(stream, global_batch=2, seed=0, workers=1, threads=0)
                next(batches)
                print(*(p.pid for p in multiprocessing.active_children()), flush=True)
                time.sleep(60)
            """
        )
    )
    root = str(ROOT)  # importable where it is not installed
    trainer = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    try:
        assert trainer.stdout
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert workers
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 15
        while any(map(_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_alive, workers))
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("train", [False, True])
def test_rows_are_made_while_a_step_computes(train):
    """Each step ends only when the next batch is being made: taking turns would hang."""
    making = [threading.Event() for _ in range(24)]

    def slow_row(item, *, rng):
        del rng
        making[item["position"]].set()
        return {"weights": np.ones(1, np.float32), "x": np.array(item["position"])}

    class Positions:
        def __len__(self):
            return len(making)

        def __getitem__(self, index):
            return {"position": index}

    def batches(threads):
        if not train:
            return eval_batches(Positions(), slow_row, 2, threads=threads)
        stream = {"text": (Positions(), slow_row, 1.0)}
        return make_loader(stream, global_batch=2, seed=0, num_steps=12, threads=threads)

    order = np.concatenate([batch["x"] for batch in batches(0)]).tolist()
    for event in making:
        event.clear()
    next(batches(0))
    assert sum(event.is_set() for event in making) == 2  # what nothing read ahead looks like
    seen = []
    for event in making:
        event.clear()
    for step, batch in enumerate(batches(2)):
        seen += batch["x"].tolist()
        ahead = order[min(2 * (step + 1) + 1, len(making) - 1)]  # in the next batch
        assert making[ahead].wait(60), "nothing is read ahead while a step computes"
    assert seen == order


def drawn_run(rng):
    """A mixture, a seed, a batch and two ways to share it, all drawn."""
    kinds = ("image", "clip", "question")[: rng.integers(1, 4)]
    sizes = {kind: int(rng.integers(24, 90)) for kind in kinds}
    streams = {kind: (Numbers(sizes[kind]), transform, float(rng.integers(1, 8))) for kind in kinds}
    hosts = [int(n) for n in rng.choice([1, 2, 3, 4, 6, 12], 2, replace=False)]
    return streams, int(rng.integers(2**31)), hosts, int(rng.integers(1, 40))


@pytest.mark.parametrize("draw", some_slow(range(12), fast=range(6)))
def test_one_integer_resumes_any_mixture_on_any_number_of_hosts(draw):
    streams, seed, (first, second), start = drawn_run(np.random.default_rng(draw))
    steps, batch = start + 12, 12
    made = {name: Stream(*parts[:2], seed=seed, name=name) for name, parts in streams.items()}
    schedule = Schedule({name: weight for name, (_, _, weight) in streams.items()})

    def rows(hosts, start, **how):
        """(global step, row in the batch, host) -> what the host made there."""
        found = {}
        for host in range(hosts):
            loader = make_loader(
                streams, global_batch=batch, seed=seed, start_step=start, num_steps=steps,
                host_index=host, host_count=hosts, **{"threads": 0, **how},
            )  # fmt: skip
            for step, part in enumerate(loader, start):
                for i, (item, drawn) in enumerate(zip(part["id"], part["drawn"], strict=True)):
                    found[step, host * (batch // hosts) + i] = (int(item), int(drawn))
        return found

    whole = rows(first, 0)
    assert set(whole) == {(step, row) for step in range(steps) for row in range(batch)}
    resumed = rows(second, start, threads=draw % 3)
    assert resumed == {at: made for at, made in whole.items() if at[0] >= start}
    seen = {name: {} for name in streams}
    for (step, row), (item, drawn) in whole.items():  # seed and global index say everything
        name, count = schedule(step)
        position = count * batch + row
        assert item == made[name].index(position)
        assert drawn == int(made[name][position]["drawn"])
        epoch = seen[name].setdefault(position // len(streams[name][0]), [])
        epoch.append(item)
    for epochs in seen.values():  # and no two hosts have a sample of one epoch
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs.values())
    draws = [drawn for _, drawn in whole.values()]
    assert len(set(draws)) == len(draws)


def test_a_run_of_two_hosts_with_workers_resumes_on_one_host_without():
    alone = load(10, num_steps=10)[6:]
    parts = [
        load(10, num_steps=10, start_step=6, host_index=h, host_count=2, workers=2, threads=1)
        for h in range(2)
    ]
    joined = [
        {key: np.concatenate([b[key] for b in both]) for key in both[0]}
        for both in zip(*parts, strict=True)
    ]
    assert_same(alone, joined)
