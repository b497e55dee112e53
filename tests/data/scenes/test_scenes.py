"""The embedded data set is reproducible, split cleanly, true, and not answered blindly."""

import collections
import dataclasses
import itertools
import pickle
import re

import numpy as np
import pytest

from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.scenes.captions import (
    CAPTIONS,
    COLOR_WORDS,
    GROUND_WORDS,
    MOTION_WORDS,
    PLACE_WORDS,
    PLACES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    captions,
    keywords,
    plural,
    relations,
    whole,
)
from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.paint import OUTLINES, render
from vadapter.data.scenes.questions import KINDS, MOTION_ANSWERS
from vadapter.data.scenes.source import DOCUMENTS, ScenesSource, document, example_digest
from vadapter.data.scenes.world import (
    COLORS,
    HELD_OUT,
    MOTIONS,
    PAIRS,
    RADII,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    draw,
    phases,
)
from vadapter.errors import ConfigError

VISUAL = ("image", "clip")
OPPOSITE = {
    m: next(o for o, w in MOTIONS.items() if w == tuple(-c for c in v)) for m, v in MOTIONS.items()
}
COUNTS = ("no", "one", "two", "three")


def flat(words: dict[str, tuple]) -> dict[str, str]:
    """phrase -> meaning, the longest phrase first."""
    pairs = [
        (phrase, meaning)
        for meaning, phrases in words.items()
        for entry in phrases
        for phrase in ([entry] if isinstance(entry, str) else entry)
        if phrase
    ]
    return dict(sorted(pairs, key=lambda pair: -len(pair[0])))


MOTION, PLACE, RELATION = flat(MOTION_WORDS), flat(PLACE_WORDS), flat(RELATION_WORDS)
SIZE, COLOR, SHAPE, GROUND = map(flat, (SIZE_WORDS, COLOR_WORDS, SHAPE_WORDS, GROUND_WORDS))


def any_of(phrases) -> str:
    return "(" + "|".join(map(re.escape, phrases)) + ")"


PATTERNS = {
    "motion": re.compile(rf"\b{any_of(MOTION)}\b"),
    "ground": re.compile(rf"\bon an? {any_of(GROUND)} background"),
    "thing": re.compile(rf"\b(?:{any_of(SIZE)} )?{any_of(COLOR)} {any_of(SHAPE)}\b"),
    "place": re.compile(rf"\b{any_of(PLACE)}\b"),
    "relation": re.compile(rf"\b{any_of(RELATION)}\b"),
    "count": re.compile(
        rf"\b{any_of(COUNTS)} (?:{any_of(COLOR)} )?"
        rf"{any_of(['shapes', 'shape', *map(plural, SHAPE)])}"
    ),
    "color": re.compile(rf"\b{any_of(COLOR)}\b"),
    "shape": re.compile(rf"\b{any_of(SHAPE)}\b"),
}


def parse(text: str) -> tuple[list[tuple[str, tuple[str, ...]]], set[str]]:
    """What a text claims, in reading order, and the words that claim nothing."""
    claims = []
    for what, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            claims.append((match.start(), what, tuple(g or "" for g in match.groups())))
        text = pattern.sub(lambda match: "." * len(match[0]), text)
    return [(w, groups) for _, w, groups in sorted(claims)], set(re.findall(r"[a-z]+", text))


GLUE = frozenset(
    re.findall(
        "[a-z]+",
        """a an the there is are and with while as that we see also together single only sits can be
    seen of one picture shows image video clip""",
    )
)


def the(scene: Scene, color: str = "", shape: str = "", size: str = "") -> Thing:
    """The one thing of a scene that is so; there must be one."""
    found = [
        t
        for t in scene.things
        if COLOR.get(color, t.color) == t.color
        and SHAPE.get(shape, t.shape) == t.shape
        and SIZE.get(size, t.size) == t.size
    ]
    assert len(found) == 1, f"{size} {color} {shape}: {len(found)} such things"
    return found[0]


def subjects(scene: Scene, claims: list) -> list[Thing | None]:
    """The thing every claim names, or None."""
    named = {"thing": ("size", "color", "shape"), "color": ("color",), "shape": ("shape",)}
    return [
        the(scene, **dict(zip(named[what], groups, strict=True))) if what in named else None
        for what, groups in claims
    ]


def check_true(scene: Scene, text: str) -> None:
    """Every claim of `text` holds in the scene, and no word is left unexplained."""
    claims, rest = parse(text)
    assert claims, text
    assert rest <= GLUE, (text, rest - GLUE)
    things = subjects(scene, claims)
    for i, (what, groups) in enumerate(claims):
        before = next((t for t in reversed(things[:i]) if t), None)
        after = next((t for t in things[i + 1 :] if t), None)
        subject = before or after
        if what == "place":
            assert PLACES[subject.cell] == PLACE[groups[0]], text
        elif what == "motion":
            assert before is not None
            assert before.motion == MOTION[groups[0]], text
        elif what == "relation":
            assert RELATION[groups[0]] in relations(before, after), text
        elif what == "ground":
            assert GROUND[groups[0]] in (scene.tone, scene.texture), text
        elif what == "count":
            number, color, noun = groups
            assert COUNTS.index(number) == len(scene.things), text
            singular = {plural(s): meaning for s, meaning in SHAPE.items()}
            assert all(t.shape == singular.get(noun, t.shape) for t in scene.things), text
            assert all(t.color == COLOR.get(color, t.color) for t in scene.things), text


@pytest.mark.parametrize("media", VISUAL)
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_captions_say_only_what_is_true(media, split):
    source = ScenesSource(media, split)
    for i in range(80):
        scene = source.scene(i)
        said = captions(scene, Dice(1, 0, i, 0))
        assert len(set(said)) == 5
        for caption in said:
            check_true(scene, caption)


def test_the_caption_check_detects_a_false_caption():
    scene = ScenesSource("image").scene(0)
    thing = scene.things[0]
    check_true(scene, f"a {thing.color} {thing.shape}")
    for lie in (
        f"a {next(c for c in COLORS if c != thing.color)} {thing.shape}",
        f"a {thing.color} {thing.shape} {PLACE_WORDS[PLACES[8 - thing.cell or 1]][0]}",
        f"a {thing.color} {thing.shape} with whiskers",
        "three shapes",
    ):
        with pytest.raises(AssertionError):
            check_true(scene, lie)


def answer(scene: Scene, question: str, kind: str) -> str:
    """The answer worked out again from the structure and the words of the question."""
    claims, _ = parse(question)
    said = collections.defaultdict(list)
    for what, groups in claims:
        said[what].append(groups)
    pairs = [(c, s) for _, c, s in said["thing"]]
    if kind in ("colour", "shape"):
        found = [
            t
            for t in scene.things
            if all(PLACES[t.cell] == PLACE[g[0]] for g in said["place"])
            and all(t.motion == MOTION[g[0]] for g in said["motion"])
            and all(t.shape == SHAPE[g[0]] for g in said["shape"])
            and all(t.color == COLOR[g[0]] for g in said["color"])
        ]
        assert len(found) == 1, question
        return found[0].color if kind == "colour" else found[0].shape
    if kind in ("size", "motion", "position"):
        things = [the(scene, *pair) for pair in pairs]
    if kind == "size":
        return things[0].size
    if kind == "count":
        what = re.fullmatch(r"How many (.*) are there\?", question)[1]
        return str(
            sum(what in ("shapes", plural(t.shape), f"{t.color} shapes") for t in scene.things)
        )
    if kind == "motion":
        (thing,) = things
        return thing.motion if "Which way" in question else MOTION_ANSWERS[thing.motion]
    if kind == "position":
        if len(things) == 1:
            return PLACES[things[0].cell]
        options = {"left", "right"} if " left " in question else {"above", "below"}
        (side,) = options & set(relations(*things))
        return side
    if said["relation"]:
        a, b = (the(scene, *pair) for pair in pairs)
        true = RELATION[said["relation"][0][0]] in relations(a, b)
    elif said["motion"]:
        true = the(scene, *pairs[0]).motion == MOTION[said["motion"][0][0]]
    else:
        true = pairs[0] in [t.pair for t in scene.things]
    return "yes" if true else "no"


@pytest.mark.parametrize("media", VISUAL)
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_answers_follow_from_the_scene(media, split):
    source, kinds = ScenesSource(media, split), collections.Counter()
    for i in range(100):
        for question, told, kind in source.qa(i):
            assert told == answer(source.scene(i), question, kind), question
            kinds[kind] += 1
    assert set(kinds) == set(KINDS) - {"motion" if media == "image" else "position"}


def blind_accuracy(source: ScenesSource, limit: int) -> dict[str, dict[str, float]]:
    """Return the accuracy of answering without looking, which a model must exceed.

    Returns:
      By question kind, and for "all": `kind_majority`, the accuracy of the most frequent training
      answer to the kind, and `question_majority`, that of the most frequent training answer to the
      same question, word for word, or else to the kind.
    """
    training = dataclasses.replace(source, split="train", count=max(source.count, limit))
    by_kind, by_text = (collections.defaultdict(collections.Counter) for _ in range(2))
    for i in range(min(len(training), limit)):
        for question, given, kind in training.qa(i):
            by_kind[kind][given] += 1
            by_text[question][given] += 1
    hits = collections.defaultdict(collections.Counter)
    for i in range(min(len(source), limit)):
        for question, given, kind in source.qa(i):
            frequent, *_ = by_kind[kind].most_common(1) or [("", 0)]
            same, *_ = by_text[question].most_common(1) or [frequent]
            for key in (kind, "all"):
                hits[key]["count"] += 1
                hits[key]["kind_majority"] += given == frequent[0]
                hits[key]["question_majority"] += given == same[0]
    return {
        key: {name: n[name] / n["count"] for name in ("kind_majority", "question_majority")}
        for key, n in hits.items()
    }


@pytest.mark.parametrize("media", VISUAL)
def test_guessing_without_looking_stays_low(media):
    for split in ("test", "unseen"):
        for kind, scores in blind_accuracy(ScenesSource(media, split), limit=500).items():
            # About half at most (yes or no, small or large); the margin is for small counts.
            assert scores["question_majority"] < 0.57, (split, kind, scores)
            assert scores["kind_majority"] < 0.57, (split, kind, scores)


@pytest.mark.parametrize("media", VISUAL)
def test_two_sided_answers_come_equally_often(media):
    told = collections.Counter()
    source = ScenesSource(media)
    for i in range(800):
        told.update(text for _, text, kind in source.qa(i) if kind in ("yes/no", "size"))
    for one, other in (("yes", "no"), ("small", "large")):
        assert 0.45 < told[one] / (told[one] + told[other]) < 0.55, told


def test_frames_have_the_stated_shape_and_show_the_objects():
    for media, frames, size in (("image", 1, 64), ("clip", 8, 64), ("image", 1, 96)):
        source = ScenesSource(media, size=size)
        for i in range(20):
            pixels, scene = source[i].media, source.scene(i)
            assert pixels.shape == (frames, size, size, 3)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            for t in scene.things if media == "image" else scene.things[-1:]:
                # The ring's center is ground; its right side is paint.
                x = t.x + (0.75 * t.radius if t.shape == "ring" else 0)
                seen = pixels[frames // 2, int(t.y * size), int(x * size)].astype(float)
                nearest = min(COLORS, key=lambda c: np.abs(seen - COLORS[c]).sum())
                assert nearest == t.color, (media, i, t)


def test_every_shape_looks_different_from_every_other():
    def painted(shape):
        thing = Thing("white", shape, "large", radius=RADII["small"], rgb=(255.0, 255.0, 255.0))
        scene = Scene("image", (thing,), "dark", "plain", ((0.0,) * 3,) * 2, 0.0)
        return render(scene, 64, Dice(0, 0, 0, 0))[0, ..., 0].astype(float) / 255

    covers = {shape: painted(shape) for shape in OUTLINES}
    for a, b in itertools.combinations(covers, 2):
        overlap = np.minimum(covers[a], covers[b]).sum() / np.maximum(covers[a], covers[b]).sum()
        assert overlap < 0.85, (a, b, overlap)


def test_motion_is_only_in_the_order_of_the_frames():
    """Played backwards, a clip is one of the opposite motions: a bag of frames cannot tell."""
    source = ScenesSource("clip")
    for i in range(40):
        scene = source.scene(i)
        back = dataclasses.replace(
            scene,
            things=tuple(dataclasses.replace(t, motion=OPPOSITE[t.motion]) for t in scene.things),
        )
        forth, back = (render(s, 64, Dice(0, 0, i, 0)) for s in (scene, back))
        np.testing.assert_array_equal(forth, back[::-1])
        assert (forth[0] != forth[-1]).any()


def test_one_frame_hardly_distinguishes_left_from_right():
    """The best cut through the position in the first frame, and in the middle of the clip."""
    source = ScenesSource("clip", count=4000)
    at = {"left": [], "right": []}
    for i in range(2000):
        for t in source.scene(i).things:
            if t.motion in at:
                at[t.motion].append((t.at(-0.5)[0], t.at(0.0)[0]))
    left, right = (np.array(at[m]) for m in ("left", "right"))

    def best(column):
        cuts = np.linspace(0, 1, 101)[:, None]
        gain = (left[:, column] > cuts).mean(1) + (right[:, column] <= cuts).mean(1)
        return gain.max() / 2

    assert best(0) < 0.75
    assert best(1) < 0.55


def test_examples_do_not_depend_on_the_order_or_the_length():
    source, longer = ScenesSource("clip", count=10), ScenesSource("clip", count=50)
    forth = [example_digest(source[i]) for i in range(10)]
    back = [example_digest(longer[np.int64(i)]) for i in reversed(range(10))]
    assert forth == back[::-1]
    assert len(set(forth)) == 10


@pytest.mark.parametrize("media", ["image", "clip", "text"])
def test_a_source_survives_pickling(media):
    source = ScenesSource(media, "val", 80, 30, 5)
    copy = pickle.loads(pickle.dumps(source))
    assert example_digest(copy[7]) == example_digest(source[7])
    assert copy.fingerprint() == source.fingerprint()
    assert (copy.kind, len(copy)) == (media, 30)


def test_a_source_of_one_form_has_no_other():
    for form in DOCUMENTS:
        source = ScenesSource("text", "test", count=20, form=form)
        lengths = {len(source[i].pieces) for i in range(20)}
        assert lengths == {3 if form == "plain" else 4}
        assert [source[i].pieces for i in range(20)] != [
            ScenesSource("text", "test", count=20)[i].pieces for i in range(20)
        ]
    with pytest.raises(
        ConfigError, match="scenes: form='sibling': unknown; did you mean 'siblings'"
    ):
        ScenesSource("text", form="sibling")


def test_the_fingerprint_distinguishes_sources():
    base = ScenesSource("image", count=20)
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"media": "clip"},
            {"split": "val"},
            {"size": 80},
            {"count": 19},
            {"seed": 1},
        )
    ]
    assert len({s.fingerprint() for s in (base, *others)}) == 6


GOLDEN = {
    ("clip", "test"): "804cb503aa84eba3",
    ("image", "train"): "21dc495f39de677e",
    ("image", "unseen"): "dc13770fce43699b",
    ("text", "train"): "0d3548cde9fed89c",
}


@pytest.mark.parametrize(("media", "split"), sorted(GOLDEN))
def test_the_data_must_stay_the_same(media, split):
    """A changed digest is a new data set: scores before and after do not compare."""
    source = ScenesSource(media, split)
    assert example_digest(source[3])[:16] == GOLDEN[media, split]


def attributes(scene: Scene) -> tuple:
    return tuple(sorted((*t.pair, t.size, t.cell, t.motion) for t in scene.things))


@pytest.mark.parametrize("media", VISUAL)
def test_no_combination_of_attributes_is_in_two_splits(media):
    def seen(what, split, count):
        source = ScenesSource(what, split, count=count)
        scenes = (source.scene(i) for i in range(count))
        return {attributes(s) for s in scenes if s.kind == media}

    train = seen(media, "train", 1500) | seen("text", "train", 1500)
    val, test, unseen = (seen(media, split, 300) for split in SPLITS[1:])
    assert len(train) > 1500
    for a, b in itertools.combinations((train, val, test), 2):
        assert not a & b
    assert not unseen & (train | val)


@pytest.mark.parametrize("media", VISUAL)
def test_held_out_pairs_appear_in_images_and_questions_of_unseen_only(media):
    held = set(HELD_OUT)
    for split in ("train", "val", "test"):
        source, shown = ScenesSource(media, split), set()
        for i in range(200):
            shown |= {t.pair for t in source.scene(i).things}
            asked = [g for q, _, _ in source.qa(i) for w, g in parse(q)[0] if w == "thing"]
            assert not held & {(color, shape) for _, color, shape in asked}
        assert not held & shown
        assert {c for c, _ in shown} == set(COLORS)
        assert {s for _, s in shown} == set(SHAPES)
    unseen = ScenesSource(media, "unseen")
    firsts = [held & {t.pair for t in unseen.scene(i).things} for i in range(100)]
    assert all(firsts)
    assert set().union(*firsts) == held


def test_held_out_pairs_are_in_the_documents():
    source = ScenesSource("text")
    assert {t.pair for i in range(300) for t in source.scene(i).things} == set(PAIRS)


def test_documents_have_the_layout_of_the_multimodal_stages():
    source, forms = ScenesSource("text"), collections.Counter()
    for i in range(400):
        example = source[i]
        assert example.media is None
        assert all(piece == piece.rstrip() and piece for piece in example.pieces)
        before, *context, after, target = example.pieces
        assert target.startswith(" ")
        if before == QUESTION.before:
            forms["question"] += 1
            asked = re.fullmatch(r"\. Question: (.*\?) Answer:", after)[1]
            assert after == QUESTION.after(asked)
        else:
            assert (before, after) == (CAPTION.before, CAPTION.after)
            forms["context" if context else "plain"] += 1
            check_true(source.scene(i), target)
        assert len(context) <= 1
    assert min(forms.values()) > 50
    assert set(DOCUMENTS) == {"siblings", "keywords", "question", "plain"}


@pytest.mark.parametrize("media", VISUAL)
def test_the_context_of_a_question_determines_its_answer(media):
    for i in range(100):
        scene = draw(Dice(3, 0, i, 0), media, "train")
        claims, rest = parse(whole(scene, Dice(3, 0, i, 1)))
        assert rest <= GLUE
        check_true(scene, whole(scene, Dice(3, 0, i, 1)))
        detail = "place" if media == "image" else "motion"
        assert [w for w, _ in claims] == ["thing", detail] * len(scene.things)
        assert {(SIZE.get(g[0], ""), COLOR[g[1]], SHAPE[g[2]]) for w, g in claims[::2]} == {
            (t.size, *t.pair) for t in scene.things
        }


@pytest.mark.parametrize("media", VISUAL)
def test_whole_captions_describe_every_thing_of_the_same_pixels(media):
    source, short = ScenesSource(media, form="whole"), ScenesSource(media)
    for i in range(20):
        np.testing.assert_array_equal(source[i].media, short[i].media)
        scene = source.scene(i)
        assert len(source[i].captions) == CAPTIONS
        for caption in source[i].captions:
            check_true(scene, caption)
            claims, _ = parse(caption)
            assert len(claims) == 2 * len(scene.things)
    assert set(source[0].captions) <= set(ScenesSource(media, form="whole", count=1).texts())
    assert source.fingerprint() != short.fingerprint()


@pytest.mark.parametrize(("media", "form"), [("text", "whole"), ("image", "plain"), ("clip", "x")])
def test_a_form_of_another_medium_is_refused(media, form):
    with pytest.raises(ConfigError, match=f"form='{form}'"):
        ScenesSource(media, form=form)


def test_a_sibling_context_is_another_caption_of_the_same_scene():
    for i in range(60):
        scene = draw(Dice(4, 0, i, 0), "image", "train")
        _, context, _, target = document(scene, Dice(4, 0, i, 1), "siblings")
        siblings = context.strip().split(". ")
        assert 1 <= len(siblings) <= 3
        assert target.strip() not in siblings
        for sibling in siblings:
            check_true(scene, sibling)


def test_keywords_name_every_object():
    for i in range(60):
        scene = draw(Dice(5, 0, i, 0), "clip", "train")
        words = keywords(scene, Dice(5, 0, i, 1))
        for t in scene.things:
            assert any(word in words for word in SHAPE_WORDS[t.shape])
            assert any(word in words for word in COLOR_WORDS[t.color])


def test_the_vocabulary_is_small_but_varied():
    words, said = set(), set()
    for media in VISUAL:
        source = ScenesSource(media, count=300)
        words |= set(re.findall(r"[a-z]+", " ".join(source.texts()).lower()))
        said |= {c for i in range(300) for c in captions(source.scene(i), Dice(0, 0, i, 9))}
    assert 120 < len(words) < 180
    assert len(said) > 0.9 * 3000


def test_texts_are_those_of_the_examples():
    source = ScenesSource("clip", count=3)
    told = list(source.texts())
    for i in range(3):
        example = source[i]
        assert set(example.captions) <= set(told)
        assert {QUESTION.after(q) for q, *_ in example.qa} <= set(told)
    pieces = [p for i in range(3) for p in ScenesSource("text", count=3)[i].pieces]
    assert list(ScenesSource("text", count=3).texts()) == pieces


def test_phases_are_symmetric_and_images_stand_still():
    assert phases("image") == (0.0,)
    assert [-p for p in phases("clip")] == list(reversed(phases("clip")))
    assert phases("clip")[-1] == 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"media": "video"}, "media='video': unknown; known: clip, image, text"),
        ({"split": "dev"}, "split='dev'"),
        ({"size": 32}, "size=32; give an integer in 64..256"),
        ({"count": 0}, "count=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_explained(arguments, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        ScenesSource(**arguments)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_out_of_range_is_an_error(index):
    with pytest.raises(IndexError, match=r"0\.\.4"):
        ScenesSource(count=5)[index]
