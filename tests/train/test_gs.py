"""Runs in a bucket: trained, killed, resumed, evaluated and restored as on a disk."""

import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest
from support import gcs, hosts, runs, tiny

from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.checkpoints.manager import Checkpointer, steps
from vadapter.cli.main import main
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate import partial_results as part_module
from vadapter.evaluate.describe import Describer
from vadapter.evaluate.partial_results import PartialResults
from vadapter.io import buckets, gcs_lock, storage
from vadapter.io.json_files import rows
from vadapter.io.lock import lock
from vadapter.metrics.scoring import Generation
from vadapter.models.registry import make_module
from vadapter.recipe.schema import read
from vadapter.report.plots import convergence
from vadapter.stages.restore import open_run
from vadapter.train.loop import train


@pytest.fixture(scope="module")
def bucket():
    with gcs.local() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("gs"))


@pytest.fixture(scope="module")
def here(folder):
    """The recipe file of a text stage, and what it comes to on a disk."""
    recipe = runs.write_recipe(folder, "text_only")
    assert (ended := runs.run(recipe, folder / "local")).returncode == 0, ended.stdout
    return recipe, runs.trained_digests(folder / "local", ("llm",))


@pytest.fixture(scope="module")
def killed(bucket, here):
    """That run in a bucket, killed while it saved step 4."""
    ended = runs.run(here[0], "gs://bucket/killed", fault="KILL:llm:saving:4")
    assert ended.returncode == -9, ended.stdout
    return ended


@pytest.fixture(scope="module")
def resumed(bucket, here, killed):
    """The same command again; with what was there before it: names -> content."""
    before = dict(bucket.objects)
    ended = runs.run(here[0], "gs://bucket/killed")
    assert ended.returncode == 0, ended.stdout
    return ended.stdout, before


def digests(bucket, name):
    return json.loads(bucket.objects[f"{name}/llm/done.json"])["components"]


def test_a_run_killed_while_it_saves_to_a_bucket_ends_as_one_on_a_disk(bucket, here, resumed):
    said, before = resumed
    parts = [name for name in before if "/checkpoints/4/" in name]
    assert parts, "it was killed before it had begun to write"
    assert f"killed/llm/checkpoints/4/{storage.COMMIT}" not in before
    assert "resumed at step 2" in said
    assert digests(bucket, "killed") == {"llm": here[1]["llm/llm"]}
    assert "killed/.lock" in before
    assert "killed/.lock" not in bucket.objects


def test_an_uncommitted_step_is_no_checkpoint_and_is_removed(bucket, killed):
    bucket.put("torn/checkpoints/2/state/d/0", b"x")
    bucket.put(f"torn/checkpoints/1/{storage.COMMIT}", b"")
    directory = storage.as_path("gs://bucket/torn/checkpoints")
    assert steps(directory) == [1]
    Checkpointer(directory, keep=1).close()
    assert not any(name.startswith("torn/checkpoints/2/") for name in bucket.objects)
    assert f"torn/checkpoints/1/{storage.COMMIT}" in bucket.objects


def test_rows_of_steps_before_a_checkpoint_are_in_the_bucket(bucket, resumed):
    _, before = resumed
    known = [json.loads(x)["step"] for x in before["killed/llm/metrics.jsonl"].splitlines()]
    assert known[:2] == [1, 2]  # step 2 is the newest checkpoint
    found = list(rows(storage.as_path("gs://bucket/killed/llm/metrics.jsonl")))
    assert {row["step"] for row in found} == set(range(1, runs.STEPS + 1))
    assert [row["step"] for row in found if row["attempt"] == 2] == [3, 4, 5, 6]


def test_a_run_copied_from_a_bucket_resumes_on_a_local_disk(bucket, here, resumed, tmp_path):
    copied = bucket.download("killed", tmp_path / "laptop")
    one, other = open_run("gs://bucket/killed", "llm"), open_run(copied, "llm")
    assert one.step == other.step == runs.STEPS
    assert combined(tree_digests(one.params)) == combined(tree_digests(other.params))
    (copied / "llm" / "done.json").unlink()
    shutil.rmtree(copied / "llm" / "checkpoints" / "6")
    ended = runs.run(here[0], copied)
    assert "resumed at step 4" in ended.stdout
    assert runs.trained_digests(copied, ("llm",)) == here[1]


def test_a_bucket_that_does_not_answer_is_not_one_without_checkpoints(bucket, resumed):
    bucket.forbidden = r"GET .*"
    with pytest.raises(OSError, match="Forbidden"):
        steps(storage.as_path("gs://bucket/killed/llm/checkpoints"))
    bucket.forbidden = ""
    assert steps(storage.as_path("gs://bucket/killed/llm/checkpoints")) == [4, 6]


@pytest.fixture
def saved(bucket):
    """Steps 1 and 2 in a bucket, and what reads them."""
    for name in [name for name in bucket.objects if name.startswith("saved/")]:
        del bucket.objects[name]
    directory = storage.as_path("gs://bucket/saved")
    checkpointer = Checkpointer(directory, keep=2)
    for step in (1, 2):
        assert checkpointer.save(step, {"w": jnp.full((4,), step)}, {})
    checkpointer.close()
    assert checkpointer.committed() == [1, 2]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((4,), jnp.int32, sharding=device)}
    return lambda: Checkpointer(directory, keep=2).restore(like)


def test_a_corrupt_checkpoint_is_moved_to_quarantine_in_the_bucket(bucket, saved):
    bucket.objects["saved/2/meta/metadata"] = b"{}"
    state, meta = saved()
    assert (meta["step"], state["w"].tolist()) == (1, [1] * 4)
    assert "saved/quarantine/2/meta/metadata" in bucket.objects
    assert not any(name.startswith("saved/2/") for name in bucket.objects)


@pytest.mark.parametrize("place", ["meta/metadata", r"state/.*d/"])
def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_corrupt(bucket, saved, place):
    bucket.forbidden = rf"GET .*/saved/2/{place}"
    with pytest.raises(CheckpointError, match=r"/2: (no readable meta|cannot read w)") as error:
        saved()
    bucket.forbidden = ""
    assert type(error.value) is CheckpointError
    assert saved()[1]["step"] == 2


def test_a_second_run_in_the_same_directory_of_a_bucket_is_refused(bucket, here, monkeypatch):
    monkeypatch.setattr(gcs_lock, "BEAT", 0.1)
    with lock(storage.as_path("gs://bucket/held/.lock")):
        ended = runs.run(here[0], "gs://bucket/held")
    assert ended.returncode == 78
    assert re.search(r"gs://bucket/held is in use by another run: process \d+ on", ended.stdout)
    assert [name for name in bucket.objects if name.startswith("held/")] == []


RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import runs

def get_config(arg):
    config = runs.small(Path({folder!r}))
    config.chain = ("decoder",)
    with config.unlocked():
        config.stages = {{"decoder": config.stages.decoder}}
        config.stages.decoder.evals = ("captions",)
    config.stages.decoder.start.encoder = "gs://bucket/outside/vision"
    config.data.images.cache = False
    config.data.documents.source.groups = ("gs://bucket/shapes/images.jsonl",)
    for name in ("images", "held"):
        config.data[name].source.table = "gs://bucket/shapes/images.jsonl"
    return config
"""


@pytest.fixture(scope="module")
def images(bucket, folder):
    """A run that sees images, all of it in the bucket: table, images, encoder and directory."""
    size = runs.small(folder).components.encoder.to_dict()
    module = make_module("encoder", size)
    image = jnp.zeros((1, 1, size["image_size"], size["image_size"], 3))
    outside = storage.as_path("gs://bucket/outside/vision")
    runs.finish_stage(outside, {"encoder": tiny.init(module, image)})
    bucket.upload(folder / "shapes", "shapes")
    recipe = folder / "images.py"
    recipe.write_text(RECIPE.format(tests=str(runs.TESTS), folder=str(folder)))
    ended = runs.run(recipe, "gs://bucket/images")
    assert ended.returncode == 0, ended.stdout
    return recipe


def vadapter(*arguments):
    """Run a verb to its end."""
    with runs.launch((*runs.VADAPTER, *map(str, arguments))) as process:
        out, _ = process.communicate(timeout=300)
    return process.returncode, out


@pytest.mark.slow
def test_a_run_with_images_is_written_to_a_bucket_with_its_report(bucket, images):
    names = {name.removeprefix("images/") for name in bucket.objects}
    results = {f"decoder/eval/captions/{name}" for name in ("predictions.jsonl", "score.json")}
    assert {"config.json", "decoder/done.json", "table.md", "gallery.html"} | results <= names
    frozen = [name for name in names if re.match(r"components/encoder-\w+/commit", name)]
    assert frozen, "the frozen encoder of the other run was not copied"


def test_the_convergence_of_a_run_in_a_bucket_is_drawn_there(bucket, folder):
    bucket.put("plot/vadapter/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n' * 2)
    workdir = storage.as_path("gs://bucket/plot")
    recipe = read(runs.small(folder))
    assert convergence(workdir, recipe, workdir / "plots" / "convergence.png")
    assert bucket.objects["plot/plots/convergence.png"][:4] == b"\x89PNG"


@pytest.mark.slow
def test_evaluation_writes_to_the_bucket_what_training_did(bucket, images):
    name = "images/decoder/eval/captions/predictions.jsonl"
    trained = bucket.objects.pop(name)
    code, out = vadapter("eval", "gs://bucket/images")
    assert code == 0, out
    assert bucket.objects[name] == trained
    assert "images/decoder/eval/captions/gallery.html" in bucket.objects
    assert f"{name}.part" not in bucket.objects


@pytest.mark.slow
def test_an_image_in_a_bucket_is_captioned_like_a_local_copy(bucket, images, folder, tmp_path):
    copied = bucket.download("images", tmp_path / "laptop")
    photo = folder / "shapes" / "00.png"
    said = [
        [reply.text for reply in Describer(open_run(run)).replies([photo], max_new=8)]
        for run in ("gs://bucket/images", copied)
    ]
    assert said[0] == said[1]
    assert said[0][0]


def test_an_evaluation_in_a_bucket_resumes_after_the_last_batch(bucket, monkeypatch):
    monkeypatch.setattr(part_module, "_UPLOAD_EVERY", -1.0)
    path = storage.as_path("gs://bucket/part/predictions.jsonl.part")
    part = PartialResults(path, "key")
    assert part.read(2) == []
    part.append([Generation(0, "a", True), Generation(1, "b", True)])
    part.append([Generation(2, "c", True)])  # of a batch that was torn
    assert PartialResults(path, "other").read(2) == []
    again = PartialResults(path, "key")
    assert again.read(2) == [Generation(0, "a", True), Generation(1, "b", True)]
    again.append([Generation(2, "c", False), Generation(3, "d", True)])
    assert len(PartialResults(path, "key").read(2)) == 4
    again.remove()
    assert not path.exists()


def test_without_gcsfs_a_bucket_is_refused_with_the_extra_to_install(monkeypatch, capsys):
    buckets.prepare.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if not installed
    assert main(["train", "--config=x.py", "--workdir=gs://bucket/run"]) == 78
    said = capsys.readouterr().err
    assert said == "vadapter: gs:// paths need gcsfs: pip install 'vadapter[gs]'\n"


@pytest.mark.parametrize(
    ("path", "forbidden", "message"),
    [
        ("gs://nowhere/run", "", "there is no bucket gs://nowhere; create it first"),
        ("gs://bucket/run", r"GET /storage/v1/b/bucket$", "no permission for gs://bucket"),
        ("gs://bucket/run", r"POST", r"gs://: Forbidden: 403 .* Check the bucket"),
        ("s3://bucket/run", "", "paths are local or gs://BUCKET/NAME"),
        ("gs:///run", "", "has no bucket name"),
        ("gs://bucket/adapter", "", "--workdir=gs://bucket/adapter is an exported adapter"),
    ],
)
def test_an_unusable_bucket_is_reported_before_anything_runs(
    bucket, folder, path, forbidden, message
):
    bucket.put("adapter/config.json", b'{"format": "vadapter-export"}')
    bucket.forbidden = forbidden
    with pytest.raises(ConfigError, match=message):
        train(read(runs.text_only(folder)), path)
    bucket.forbidden = ""


def test_reading_a_run_from_a_bucket_that_is_not_there_is_one_line(bucket):
    code, out = vadapter("caption", "gs://nowhere/run", "photo.jpg")
    assert (code, out.count("\n")) == (78, 1)
    assert out.startswith("vadapter: gs://nowhere/run: there is no bucket gs://nowhere")
    code, out = vadapter("eval", "gs://bucket/nothing")
    assert (code, out.count("\n")) == (78, 1)
    assert out.startswith("vadapter: no run in gs://bucket/nothing: there is no config.json")


def test_an_unreachable_bucket_is_one_line(bucket, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{hosts.free_port()}")
    monkeypatch.setattr(buckets, "REACH", 1.0)
    buckets._client.cache_clear()
    with pytest.raises(ConfigError, match=r"cannot reach gs://bucket .* check the network"):
        open_run("gs://bucket/killed")
    buckets._client.cache_clear()


@pytest.mark.slow
def test_two_hosts_train_in_a_bucket_as_one_does_and_resume(bucket, here, tmp_path):
    job = hosts.Job(tmp_path / "job", here[0])
    job.workdir = "gs://bucket/two"
    job.start(faults={0: "KILL:llm:step:5", 1: "KILL:llm:step:5"}).wait()
    assert job.start().wait() == [0, 0], job.logs()
    assert re.search(r"resumed at step [24]", job.log(0)), job.logs()
    one = hosts.Job(tmp_path / "one", here[0])
    assert one.start().wait() == [0, 0], one.logs()
    assert digests(bucket, "two")["llm"] == runs.trained_digests(one.workdir, ("llm",))["llm/llm"]
