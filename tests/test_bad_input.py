"""Bad input ends in one clear line and exit code 78, or is left out and counted; nothing is lost.

All through the command line. Where a run gets as far as steps, they have no model (`fake_step`).
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import faults, runs
from support.patches import use_devices, use_fake_step

from vadapter.checkpoints.manager import steps
from vadapter.cli import main
from vadapter.io.json_files import rows
from vadapter.io.lock import lock

RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.runs import blind

def get_config(arg):
    config = blind(Path({folder!r}))
    with config.unlocked():
        {change}
    return config
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    use_fake_step(monkeypatch)
    use_devices(monkeypatch, 1)


class Command:
    """`vadapter train` with the recipe `runs.blind`, its data and its run directory."""

    def __init__(self, folder: Path, data: Path, capsys: Any):
        self.folder, self.data, self.capsys = folder, data, capsys
        self.workdir = folder / "run"
        self.change("")

    def change(self, line: str) -> None:
        """Change the recipe by a line of Python."""
        text = RECIPE.format(tests=str(runs.TESTS), folder=str(self.data), change=line or "pass")
        (self.folder / "recipe.py").write_text(text)

    def __call__(self, *overrides: str, config: Path | str = "") -> tuple[int, str]:
        """Exit code, and what was written to stderr."""
        arguments = [f"--config.{item}" for item in overrides]
        config = config or self.folder / "recipe.py"
        self.capsys.readouterr()
        code = main.main(["train", f"--config={config}", f"--workdir={self.workdir}", *arguments])
        captured = self.capsys.readouterr()
        self.out = captured.out
        return code, captured.err

    def refused(self, *overrides: str, lines: int = 1, **options: Any) -> str:
        """The message of a run that is refused; checks that it changes no file."""
        before = self.files()
        code, message = self(*overrides, **options)
        assert code == 78, self.out + message
        assert message.startswith("vadapter: ")
        assert len(message.splitlines()) <= lines, message
        assert before.items() <= self.files().items(), "a file was changed or lost"
        return message.removeprefix("vadapter: ").strip()

    def files(self) -> dict[str, bytes]:
        """All that must survive: everything but the lock, and the logs, which grow."""
        return {
            str(p.relative_to(self.workdir)): p.read_bytes()
            for p in self.workdir.rglob("*")
            if p.is_file() and p.name != ".lock" and p.parent.name != "tb"
        }

    def metrics(self) -> list[dict[str, Any]]:
        return list(rows(self.workdir / "decoder" / "metrics.jsonl"))


@pytest.fixture
def train(world, tmp_path, capsys):
    """A command whose data no test changes."""
    return Command(tmp_path, world, capsys)


@pytest.fixture
def spoil(world, tmp_path, capsys):
    """A command whose data a test may change."""
    return Command(tmp_path, shutil.copytree(world, tmp_path / "own"), capsys)


@pytest.fixture
def half(train):
    """A command that was stopped after step 3."""
    with faults.injected("TERM:decoder:step:3"):
        assert train()[0] == 75
    return train


# -- configuration -----------------------------------------------------------------------------

MISTAKES = {
    "stages.decoder.stpes=3": r"config\.stages\.decoder\.stpes: unknown key; did you mean 'step",
    "components.tlm.dropuot=0.1": r"components\.tlm\.dropuot: unknown key; did you mean 'dropout",
    "components.tlm.norm=layernorm": r"components\.tlm\.norm='layernorm': unknown; did you mean 'l",
    "components.tlm.remat=naems": r"components\.tlm\.remat='naems': unknown; did you mean 'names",
    "components.encoder.patch=64": r"image_size=32 is less than one patch=64",
    "components.encoder.fit=squash": r"components\.encoder\.fit='squash': unknown; known: crop, pa",
    "components.encoder.crop_pct=87.5": r"crop_pct=87\.5: .*above 0 and at most 1",
    "components.tlm.kv_heads=3": r"stages\.decoder: its model cannot be built: heads=2 is not div",
    "stage.decoder.steps=3": r"--config\.stage: unknown key; did you mean 'stages'\?",
    "seed=one": r"--config\.seed=one: .*int",
    "seed": r"--config\.seed: needs a value, --config\.seed=VALUE",
    "components.tlm.vocab_size=100": r"components\.tlm\.vocab_size=100 is smaller than the token",
    "stages.decoder.optim.warmup=6": r"config\.stages\.decoder\.optim\.warmup=6 must be below ste",
    "mesh.data=3": r"mesh data=3 fsdp=1 tensor=1 does not cover 1 devices",
    "data.images.source.table=nowhere.jsonl": r"nowhere\.jsonl: no such file; check the path",
    "data.images.source.split=tran": r"images\.jsonl: no rows of split 'tran'; splits: train,",
    "data.images.source.table=$NO_SUCH_VARIABLE/x": r"environment variable NO_SUCH_VARIABLE is n",
    "stages.decoder.batch=100": r"24 usable examples in 'images' \(ImageFolder\), but a batch ne",
    "data.images.text_len=1": r"text_len=1, target_len=36 are too small for 1 texts in a row",
    "tokenizer.vocab_size=100": r"vocab_size=100 is too small: special ids and bytes alone need",
    "stages.decoder.start.encoder=/nowhere/vision": r"stage /nowhere/vision is not finished",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_an_error_in_the_configuration(train, override):
    assert re.search(MISTAKES[override], train.refused(override))


def test_a_missing_recipe(train, tmp_path):
    message = train.refused(config="configs/quikstart.py")
    assert message == "--config=configs/quikstart.py: no such file; did you mean 'quickstart'?"
    (tmp_path / "empty.py").write_text("")
    assert "no function get_config(arg); a recipe must define it" in train.refused(
        config=tmp_path / "empty.py"
    )


def test_missing_weights(train):
    train.change(
        "config.components.encoder = dict(kind='mobilenet', weights='/nowhere');"
        "config.stages.decoder.start = {}"
    )
    assert re.match(r"components\.encoder\.weights: There is no folder '/nowhere'", train.refused())


@pytest.mark.parametrize(("batch", "accumulate"), [(12, 1), (8, 2)])
def test_a_batch_that_does_not_divide_over_eight_devices(train, monkeypatch, batch, accumulate):
    use_devices(monkeypatch, 8)
    train.change(f"config.stages.decoder.update(batch={batch}, accumulate={accumulate})")
    assert train.refused() == (
        f"stages.decoder.batch={batch} does not divide over 8 devices times "
        f"accumulate={accumulate}; make it a multiple of {8 * accumulate}"
    )


def test_an_error_of_a_later_stage_is_reported_before_the_first_one_runs(train):
    train.change(
        "config.stages.later = {**config.stages.decoder.to_dict(), 'lm': 'llm'};"
        "config.chain = ('decoder', 'later')"
    )
    assert "front gives width 16, but llm reads 24; put a component" in train.refused()
    assert not (train.workdir / "decoder").exists()


# -- directories -------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    train.workdir = tmp_path / "file" / "run"
    code, message = train()
    assert code == 78
    assert re.fullmatch(
        r"vadapter: cannot write .*file/run: Not a directory\. Choose .*\n", message
    )


def test_two_runs_in_one_directory(half):
    with lock(half.workdir / ".lock"):
        assert f"is in use by another run: process {os.getpid()} on " in half.refused()
    assert half()[0] == 0


# -- resuming what does not fit ----------------------------------------------------------------

CHANGES = {
    "seed=1": r"seed +\| 0 +\| 1$",
    "stages.decoder.batch=4": r"config\.batch +\| 8 +\| 4$",
    "stages.decoder.optim.lr=0.5": r"config\.optim\.lr +\| 0\.01 +\| 0\.5$",
    "stages.decoder.steps=7": r"config\.steps +\| 6 +\| 7$",
    "data.images.text_len=41": r"data\.images\.text_len +\| 40 +\| 41$",
    "data.images.source.split=val": r"fingerprints\.images +\| [0-9a-f]+ +\| [0-9a-f]+$",
    "components.tlm.mlp_dim=48": r"components\.tlm\.mlp_dim +\| 32 +\| 48$",
}


@pytest.mark.parametrize("override", CHANGES)
def test_another_configuration_in_the_directory_of_a_run(half, override):
    message = half.refused(override, lines=20)
    assert re.search(r"does not fit this run, \d+ differences?:\n", message)
    assert any(re.search(CHANGES[override], line.strip()) for line in message.splitlines()), message
    assert message.endswith("that it was written with, or another run directory.")
    if override == "seed=1":
        assert half()[0] == 0
        message = half.refused(override, lines=20)
        assert "decoder was finished with another configuration:\n" in message
        assert any(re.search(CHANGES[override], line.strip()) for line in message.splitlines())
        assert "or remove that directory to train it again." in message


def test_another_tokenizer_in_the_directory_of_a_run(half):
    message = half.refused("tokenizer.vocab_size=310", lines=4)
    assert "tokenizer.json was trained with another configuration:\n" in message
    assert re.search(r"tokenizer\.vocab_size +\| 320 +\| 310", message)
    path = half.workdir / "tokenizer.json"
    other = half.folder / "other"
    first, half.workdir = half.workdir, other
    half.change("config.tokenizer.vocab_size = 310; config.stages.decoder.steps = 2")
    assert half()[0] == 0
    half.change("")
    half.workdir = first
    shutil.copy(other / "tokenizer.json", path)
    assert re.search(r"  tokenizer +\| [0-9a-f]+ +\| [0-9a-f]+", half.refused(lines=20))


def test_data_that_changed_under_a_run(spoil):
    with faults.injected("TERM:decoder:step:3"):
        assert spoil()[0] == 75
    image = spoil.data / "shapes" / "00.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert "fingerprints.images" in spoil.refused(lines=6)


def test_checkpoints_of_another_stage(half):
    other = half.workdir / "other"
    shutil.copytree(half.workdir / "decoder" / "checkpoints", other / "checkpoints")
    half.change(
        "config.components.back = config.components.front;"
        "config.stages.other = {**config.stages.decoder.to_dict(), 'chain': ('back',)};"
        "config.chain = ('other',)"
    )
    message = half.refused(lines=20)
    assert re.search(r"  stage +\| decoder +\| other\n", message)
    assert re.search(r"  config\.chain +\| \['front'\] +\| \['back'\]\n", message)


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_start_over(half):
    for path in half.workdir.glob("decoder/checkpoints/*/meta/metadata"):
        path.write_text("{}")
    message = half.refused(lines=8)
    assert "checkpoints can be used" in message or "can be used:" in message
    assert "Restore one from a backup, or move them away to start from the beginning." in message


def test_a_corrupt_checkpoint_is_skipped_for_the_previous_one(half):
    assert steps(half.workdir / "decoder/checkpoints") == [2, 3]
    (half.workdir / "decoder/checkpoints/3/meta/metadata").write_text("{}")
    assert half()[0] == 0
    assert "decoder: resumed at step 2" in half.out
    assert (half.workdir / "decoder/checkpoints/quarantine/3").is_dir()


# -- data --------------------------------------------------------------------------------------


def captions(command: Command, change: Any) -> None:
    path = command.data / "shapes" / "images.jsonl"
    rows_ = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        json.dumps({**row, "captions": change(i, row["captions"])}) for i, row in enumerate(rows_)
    ]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("caption", ["", "  \t ", None, 7])
def test_a_caption_that_is_no_text_is_named_by_its_line(spoil, caption):
    captions(spoil, lambda i, old: [caption] if i == 4 else old)
    assert re.search(r"images\.jsonl, line 5: caption: expected a text, got", spoil.refused())


def test_text_that_is_not_utf8_is_named_by_its_line(spoil):
    path = spoil.data / "shapes" / "images.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[6] = lines[6].replace(b"a ", b"\xe9 ", 1)
    path.write_bytes(b"\n".join(lines))
    assert re.search(r"images\.jsonl, line 7: not UTF-8 .*; convert the file", spoil.refused())


def test_an_empty_table_and_an_empty_folder(spoil):
    (spoil.data / "shapes" / "images.jsonl").write_text("")
    assert spoil.refused().endswith("images.jsonl: no rows; the file is empty")
    (spoil.data / "empty").mkdir()
    spoil.change(
        f"config.data.images.source = dict(kind='tars', folder={str(spoil.data / 'empty')!r}, "
        "split='train')"
    )
    assert spoil.refused().endswith("empty: no shards train-NNN.tar; check the path")


def test_an_image_that_is_listed_but_missing(spoil):
    (spoil.data / "shapes" / "04.png").unlink()
    assert re.search(r"line 5: no file .*04\.png; add it or remove the row", spoil.refused())


def test_unusual_captions_are_trained_on_like_any_other(spoil):
    strange = [
        "</s><pad><eos><image>[PAD]",
        "w" * 200_000,
        "e\u0301 \U0001f600 \u202eabc \x00 \u2028",
    ]
    captions(spoil, lambda i, old: strange if i % 3 == 0 else old)
    assert spoil()[0] == 0, spoil.out
    assert [row["bad"] for row in spoil.metrics()] == [0] * runs.STEPS


def spoil_images(command: Command, number: int) -> list[str]:
    """Corrupt some images of the train split, each in another way; the table stays."""
    large = io.BytesIO()
    Image.new("1", (6000, 6000)).save(large, "PNG")
    names = [f"{i:02d}.png" for i in range(36) if i % 3 != 2][:number]
    for i, name in enumerate(names):
        path = command.data / "shapes" / name
        content = path.read_bytes()
        ways = [content[: len(content) // 2], large.getvalue(), b"<html>404</html>", b""]
        path.write_bytes(ways[i % len(ways)])
    return names


def test_images_that_cannot_be_read_are_left_out_counted_and_named(spoil):
    names = spoil_images(spoil, 4)
    code, _ = spoil("stages.decoder.steps=3")  # one epoch: each image once
    assert code == 0
    assert sum(row["bad"] for row in spoil.metrics()) == 4
    told = [line for line in spoil.out.splitlines() if "left out" in line]
    assert sorted(re.search(r"images '(.*?)' \(", line)[1] for line in told) == names
    faults = " ".join(told)
    assert "more than the 25000000 allowed" in faults
    assert "cannot be decoded" in faults
    assert "starts with b'<html>404" in faults


def test_too_many_images_that_cannot_be_read_end_the_run_by_name(spoil):
    names = spoil_images(spoil, 12)
    code, message = spoil("stages.decoder.save_every=1")
    assert code == 78
    assert re.search(
        r"^vadapter: decoder: 1\d of \d+ samples could not be used, more than 0\.1%: ", message
    )
    assert len(message.splitlines()) == 1
    assert sum(f"'{name}'" in message for name in names) >= 5
    assert "Fix or remove them, or allow more with --config.stages.decoder.max_bad=" in message
    assert steps(spoil.workdir / "decoder/checkpoints")  # what was trained until then is there


# -- full disks --------------------------------------------------------------------------------

# A process of its own: what fails in the background of a save is noise within pytest.
PROCESS = """
import resource, sys
from support import runs
from vadapter.cli import main
from vadapter.stages import steps
steps.make_train_step = runs.fake_step
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(main.main(["train", *sys.argv[2:]]))
"""


def process(train: Command, *, limit: int = 0) -> subprocess.CompletedProcess:
    """Run the command in a process, in which files may grow to `limit` bytes (0: without end)."""
    env = {
        **os.environ,
        "PYTHONPATH": f"{runs.TESTS}:{runs.TESTS.parent}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    arguments = [f"--config={train.folder / 'recipe.py'}", f"--workdir={train.workdir}"]
    command = [sys.executable, "-c", PROCESS, str(limit), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A disk of 600 kB; what it yields makes it larger."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    larger = ["mount", "-o", "remount,size=50m", str(path)]
    try:
        yield lambda: subprocess.run(larger, check=True)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kind", ["disk", pytest.param("limit", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_ends_the_run_and_loses_nothing(train, tmp_path, kind):
    # Checkpoints larger than what is copied before them: the first saves fit on the disk, and none
    # under the limit, which cuts the file that holds `front`.
    train.change(
        "config.components.front.hidden_dim = 1024;"
        "config.stages.decoder.update(save_every=1, keep=20, steps=12)"
    )
    train.workdir = tmp_path / "whole"
    assert train()[0] == 0
    whole = runs.trained_digests(train.workdir, ("decoder",))
    disk = small_disk(tmp_path / "disk") if kind == "disk" else contextlib.nullcontext()
    with disk as enlarge:
        train.workdir = tmp_path / "disk" / "run"
        ended = process(train, limit=0 if kind == "disk" else 60_000)
        assert ended.returncode == 78, ended.stderr
        assert "Traceback" not in ended.stderr
        lines = ended.stderr.splitlines()
        assert len(lines) <= 6, ended.stderr
        assert "3 saves in a row failed, the newest checkpoint is that of step" in lines[-1]
        assert lines[-1].endswith("Free space, then rerun the same command.")
        if enlarge:
            enlarge()
        kept = steps(train.workdir / "decoder/checkpoints")
        code, message = train()
        assert code == 0, message
        assert (f"decoder: resumed at step {max(kept, default=0)}" in train.out) == bool(kept)
        assert bool(kept) == (kind == "disk")
        assert runs.trained_digests(train.workdir, ("decoder",)) == whole
        assert {row["step"] for row in train.metrics()} == set(range(1, 13))
