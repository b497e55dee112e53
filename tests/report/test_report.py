"""The report of a run: its table, its plot, and a gallery that is one safe file."""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.recipes import tiny_recipe

from vadapter.console import markdown_table
from vadapter.data.media.images import BadMedia
from vadapter.io.json_files import lines
from vadapter.metrics.blind_baselines import constant_caption, majority_answer
from vadapter.recipe.schema import read
from vadapter.report.gallery import MAX_BYTES, Section, choose, thumbnail, write_gallery
from vadapter.report.plots import arms, convergence, draw
from vadapter.report.report import write_report
from vadapter.report.table import HEADER, score_table, seconds, shown, summary
from vadapter.stages.restore import read_run

NASTY = '<script>alert("1")</script>\' onload="x" & ]]> \x00'


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    """A copy of the run with its report written again."""
    target = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(chain / "run", target)
    for name in ("table.md", "table.txt", "gallery.html", "plots/convergence.png"):
        (target / name).unlink()
    return target


@pytest.fixture(scope="module")
def report(run):
    return write_report(run, read_run(run))


class Page(html.parser.HTMLParser):
    """The tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        uris = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        parts = [re.fullmatch(r"data:image/(png|jpeg|webp);base64,([\w+/=]+)", u) for u in uris]
        assert all(parts)
        return [Image.open(io.BytesIO(base64.b64decode(part[2]))) for part in parts]


def test_the_table_has_a_row_a_stage_with_what_was_measured(run, report):
    rows = {row[0]: row for row in summary(run, read_run(run))}
    assert list(rows) == ["tlm", "llm", "vision", "decoder", "vadapter", "perceiver", "blind"]
    done = json.loads((run / "vadapter" / "done.json").read_text())
    scores = done["scores"]
    losses = " / ".join(
        f"{scores[f'held/{key}']:.3f}" for key in ("loss", "loss_wrong", "loss_mean")
    )

    def stated(name, metric):
        saved = json.loads((run / "vadapter" / "eval" / name / "score.json").read_text())
        ends = ", ".join(f"{100 * end:.1f}" for end in saved["intervals"][metric])
        return f"{100 * scores[f'{name}/{metric}']:.1f} [{ends}]"

    last = (run / "vadapter" / "metrics.jsonl").read_text().splitlines()
    last = [row["loss"] for row in map(json.loads, last) if "loss" in row][-1]
    assert rows["vadapter"] == (
        "vadapter",
        "adapter",
        "40",
        f"{last:.3f}",
        losses,
        "\n".join(f"{name} {stated(name, 'cider')}" for name in ("captions", "clips")),
        stated("answers", "accuracy"),
        "—",  # nothing judges captions of this data
        f"{done['seconds']:.0f}",
    )
    assert rows["vision"][4:7] == ("—",) * 3
    said = lambda name: list(lines(run / "vadapter" / "eval" / name / "predictions.jsonl"))  # noqa: E731
    ciders = {
        name: constant_caption([row["references"] for row in said(name)])
        for name in ("captions", "clips")
    }
    majority = majority_answer([(row["question"], row["answer"]) for row in said("answers")])
    interval = r" \[(\d+\.\d), (\d+\.\d)\]"
    cells = "\n".join(rows["blind"][5:7])
    for low, high in re.findall(interval, cells):
        assert float(low) <= float(high)
    assert re.sub(interval, "", cells).split("\n") == [
        *(f"{name} {100 * cider:.1f}" for name, cider in ciders.items()),
        f"{100 * majority:.1f}",
    ]
    assert len(re.findall(interval, cells)) == 3
    assert (run / "table.txt").read_text() == report.text + "\n"
    assert report.table.read_text() == markdown_table(*shown(list(rows.values())))


def test_an_interval_is_left_out_where_it_is_absent_or_of_another_score(run, tmp_path):
    target = shutil.copytree(run, tmp_path / "run")
    captions, clips = (
        target / "vadapter" / "eval" / n / "score.json" for n in ("captions", "clips")
    )
    saved = json.loads(captions.read_text())
    del saved["intervals"]  # as earlier versions wrote it
    captions.write_text(json.dumps(saved))
    repeated = json.loads(clips.read_text())
    repeated["scores"]["cider"] += 0.01
    clips.write_text(json.dumps(repeated))
    before = {row[0]: row for row in summary(run, read_run(run))}["vadapter"]
    after = {row[0]: row for row in summary(target, read_run(target))}["vadapter"]
    assert after[5] == re.sub(r" \[.*\]", "", before[5])
    assert after[6] == before[6]


def test_the_column_of_right_captions_is_there_where_captions_are_judged():
    column = HEADER.index("captions\nright, %")
    empty = ["—"] * len(HEADER)
    assert shown([tuple(empty)])[1] == (*HEADER[:column], *HEADER[column + 1 :])
    judged = [*empty[:column], "12.5", *empty[column + 1 :]]
    table = [tuple(empty), tuple(judged)]
    assert shown(table) == (table, HEADER)


def test_scores_are_in_percent_and_counts_are_not():
    scores = {"facts": 0.5, "facts_per_caption": 4.236, "n": 200}
    rows, header = score_table({"captions": {"scores": scores, "intervals": {"facts": (0.4, 1)}}})
    assert header == ("score", "captions")
    assert dict(rows) == {
        "n": "200", "facts": "50.0 [40.0, 100.0]", "facts_per_caption": "4.24"
    }  # fmt: skip


def test_the_seconds_of_interrupted_attempts_add_up(tmp_path):
    times = [(1, 100, 2000, 3), (1, 110, 0, 0), (2, 500, 1000, 0), (2, 520, 0, 0)]
    keys = ("attempt", "time", "step_ms", "compile_s")
    lines = [json.dumps({"step": 1, **dict(zip(keys, row, strict=True))}) for row in times]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert seconds(tmp_path) == pytest.approx(5 + 10 + 1 + 20)
    (tmp_path / "done.json").write_text(json.dumps({"seconds": 30.0}))
    assert seconds(tmp_path) == pytest.approx(5 + 10 + 30)  # its own clock, with the evaluation


def test_a_run_without_steps_has_a_table_and_nothing_else(chain, tmp_path):
    recipe = read(tiny_recipe(chain / "shapes"))
    report = write_report(tmp_path, recipe)
    assert report.files() == [tmp_path / "table.md"]
    assert report.text.count("0 of 4") == 6


def test_the_plot_is_an_image_and_only_of_adapters(run, report, tmp_path):
    with Image.open(report.plot) as image:
        assert image.size[0] > 1000
        assert np.asarray(image.convert("L")).std() > 10  # something is drawn
    shutil.copytree(run / "decoder", tmp_path / "decoder")
    assert convergence(tmp_path, read_run(run), tmp_path / "plot.png") is None
    assert not (tmp_path / "plot.png").exists()


def logged(folder, stage, rows):
    """Write the metrics.jsonl of a stage: step -> values."""
    (folder / stage).mkdir(parents=True)
    text = "".join(json.dumps({"step": step, **values}) + "\n" for step, values in rows)
    (folder / stage / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize("metric", ["captions_right", "cider"])
def test_the_plot_counts_the_steps_of_stage_1_on_a_second_line(chain, tmp_path, metric):
    recipe = read(tiny_recipe(chain / "shapes", steps=4))
    for shift, name in ((0.0, "vadapter"), (0.1, "perceiver")):
        rows = []
        for step in range(1, 5):
            scores = {"captions/cider": 0.01, f"captions/{metric}": step / 10 + shift}
            measured = {"held/loss": 2 - step / 10, "captions/n": 8.0, **scores}
            rows += [(step, {"loss": 2.0}), (step, measured)]
        logged(tmp_path, name, rows)
    drawn = arms(tmp_path, recipe)
    assert {arm.name: arm.before for arm in drawn} == {"vadapter": 4, "perceiver": 0}
    losses, scores = draw(drawn).axes
    for axes, of in ((losses, lambda step: 2 - step / 10), (scores, lambda step: 10 * step)):
        lines = {line.get_label(): line for line in axes.get_lines()}
        (name,) = (n for n in lines if n.startswith("vadapter: "))
        counted = lines["vadapter, with 4 steps of stage 1"]
        np.testing.assert_array_equal(lines[name].get_xdata(), [1, 2, 3, 4])
        np.testing.assert_array_equal(counted.get_xdata(), [5, 6, 7, 8])
        for line in (lines[name], counted):
            np.testing.assert_allclose(line.get_ydata(), [of(step) for step in range(1, 5)])
        assert sum(n.startswith("perceiver") for n in lines) == 1
    words = {"captions_right": "right captions in %", "cider": "CIDEr × 100"}
    assert scores.get_ylabel() == words[metric]


def test_captions_that_are_judged_have_their_facts_marked(tmp_path):
    rows = [
        {"id": str(i), "index": i, "prediction": f"said {i}", "references": [], "score": i / 9,
         "right": i % 3 == 0, "facts": {"color": [2, 2], "shape": [i % 2, 1]}}
        for i in range(9)
    ]  # fmt: skip
    section = Section("e", "caption", {"s": rows}, lambda row: np.zeros((1, 8, 8, 3), np.uint8))
    groups = choose(rows, "caption", each=4)
    assert [row["right"] for row in groups["Right"]] == [True] * 3
    assert [row["right"] for row in groups["Wrong"]] == [False] * 4
    text = write_gallery(tmp_path / "g.html", "t", [section]).read_text()
    cards = text.split("<article>")[1:]
    assert len(cards) == 9
    for card in cards:
        i = int(re.search(r"said (\d)", card)[1])
        assert ("<span>✓</span>" in card) == (i % 3 == 0)
        assert "<span class=right>color 2 of 2&nbsp;✓</span>" in card
        state = "right>shape&nbsp;✓" if i % 2 else "wrong>shape&nbsp;✗"
        assert f"<span class={state}</span>" in card


def test_the_gallery_is_one_file_with_images_clips_and_every_stage(run, report):
    text = report.gallery.read_text()
    page = Page(text)
    assert len(text) < MAX_BYTES
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert not re.search(r"url\(|@import|https?:", text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    shown = page.images()
    assert {image.format for image in shown} == {"PNG", "WEBP"}
    assert all(image.n_frames == 8 for image in shown if image.format == "WEBP")
    assert "no image" not in text

    rows = (run / "vadapter" / "eval" / "answers" / "predictions.jsonl").read_text().splitlines()
    questions = {row["question"] for row in map(json.loads, rows)}
    assert all(f"{question} → " in page.text for question in questions)
    rows = (run / "perceiver" / "eval" / "captions" / "predictions.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert all(text in page.text for text in (*row["references"], row["prediction"]))
    assert page.text.count("perceiver ") >= 12


def test_texts_of_data_and_models_are_never_markup(tmp_path):
    row = {
        "id": NASTY, "index": 0, "prediction": NASTY, "references": [NASTY], "score": 0.5,
        "question": NASTY, "answer": NASTY,
    }  # fmt: skip
    media = lambda row: np.zeros((1, 8, 8, 3), np.uint8)  # noqa: E731
    gone = lambda row: (_ for _ in ()).throw(BadMedia(NASTY))  # noqa: E731
    sections = [
        Section(NASTY, task, {NASTY: [row]}, pixels)
        for task in ("caption", "question")
        for pixels in (media, gone)
    ]
    text = write_gallery(tmp_path / "g.html", NASTY, sections, NASTY).read_text()
    assert "<script" not in text
    assert "\x00" not in text
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert all("onload" not in attrs for _, attrs in page.tags)
    shown = NASTY.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert page.text.count(shown) >= 4 * 4
    assert {attrs["alt"] for tag, attrs in page.tags if tag == "img"} == {shown}


def test_missing_and_changed_images_are_reported(run, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(run, target)
    config = (target / "config.json").read_text()
    folder = json.loads(config)["data"]["held"]["source"]["table"].removesuffix("/images.jsonl")
    (target / "config.json").write_text(config.replace(folder, "/nowhere"))
    page = Page(write_report(target, read_run(target)).gallery.read_text())
    assert not page.images()
    assert "no image: /nowhere/images.jsonl: no such file" in page.text

    for file in target.glob("*/eval/captions/predictions.jsonl"):
        file.write_text(file.read_text()[:-30])  # torn by a kill
    for file in target.glob("*/eval/answers/predictions.jsonl"):
        file.write_text("")
    (target / "config.json").write_text(config.replace('"split": "val"', '"split": "train"'))
    page = Page(write_report(target, read_run(target)).gallery.read_text())
    assert "no image: the data set has changed since the evaluation" in page.text
    assert "11 held-out items" in page.text
    assert "answers" not in [line.strip() for line in page.text.splitlines()]


def test_large_images_become_smaller_until_the_file_is_small_enough(tmp_path):
    rng = np.random.default_rng(0)
    media = lambda row: rng.integers(0, 256, (1, 300, 400, 3)).astype(np.uint8)  # noqa: E731
    rows = [
        {"id": str(i), "index": i, "prediction": "x", "references": ["y"], "score": i / 9}
        for i in range(9)
    ]
    section = Section("e", "caption", {"s": rows}, media)
    sizes = []
    for limit in (MAX_BYTES, 60_000):
        path = write_gallery(tmp_path / "g.html", "t", [section], max_bytes=limit)
        assert path.stat().st_size <= limit
        sizes.append({image.size for image in Page(path.read_text()).images()})
    assert sizes[0] == {(160, 120)}
    assert max(max(sizes[1])) < 160


def test_best_and_worst_are_by_score_and_the_choice_is_always_the_same():
    rows = [{"index": i, "score": float(i % 7)} for i in range(40)]
    groups = choose(rows, "caption", each=3)
    assert groups == choose(list(reversed(rows))[::-1], "caption", each=3)
    assert [row["score"] for row in groups["Best"]] == [6.0, 6.0, 6.0]
    assert [row["score"] for row in groups["Worst"]] == [0.0, 0.0, 0.0]
    indices = [row["index"] for group in groups.values() for row in group]
    assert len(set(indices)) == len(indices) == 9
    assert choose(rows[:2], "caption") == {"Best": [rows[1], rows[0]]}


def test_answers_are_right_or_wrong_and_a_group_may_be_empty():
    rows = [{"index": i, "score": float(i == 3)} for i in range(5)]
    groups = choose(rows, "question", each=2)
    assert groups["Right"] == [rows[3]]
    assert [len(group) for group in groups.values()] == [1, 2, 2]
    assert list(choose(rows[:2], "question")) == ["Wrong"]


def test_thumbnails_keep_small_images_exact_and_shrink_large_ones():
    frames = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3)).astype(np.uint8)
    open_ = lambda uri: Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))  # noqa: E731
    uri, small = thumbnail(frames, 160)
    assert small
    np.testing.assert_array_equal(np.asarray(open_(uri)), frames[0])
    uri, small = thumbnail(np.zeros((1, 400, 200, 3), np.uint8), 160)
    assert (open_(uri).size, open_(uri).format, small) == ((80, 160), "JPEG", False)
    clip = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.full((1, 50, 40, 3), 30, np.uint8)
    uri, _ = thumbnail(clip, 160)
    assert open_(uri).n_frames == 8
