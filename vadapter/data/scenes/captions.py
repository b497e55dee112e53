"""Captions, complete descriptions and keywords of a scene.

A caption is a template whose slots are filled from the scene, with words drawn among synonyms, so
that every caption is true. The slots alone determine which templates fit a scene.
"""

import itertools

from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.world import COLORS, Scene, Thing

CAPTIONS = 5

COLOR_WORDS = {c: (c,) for c in COLORS} | {"purple": ("purple", "purple", "violet")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge"), "": ("",)}
PLACE_WORDS = {  # by cell, in reading order
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "near the top edge"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "on the left side"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom edge"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
PLACES = tuple(PLACE_WORDS)
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upward", "toward the top"),
    "down": ("down", "downward", "toward the bottom"),
}
_VERBS = (("moves", "moving"), ("slides", "sliding"), ("drifts", "drifting"), ("goes", "going"))
MOTION_WORDS = {  # (it ..., it is ...)
    motion: tuple((f"{v} {way}", f"{g} {way}") for v, g in _VERBS for way in ways)
    for motion, ways in _WAYS.items()
} | {
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller")),
    "still": (("stays still", "staying still"), ("does not move", "not moving")),
}
GROUND_WORDS = {
    "dark": ("dark", "dim"),
    "light": ("light", "bright", "pale"),
    "plain": ("plain", "flat"),
    "shaded": ("shaded", "gradient"),
    "grainy": ("grainy", "noisy"),
}

# {a}, {b}, {c} are noun phrases for the things in an order drawn for each caption; {a_full} always
# has the size. {shapes} and {tint} exist if all things share the shape or the color.
TEMPLATES: dict[tuple[str, int], tuple[str, ...]] = {
    ("image", 1): (
        "{a} {a_place}",
        "{a} {a_place} {ground}",
        "there is {a} {a_place}",
        "{a} {ground}",
        "the picture shows {a} {a_place}",
        "an image of {a} {ground}",
        "{a_place} there is {a}",
        "{a} sits {a_place} of the picture",
        "a single {a_color} {a_shape} can be seen {a_place}",
        "only one shape, {a}, {a_place}",
    ),
    ("image", 2): (
        "{a} {a_to_b} {b}",
        "{a} is {a_to_b} {b}",
        "{a} and {b} {ground}",
        "there is {a} {a_to_b} {b}",
        "{a} {a_place} and {b} {b_place}",
        "two shapes: {a} {a_place}, {b} {b_place}",
        "the picture shows {a} and {b}",
        "{a} sits {a_place}, with {b} {b_place}",
        "{a} can be seen {a_to_b} {b} {ground}",
        "two {shapes}, one {a_color} and one {b_color}",
        "two {tint} shapes, a {a_shape} and a {b_shape}",
    ),
    ("image", 3): (
        "{a}, {b} and {c}",
        "{a} {a_place}, {b} {b_place} and {c} {c_place}",
        "three shapes: {a}, {b} and {c}",
        "{a} {a_to_b} {b}, and {c} {c_place}",
        "there is {a} {a_to_b} {b} and also {c}",
        "the picture shows {a}, {b} and {c} {ground}",
        "{a} sits {a_place} while {b} is {b_to_c} {c}",
        "{a} together with {b} and {c} {ground}",
        "three {shapes}, {a_color}, {b_color} and {c_color}",
        "three {tint} shapes, a {a_shape}, a {b_shape} and a {c_shape}",
    ),
    ("clip", 1): (
        "{a} {a_moves}",
        "{a} is {a_moving}",
        "{a} {a_moving} {ground}",
        "a video of {a} {a_moving}",
        "the clip shows {a} that {a_moves}",
        "there is {a} {a_moving} {ground}",
        "only one shape, {a}, {a_moves}",
        "we see {a} that is {a_moving}",
    ),
    ("clip", 2): (
        "{a} {a_moves} and {b} {b_moves}",
        "{a} {a_moves} while {b} {b_moves}",
        "{a} is {a_moving} as {b} {b_moves}",
        "a video of {a} {a_moving} and {b} {b_moving}",
        "two shapes: {a} {a_moves}, {b} {b_moves}",
        "{a} {a_moving} and {b} {b_moving} {ground}",
        "the clip shows {a} that {a_moves}, with {b} {b_moving}",
        "two {shapes}, the {a_color} one {a_moves} and the {b_color} one {b_moves}",
        "two {tint} shapes, the {a_shape} {a_moves} and the {b_shape} {b_moves}",
    ),
    ("clip", 3): (
        "{a} {a_moves}, {b} {b_moves} and {c} {c_moves}",
        "{a} {a_moves} while {b} {b_moves} and {c} {c_moves}",
        "a video of {a} {a_moving}, {b} {b_moving} and {c} {c_moving}",
        "three shapes: {a} {a_moves}, {b} {b_moves}, {c} {c_moves}",
        "{a} is {a_moving}, {b} is {b_moving} and {c} is {c_moving} {ground}",
        "the clip shows {a} that {a_moves}, with {b} {b_moving} and {c} {c_moving}",
        "three {shapes}, the {a_color} one {a_moves}, the {b_color} one {b_moves} "
        "and the {c_color} one {c_moves}",
    ),
}
# Each of these suffices to answer every question about a scene.
_WHOLE = {
    ("image", 1): ("{a_full} {a_place}", "there is {a_full} {a_place}"),
    ("image", 2): (
        "{a_full} {a_place} and {b_full} {b_place}",
        "{a_full} {a_place}, {b_full} {b_place}",
    ),
    ("image", 3): ("{a_full} {a_place}, {b_full} {b_place} and {c_full} {c_place}",),
    ("clip", 1): ("{a_full} {a_moves}", "{a_full} is {a_moving}"),
    ("clip", 2): (
        "{a_full} {a_moves} and {b_full} {b_moves}",
        "{a_full} {a_moving}, {b_full} {b_moving}",
    ),
    ("clip", 3): ("{a_full} {a_moves}, {b_full} {b_moves} and {c_full} {c_moves}",),
}


def captions(scene: Scene, dice: Dice) -> tuple[str, ...]:
    """Return CAPTIONS different captions, in lower case, without a full stop."""
    templates = TEMPLATES[scene.kind, len(scene.things)]
    if len({thing.shape for thing in scene.things}) > 1:
        templates = [t for t in templates if "{shapes}" not in t]
    if len({thing.color for thing in scene.things}) > 1:
        templates = [t for t in templates if "{tint}" not in t]
    endless = itertools.cycle(dice.shuffled(templates))
    distinct: dict[str, None] = {}
    while len(distinct) < CAPTIONS:
        distinct[next(endless).format_map(_Slots(scene, dice))] = None
    return tuple(distinct)


def whole(scene: Scene, dice: Dice) -> str:
    """Return a description with color, shape, size, and place or motion of all things."""
    template = dice.pick(_WHOLE[scene.kind, len(scene.things)])
    return template.format_map(_Slots(scene, dice))


def keywords(scene: Scene, dice: Dice) -> str:
    """Return content words in random order, half of the time grouped by thing."""
    groups = []
    for thing in scene.things:
        words = [dice.pick(SHAPE_WORDS[thing.shape]), dice.pick(COLOR_WORDS[thing.color])]
        if thing.size and dice.chance(0.7):
            words.append(dice.pick(SIZE_WORDS[thing.size]))
        if scene.kind == "clip":
            words.append(dice.pick(MOTION_WORDS[thing.motion])[1])
        elif dice.chance(0.7):
            words.append(PLACES[thing.cell])
        groups.append(dice.shuffled(words))
    groups = dice.shuffled(groups)
    if dice.chance(0.5):
        groups = [dice.shuffled([word for group in groups for word in group])]
    return " ".join(word for group in groups for word in group)


def article(noun_phrase: str) -> str:
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def relations(a: Thing, b: Thing) -> list[str]:
    """Return the position of a relative to b: one or two keys of RELATION_WORDS."""
    horizontal = ["left" if a.column < b.column else "right"] if a.column != b.column else []
    vertical = ["above" if a.row < b.row else "below"] if a.row != b.row else []
    return horizontal + vertical


class _Slots(dict):
    """The slots of a template, filled on access, so that every mention draws its own words."""

    def __init__(self, scene: Scene, dice: Dice):
        super().__init__()
        self._scene, self._dice = scene, dice
        self._things = dict(zip("abc", dice.shuffled(scene.things), strict=False))

    def __missing__(self, slot: str) -> str:
        pick, things = self._dice.pick, self._things
        if slot == "ground":
            word = pick(GROUND_WORDS[pick((self._scene.tone, self._scene.texture))])
            return f"on {article(word)} background"
        if slot == "shapes":
            return plural(pick(SHAPE_WORDS[things["a"].shape]))
        if slot == "tint":
            return pick(COLOR_WORDS[things["a"].color])
        letter, _, what = slot.partition("_")
        thing = things[letter]
        if what.startswith("to_"):
            return pick(RELATION_WORDS[pick(relations(thing, things[what[3:]]))])
        match what:
            case "color":
                return pick(COLOR_WORDS[thing.color])
            case "shape":
                return pick(SHAPE_WORDS[thing.shape])
            case "place":
                return pick(PLACE_WORDS[PLACES[thing.cell]])
            case "moves" | "moving":
                return pick(MOTION_WORDS[thing.motion])[what == "moving"]
        size = pick(SIZE_WORDS[thing.size]) if what == "full" or self._dice.chance(0.5) else ""
        words = (size, pick(COLOR_WORDS[thing.color]), pick(SHAPE_WORDS[thing.shape]))
        return article(" ".join(word for word in words if word))
