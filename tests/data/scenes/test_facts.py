"""Captions are read and judged against their scene: the true ones are right, false ones are not."""

import collections
import pickle
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from vadapter.data.example import Judgment
from vadapter.data.open import JUDGES, SOURCES
from vadapter.data.scenes.captions import (
    COLOR_WORDS,
    GROUND_WORDS,
    MOTION_WORDS,
    PLACE_WORDS,
    PLACES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEMPLATES,
    captions,
    plural,
    whole,
)
from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.facts import KINDS, VISIBLE, judge, reading
from vadapter.data.scenes.source import ScenesSource
from vadapter.data.scenes.world import SPLITS, Scene, Thing

VISUAL = ("image", "clip")
NUMBERS = {"one": 1, "two": 2, "three": 3}


def drawn(count: int, seed: int = 0) -> Iterator[tuple[Scene, Dice]]:
    """Scenes of every medium and split in turn, each with dice of its own."""
    kinds = [ScenesSource(media, split, seed=seed) for media in VISUAL for split in SPLITS]
    for i in range(count):
        yield kinds[i % len(kinds)].scene(i), Dice(seed, i, 0, 0)


def share(judgment: Judgment) -> float:
    """The share of all facts that are right."""
    right, mentioned = (sum(numbers) for numbers in zip(*judgment.facts.values(), strict=True))
    return right / mentioned


def image(*things: tuple[str, str, str, str], tone: str = "dark", texture: str = "plain") -> Scene:
    """A scene of things (size, color, shape, place)."""
    made = (Thing(c, s, size, PLACES.index(place)) for size, c, s, place in things)
    return Scene("image", tuple(made), tone, texture, (), 0.0)


def clip(*things: tuple[str, str, str, str]) -> Scene:
    """A scene of things (size, color, shape, motion)."""
    made = (Thing(c, s, size, motion=motion) for size, c, s, motion in things)
    return Scene("clip", tuple(made), "dark", "plain", (), 0.0)


TWO = image(("small", "red", "star", "top left"), ("large", "blue", "ring", "right"))
SAME = image(("small", "red", "circle", "top"), ("large", "blue", "circle", "left"))
MOVING = clip(("small", "red", "star", "left"), ("", "blue", "ring", "grow"))


# -- what is true is right -----------------------------------------------------------------------


def test_every_template_of_every_medium_and_split_is_judged_right():
    for media in VISUAL:
        seen: set[str] = set()
        for split in SPLITS:
            source = ScenesSource(media, split, count=60)
            for index in range(len(source)):
                example, count = source.text_only(index), len(source.scene(index).things)
                assert example.judge is not None
                for caption in example.captions:
                    judgment = example.judge(caption)
                    assert judgment.right
                    assert share(judgment) == 1, caption
                    seen |= {t for t in TEMPLATES[media, count] if fits(t, caption)}
        assert seen == {t for (of, _), each in TEMPLATES.items() if of == media for t in each}


def fits(template: str, caption: str) -> bool:
    """Whether a caption may be a filled template."""
    return bool(re.fullmatch(re.sub(r"\{\w+\}", ".+", template), caption))


def phrases(table: dict[str, Any]) -> list[str]:
    entries = [entry for entries in table.values() for entry in entries]
    return [p for entry in entries for p in ([entry] if isinstance(entry, str) else entry)]


def test_a_complete_description_mentions_every_fact_of_every_thing():
    for scene, dice in drawn(160):
        facts = judge(scene, whole(scene, dice)).facts
        count, sized = len(scene.things), sum(bool(thing.size) for thing in scene.things)
        where = "place" if scene.kind == "image" else "motion"
        expected = {"color": count, "shape": count, "size": sized, where: count}
        assert facts == {kind: (n, n) for kind, n in expected.items() if n}


# -- what is false is not ------------------------------------------------------------------------


def false_words(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """By kind of fact, (phrase, phrase) pairs: the second in place of the first makes it false."""
    things = scene.things
    colors, shapes = {t.color for t in things}, {t.shape for t in things}
    cells, motions = {t.cell for t in things}, {t.motion for t in things}
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    size = {"small": "large", "large": "small"}
    tone, texture = ("dark", "light"), ("plain", "shaded", "grainy")

    def swaps(table, differs):
        return [
            (a, b)
            for x in table for y in table if differs(x, y)
            for a in phrases({x: table[x]}) for b in phrases({y: table[y]})
        ]  # fmt: skip

    forms = {s: (*words, *map(plural, words)) for s, words in SHAPE_WORDS.items()}
    return {
        "color": swaps(COLOR_WORDS, lambda x, y: x in colors and y not in colors),
        "shape": [
            (a, b)
            for a, b in swaps(forms, lambda x, y: x in shapes and y not in shapes)
            if a.endswith("s") == b.endswith("s") or {"cross"} & {a, b}
        ],
        "size": swaps(SIZE_WORDS, lambda x, y: size.get(x) == y),
        "place": swaps(
            PLACE_WORDS, lambda x, y: PLACES.index(x) in cells and PLACES.index(y) not in cells
        ),
        "relation": swaps(RELATION_WORDS, lambda x, y: opposite[x] == y),
        "motion": swaps(MOTION_WORDS, lambda x, y: x in motions and y not in motions),
        "count": [(f"{a} shapes", f"{b} shapes") for a in NUMBERS for b in NUMBERS if a != b],
        "background": [
            (f"{a} background", f"{b} background")
            for a, b in swaps(
                GROUND_WORDS, lambda x, y: x != y and any({x, y} <= {*of} for of in (tone, texture))
            )
        ],
    }


def changed(scene: Scene, dice: Dice) -> Iterator[tuple[str, str]]:
    """(kind of fact, caption with one false word), for every word of the captions of a scene."""
    texts = captions(scene, dice)
    for kind, pairs in false_words(scene).items():
        known = {old for old, _ in pairs} | set(
            phrases(PLACE_WORDS) if kind in ("place", "relation") else ()
        )
        by_old: dict[str, list[str]] = collections.defaultdict(list)
        for old, new in pairs:
            by_old[old].append(new)
        longest = sorted(map(re.escape, known), key=lambda old: -len(old))
        for caption in texts if longest else ():
            # The longest phrase: not "at the top" in "at the top left", nor "left of" in "on the
            # left of the picture".
            for found in re.finditer(rf"\b({'|'.join(longest)})\b", caption):
                if found[0] in by_old:
                    new = dice.pick(by_old[found[0]])
                    yield kind, caption[: found.start()] + new + caption[found.end() :]


def test_a_true_caption_with_one_false_word_is_never_right_in_all_facts():
    tried = collections.Counter()
    for scene, dice in drawn(240, seed=1):
        for kind, caption in changed(scene, dice):
            judgment = judge(scene, caption)
            assert share(judgment) < 1, caption
            right, mentioned = judgment.facts[kind]
            # The others may be right of another thing, whose other facts are then wrong.
            assert right < mentioned or kind in ("size", "relation"), caption
            assert not (kind in VISIBLE and judgment.right), caption
            tried[kind] += 1
    assert set(tried) == set(KINDS)
    assert min(tried.values()) > 20


def test_a_caption_of_another_scene_has_the_facts_right_that_one_thing_has_in_common_with_it():
    for media in VISUAL:
        source = ScenesSource(media, "val", count=400)
        single = [i for i in range(len(source)) if len(source.scene(i).things) == 1]
        tried = 0
        for index in range(len(source)):
            scene, other = source.scene(index), source.scene(single[index % len(single)])
            thing, judgment = other.things[0], judge(scene, whole(other, Dice(0, index, 0, 0)))
            common = [
                (t.color == thing.color, t.shape == thing.shape)
                + ((t.cell == thing.cell,) if media == "image" else ())
                for t in scene.things
            ]
            extra = [
                (t.size == thing.size != "") + (media == "clip" and t.motion == thing.motion)
                for t in scene.things
            ]
            assert judgment.right == any(map(all, common))
            found = sum(right for right, _ in judgment.facts.values())
            totals = [sum(a) + b for a, b in zip(common, extra, strict=True)]
            assert found == max(totals) or judgment.right
            tried += 0 < found < 4
        assert tried > 100


# -- how facts are bound -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "caption", "facts", "right"),
    [
        (TWO, "a red star at the top left", {"color": (1, 1), "shape": (1, 1), "place": (1, 1)}, 1),
        (TWO, "a red star on the right", {"color": (1, 1), "shape": (1, 1), "place": (0, 1)}, 0),
        (TWO, "a green star", {"color": (0, 1), "shape": (1, 1)}, 0),
        (TWO, "a tiny blue star", {"size": (1, 1), "color": (0, 1), "shape": (1, 1)}, 0),
        (TWO, "a red star and a red star", {"color": (1, 2), "shape": (1, 2)}, 0),
        (TWO, "a red star, a blue ring and a green cross", {"color": (2, 3), "shape": (2, 3)}, 0),
        (TWO, "the ring is blue, a star is red", {"color": (2, 2), "shape": (2, 2)}, 1),
        (TWO, "a star left of a ring", {"shape": (2, 2), "relation": (1, 1)}, 1),
        (TWO, "a ring left of a star", {"shape": (2, 2), "relation": (0, 1)}, 1),
        (TWO, "a star left of", {"shape": (1, 1), "relation": (0, 1)}, 1),
        (TWO, "on the right a ring, at the top left a star", {"place": (2, 2), "shape": (2, 2)}, 1),
        (TWO, "a shape on the right", {"place": (1, 1)}, 1),
        (TWO, "two shapes", {"count": (1, 1)}, 0),
        (TWO, "a single star", {"count": (0, 1), "shape": (1, 1)}, 1),
        (TWO, "two stars", {"count": (0, 1), "shape": (1, 2)}, 0),
        (TWO, "a big blue ring", {"size": (1, 1), "color": (1, 1), "shape": (1, 1)}, 1),
        (TWO, "a tiny blue ring", {"size": (0, 1), "color": (1, 1), "shape": (1, 1)}, 1),
        (TWO, "a star that moves left", {"shape": (1, 1), "motion": (0, 1)}, 1),
        (TWO, "on a dark flat background", {"background": (2, 2)}, 0),
        (TWO, "on a red background", {"background": (0, 1)}, 0),
        (TWO, "a pink heart", {"color": (0, 1), "shape": (0, 1)}, 0),
        (SAME, "two circles, one red and one blue",
         {"count": (1, 1), "color": (2, 2), "shape": (2, 2)}, 1),
        (SAME, "two circles, one red and one green",
         {"count": (1, 1), "color": (1, 2), "shape": (2, 2)}, 0),
        (SAME, "three circles", {"count": (0, 1), "shape": (2, 3)}, 0),
        (MOVING, "a ring expands while a star goes left", {"motion": (2, 2), "shape": (2, 2)}, 1),
        (MOVING, "a ring goes left while a star expands", {"motion": (0, 2), "shape": (2, 2)}, 1),
        (MOVING, "a star at the top", {"place": (0, 1), "shape": (1, 1)}, 0),
        (MOVING, "a star left of a ring", {"relation": (0, 1), "shape": (2, 2)}, 1),
        (TWO, "", {}, 0),
        (TWO, "the picture shows nothing", {}, 0),
    ],
)  # fmt: skip
def test_facts_are_bound_to_their_things(scene, caption, facts, right):
    assert judge(scene, caption) == ({k: n for k, n in facts.items() if n[1]}, bool(right))


# -- any text ------------------------------------------------------------------------------------

vocabulary = sorted(
    {
        word
        for table in (COLOR_WORDS, SHAPE_WORDS, SIZE_WORDS, PLACE_WORDS, MOTION_WORDS, GROUND_WORDS)
        for phrase in [*phrases(table), *phrases(RELATION_WORDS)]
        for word in phrase.split()
    }
    | {
        "a",
        "and",
        "one",
        "two",
        "three",
        "ten",
        "single",
        "shape",
        "shapes",
        "background",
        ",",
        "2",
    }
)


def strings(count: int) -> Iterator[str]:
    """Odd strings: known words in any order, and any characters."""
    rng = random.Random(0)
    for _ in range(count):
        yield " ".join(rng.choices(vocabulary, k=rng.randrange(60)))
        yield "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0xD7FF)))) for _ in range(40)
        )


def test_any_string_is_judged_and_no_more_is_right_than_is_mentioned():
    for caption, (scene, _) in zip(strings(300), drawn(600), strict=True):
        judgment = judge(scene, caption)
        assert set(judgment.facts) <= set(KINDS)
        assert all(0 <= right <= mentioned for right, mentioned in judgment.facts.values())
        assert not judgment.right or any(kind in judgment.facts for kind in VISIBLE)


def test_a_long_caption_is_judged_by_its_first_mentions():
    caption = "a red star and " * 1000
    assert judge(TWO, caption).facts["color"] == (1, 1000)
    assert len(reading("ten stars, " * 100).mentions) == 1000


def test_only_the_sources_that_are_listed_judge_captions():
    assert set(JUDGES) <= set(SOURCES)
    source = ScenesSource("image", "val", count=2)
    assert pickle.loads(pickle.dumps(source[1])).judge(source[1].captions[0]).right
    assert ScenesSource("text", "val", count=2)[0].judge is None
