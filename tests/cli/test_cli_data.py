"""`vadapter data show|stats|cache|index`: what is printed and written, and told of mistakes."""

import json
import re
import shutil
import tarfile

import pytest
from support import runs
from support.opened import prepare
from support.paths import RECIPES

from vadapter.cli.main import main
from vadapter.errors import USER_ERROR

SUBVERBS = ("cache", "doctor", "index", "prepare", "show", "stats")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The file of a recipe whose encoder another run has trained, with a data set to cache."""
    return runs.write_recipe(runs.prepare(tmp_path_factory.mktemp("cached")))


@pytest.fixture
def call(root, capfd):
    """Run `vadapter data …` in this process: (exit code, stdout, stderr)."""

    def run(*argv):
        code = main(["data", *map(str, argv)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def look(root, call):
    """Run `show` or `stats` on the recipe over root/shapes, in its run."""
    return lambda verb, *argv: call(
        verb, f"{RECIPES}:{root / 'shapes'}", f"--workdir={root / 'run'}", *argv
    )


@pytest.fixture
def shards(tmp_path):
    """A folder with a shard of two images and their texts."""
    (tmp_path / "pairs").mkdir()
    with tarfile.open(tmp_path / "pairs" / "0.tar", "w") as tar:
        for name, body in (("a.png", b"png"), ("a.txt", b"a"), ("b.png", b"png"), ("b.txt", b"b")):
            (tmp_path / name).write_bytes(body)
            tar.add(tmp_path / name, name)
    return tmp_path / "pairs"


def test_show_prints_a_legend_and_so_many_rows_of_each_data_set(look):
    code, out, err = look("show", "--data=images,clips", "--n=3")
    assert (code, err) == (0, "")
    assert out.startswith("context, ⟦target⟧, padding\n\n")
    assert re.findall(r"^(\w+)\[\d+\] \d\d\.\w+, (\d)", out, re.MULTILINE) == [
        *[("images", "1")] * 3, *[("clips", "8")] * 3
    ]  # fmt: skip
    assert "\x1b" not in out  # not a terminal
    assert "⟦ a " in out


def test_show_draws_what_overrides_and_the_stage_say(look):
    view = ("--data=images", "--n=1", "--stage=perceiver", "--config.data.images.size=16")
    code, out, _ = look("show", *view)
    assert code == 0
    assert "png, 1 × 16 × 16" in out


def test_the_page_of_show_needs_nothing_else(look, tmp_path):
    path = tmp_path / "deep" / "page.html"
    code, out, _ = look("show", "--data=images", "--n=2", f"--out={path}")
    assert (code, out) == (0, f"{path}\n")
    page = path.read_text()
    assert page.startswith("<!doctype html>\n")
    assert page.count("<article>") == page.count('<img src="data:image/png;base64,') == 2
    assert not re.search(r"<script|<link|@import|url\(|(?:src|href)=(?!\"?data:)", page)
    assert "https:" not in page
    assert f"<title>{RECIPES}:" in page


def test_stats_prints_text_or_one_json_list(look):
    code, out, err = look("stats", "--data=images,held")
    assert (code, err) == (0, "")
    assert "images: 24 examples" in out
    assert "held: 12 examples" in out
    code, out, _ = look("stats", "--data=images,held", "--json", "--limit=6")
    facts = json.loads(out)
    assert [(f["data"], f["looked_at"], f["rows"]) for f in facts] == [
        ("images", 6, 6), ("held", 6, 6)
    ]  # fmt: skip


def test_stats_of_zero_looks_at_all(look):
    (facts,) = json.loads(look("stats", "--data=images", "--json", "--limit=0")[1])
    assert facts["looked_at"] == 24


@pytest.mark.parametrize("verb", ["show", "stats"])
@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--data=image"], r"config\.data: unknown 'image'; did you mean 'images'"),
        (["--data=images", "--stage=decodr"], r"config\.stages: unknown 'decodr'; did you mean"),
        (
            ["--data=questions"],
            r"config\.data\.questions: no stage .* reads it; pass the stage .* --stage",
        ),
        (["--config.data.imags.size=3"], r"imags"),
    ],
)
def test_missing_names_are_an_error_that_lists_the_present_ones(look, verb, argv, told):
    code, _, err = look(verb, *argv)
    assert code == USER_ERROR
    assert re.search(told, err)
    assert err.count("\n") == 1


def test_without_a_tokenizer_show_stops_and_stats_reports_the_rest(call, root):
    recipe = f"{RECIPES}:{root / 'shapes'}"
    code, _, err = call("show", recipe, "--data=images")
    assert code == USER_ERROR
    assert "need the tokenizer of stage vision: pass --workdir=RUN" in err
    code, out, err = call("stats", recipe, "--data=images")
    assert (code, err) == (0, "")
    assert "need the tokenizer of stage vision: pass --workdir=RUN" in out


def test_a_page_that_cannot_be_written_is_an_error(look, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "page.html", tmp_path):
        code, out, err = look("show", "--data=images", "--n=1", f"--out={path}")
        assert (code, out) == (USER_ERROR, "")
        assert f"vadapter: {path} cannot be written: " in err
        assert err.count("\n") == 1


def test_cache_writes_and_says_how_to_use_it(call, cached, tmp_path):
    out = tmp_path / "features"
    code, said, _ = call("cache", cached, f"--out={out}", "--dtype=int8")
    assert code == 0
    (folder,) = out.iterdir()
    assert f"images: {folder}\n" in said
    use = f"cache_dir={out} --config.data.images.cache_dtype=int8\n"
    assert f"  --config.data.images.cache=True --config.data.images.{use}" in said
    assert "feature cache: 24 of 24 examples" in said
    again = call("cache", cached, f"--out={out}", "--dtype=int8")
    assert again[0] == 0
    assert "features:" not in again[1]  # all of it is there


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--data=imags"], "--data=imags: unknown; did you mean 'images'"),
        (["--config.data.images.cache=false"], "no data set of the recipe has cache=True"),
        ([], "data.images: no folder to write to; give --out=DIR"),
        (["--out={file}/features"], "{file}/features/"),
        (["--out={file}"], "{file}"),
    ],
)
def test_a_cache_that_cannot_be_created_is_an_error(call, cached, tmp_path, argv, told):
    (file := tmp_path / "file").touch()
    code, out, err = call("cache", cached, *(item.format(file=file) for item in argv))
    assert (code, out) == (USER_ERROR, "")
    assert told.format(file=file) in err
    assert err.count("\n") == 1


def test_index_writes_one_file_at_the_given_path(call, shards, tmp_path):
    code, out, _ = call("index", shards, f"--out={tmp_path / 'elsewhere'}")
    assert code == 0
    assert (
        f"{tmp_path / 'elsewhere'}: 1 shard (1 read now), 4 files, 2 pairs of media and text" in out
    )
    assert [p.name for p in shards.iterdir()] == ["0.tar"]
    code, out, _ = call("index", shards, f"--out={tmp_path / 'elsewhere'}", "--verify")
    assert code == 0
    assert out.endswith("elsewhere: 1 shard unchanged\n")


def test_an_index_that_cannot_be_created_is_an_error(call, shards, tmp_path):
    (file := tmp_path / "file").touch()
    for argv, told in (
        ([file], f"{file}: no such folder"),
        ([tmp_path / "none"], f"{tmp_path / 'none'}: no such folder"),
        ([shards, f"--out={file}/index"], f"{file}/index"),
        ([shards, f"--out={tmp_path}"], f"{tmp_path} is a folder; name the file"),
        ([shards, "--verify"], "index.vadapter"),
    ):
        code, _, err = call("index", *argv)
        assert code == USER_ERROR
        assert told in err
        assert err.count("\n") == 1
    shutil.rmtree(shards)
    shards.mkdir()
    code, _, err = call("index", shards)
    assert code == USER_ERROR
    assert "no .tar or .parquet files" in err


@pytest.mark.parametrize(
    "argv",
    [
        ["data"],
        ["data", "shwo"],
        ["data", "show"],
        ["data", "show", "FILE.py", "--n=0"],
        ["data", "stats", "FILE.py", "--limit=-1"],
        ["data", "stats", "FILE.py", "--limit=many"],
        ["data", "cache", "FILE.py", "--dtype=int4"],
        ["data", "index"],
    ],
    ids=" ".join,
)
def test_mistakes_in_the_command_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: vadapter data" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", *SUBVERBS])
def test_help_lists_every_option_and_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", *([verb] if verb else []), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    if not verb:
        assert all(f"\n    {name}" in text for name in SUBVERBS)
        return
    assert f"example:\n  vadapter data {verb} " in text
    assert ("--config.a.b=VALUE" in text) == (verb in ("cache", "show", "stats"))
    options = re.findall(r"^  (--[\w-]+|[A-Z]+)\b(.*(?:\n {10,}.*)?)", text, re.MULTILINE)
    assert options
    assert all(len(words.split()) > 1 for _, words in options)
