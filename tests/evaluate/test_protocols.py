"""Protocols: one per benchmark, as in the paper; every change has another digest."""

import dataclasses

import pytest

from vadapter.config import digest
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.example import Question
from vadapter.data.prompts import QUESTION
from vadapter.errors import ConfigError
from vadapter.evaluate.benchmarks import choose
from vadapter.evaluate.protocols import POSTS, PROTOCOLS, draw, draw_questions, resolve
from vadapter.metrics.scoring import METRICS
from vadapter.metrics.vqa import RULES
from vadapter.models.generate import Decode

PAPER = PROTOCOLS["paper"]


def test_the_paper_protocol_has_every_benchmark_with_its_task_and_default_split():
    assert PAPER.keys() == BENCHMARKS.keys()
    for name, protocol in PAPER.items():
        assert protocol.task == BENCHMARKS[name].task
        assert protocol.split == BENCHMARKS[name].default_split
        assert (protocol.name, protocol.benchmark) == ("paper", name)
        assert protocol.decode.beams == 1
        assert protocol.shots == (4 if protocol.task == "question" else 0)
        assert protocol.shot_kind == "text"
        video_question = protocol.task == "question" and BENCHMARKS[name].media == "clip"
        after = "in exactly one word:" if video_question else "Answer:"
        if protocol.task == "question":
            assert protocol.question_prompt.after("why").endswith(after)
    rules = {name: METRICS[p.metric].rules for name, p in PAPER.items() if p.task == "question"}
    assert {name: RULES[r].name for name, r in rules.items()} == {
        "vqav2": "vqav2", "okvqa": "vqav2", "textvqa": "textvqa", "vizwiz": "vizwiz",
        "ivqa": "ivqa", "msrvtt_qa": "exact", "msvd_qa": "exact", "daquar": "exact",
    }  # fmt: skip


def test_all_tables_resolve_to_themselves():
    for table in PROTOCOLS.values():
        for name, protocol in table.items():
            assert resolve(table, name) == protocol
    asked = PROTOCOLS["unanswerable"]["vizwiz"].question_prompt.after("what is it")
    assert asked.endswith("respond with 'Unanswerable'. Answer:")


def test_every_field_is_part_of_the_digest():
    base, digests = PAPER["vqav2"], set()
    changes = {
        "name": "x", "benchmark": "x", "metric": "x", "prompt": "x", "split": "x", "shots": 1,
        "shot_kind": "image", "shot_seed": 1, "decode": Decode(9), "post": "x",
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(base)}
    for key, value in changes.items():
        digests.add(digest(dataclasses.replace(base, **{key: value})))
    for key, value in {"min_new": 1, "beams": 3, "length_penalty": 0.5}.items():
        how = dataclasses.replace(base.decode, **{key: value})
        digests.add(digest(dataclasses.replace(base, decode=how)))
    assert len(digests | {digest(base)}) == len(changes) + 4
    assert digest(resolve(PAPER, "vqav2", ["shots=4", "decode.beams=1"])) == digest(base)


def test_fields_are_overridden_by_name():
    changed = resolve(PAPER, "okvqa", ["shots=2", "shot_kind=image", "decode.beams=3"])
    expected = dataclasses.replace(PAPER["okvqa"], shots=2, shot_kind="image")
    how = dataclasses.replace(expected.decode, beams=3)
    assert changed == dataclasses.replace(expected, decode=how)


@pytest.mark.parametrize(
    ("benchmark", "override", "words"),
    [
        ("vqa2", "", "has no benchmark 'vqa2'; did you mean 'vqav2'"),
        ("vqav2", "shot=2", "unknown key; did you mean 'shots'"),
        ("vqav2", "shots=two", "shots"),
        ("vqav2", "shots=-1", "0 or more"),
        ("vqav2", "shot_kind=video", "shot_kind='video'"),
        ("vqav2", "post=answers", "did you mean 'answer'"),
        ("vqav2", "metric=vqa", "did you mean"),
        ("vqav2", "prompt=questions", "did you mean 'question'"),
        ("vqav2", "decode.beams=0", "at least 1"),
        ("vqav2", "decode.min_new=11", "at most"),
        ("coco", "shots=4", "text-only examples exist for questions only"),
    ],
)
def test_invalid_protocols_are_refused(benchmark, override, words):
    with pytest.raises(ConfigError, match=words):
        resolve(PAPER, benchmark, [override] if override else [])


def test_an_unknown_protocol_is_named():
    with pytest.raises(ConfigError, match="--protocol=papr: unknown; did you mean 'paper'"):
        choose("all", "papr")


TRAINING = [Question(f"q{i}", (f"a{i}",) * 3 + ("b",), "", str(i)) for i in range(50)]


def test_the_same_examples_are_drawn_every_time_and_others_by_another_seed():
    base = PAPER["vqav2"]
    drawn = draw_questions(TRAINING, base)
    assert drawn == draw_questions(list(TRAINING), base)
    assert len(set(drawn)) == 4
    assert all(q[1:] == a[1:] for q, a in drawn), "the answer that most annotators give"
    others = [
        draw_questions(TRAINING, dataclasses.replace(base, shot_seed=1)),
        draw_questions(TRAINING, PAPER["okvqa"]),
    ]
    assert all(other != drawn for other in others)
    # Pinned: other examples would be another protocol under the same digest.
    assert [q for q, _ in drawn] == ["q43", "q20", "q0", "q47"]


def test_questions_without_an_answer_are_not_drawn_and_too_few_are_refused():
    few = [*TRAINING[:4], Question("q", ()), Question("q", (" ",)), Question(" ", ("a",))]
    assert {q for q, _ in draw_questions(few, PAPER["vqav2"])} == {"q0", "q1", "q2", "q3"}
    with pytest.raises(ConfigError, match="has only 3"):
        draw_questions(few[1:], PAPER["vqav2"])
    assert draw([], dataclasses.replace(PAPER["vqav2"], shots=0)) == []


def test_the_prompt_of_pseudo_examples_is_the_papers():
    shown = QUESTION.fill("what is it", [("how many", "2"), ("where", "here")])
    assert shown.before + "<visual>" + shown.after == (
        "Answer the question given the images. Given Question: how many Answer: 2 Given Question: "
        "where Answer: here Given<visual>. Question: what is it Answer:"
    )


@pytest.mark.parametrize(
    ("text", "line", "answer"),
    [
        ("red", "red", "red"),
        (" red. ", "red.", "red"),
        ("\n two dogs \n and more", "two dogs", "two dogs"),
        ("two  dogs Given Question: why", "two dogs Given Question: why", "two dogs"),
        ("yes Question: why Answer: no", "yes Question: why Answer: no", "yes"),
        ("Given", "Given", "Given"),
        ("u.s.", "u.s.", "u.s"),
        ("", "", ""),
        (" \n ", "", ""),
    ],
)
def test_postprocessing(text, line, answer):
    assert (POSTS["line"](text), POSTS["answer"](text)) == (line, answer)
    assert POSTS["none"](text) == text
