"""Questions about a scene, with short answers that cannot be guessed from the question.

Every answer is drawn before, or symmetrically to, the words of its question: both answers to a
yes/no or either-or question are equally frequent for the same wording, and a count is drawn among
those that the scene has.
"""

from collections.abc import Callable

from vadapter.data.scenes import captions
from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.world import COLORS, HELD_OUT, MOVING, PAIRS, SHAPES, Scene, Thing

QA = tuple[str, str] | None  # (question, answer); None if the scene does not allow the kind

MOTION_ANSWERS = {way: f"moving {way}" for way in ("left", "right", "up", "down")} | {
    "grow": "growing",
    "shrink": "shrinking",
    "still": "staying still",
}
_CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def questions(scene: Scene, dice: Dice) -> tuple[tuple[str, str, str], ...]:
    """Return (question, answer, kind), one of every kind the scene allows, in random order."""
    drawn = ((draw(scene, dice), kind) for kind, draw in KINDS.items())
    return tuple(dice.shuffled([(*qa, kind) for qa, kind in drawn if qa]))


def _name(thing: Thing) -> str:
    return f"the {thing.color} {thing.shape}"


def _hints(scene: Scene, thing: Thing, dice: Dice) -> list[str]:
    """Return phrases that identify a thing after "the shape", by place or motion."""
    if scene.kind == "image":
        return [dice.pick(captions.PLACE_WORDS[captions.PLACES[thing.cell]])]
    if [t.motion for t in scene.things].count(thing.motion) > 1:
        return []
    return ["that " + dice.pick(captions.MOTION_WORDS[thing.motion])[0]]


def _color(scene: Scene, dice: Dice) -> QA:
    thing = dice.pick(scene.things)
    ways = [f"the shape {hint}" for hint in _hints(scene, thing, dice)]
    if [t.shape for t in scene.things].count(thing.shape) == 1:
        ways.append(f"the {thing.shape}")
    return (f"What color is {dice.pick(ways)}?", thing.color) if ways else None


def _shape(scene: Scene, dice: Dice) -> QA:
    thing = dice.pick(scene.things)
    ways = [f"What is the shape {hint}?" for hint in _hints(scene, thing, dice)]
    if [t.color for t in scene.things].count(thing.color) == 1:
        ways.append(f"What shape is the {thing.color} one?")
    return (dice.pick(ways), thing.shape) if ways else None


def _size(scene: Scene, dice: Dice) -> QA:
    if not (sized := [t for t in scene.things if t.size]):
        return None
    thing = dice.pick(sized)
    return f"Is {_name(thing)} small or large?", thing.size


def _count(scene: Scene, dice: Dice) -> QA:
    if dice.chance(0.3):
        return "How many shapes are there?", str(len(scene.things))
    if dice.chance(0.5):
        values, ask = [t.shape for t in scene.things], {s: captions.plural(s) for s in SHAPES}
    else:
        values, ask = [t.color for t in scene.things], {c: f"{c} shapes" for c in COLORS}
    # Rare counts are preferred when they occur.
    shown = {values.count(v) for v in ask}
    count = int(dice.weighted({str(n): (1.0, 1.0, 3.0, 5.0)[n] for n in sorted(shown)}))
    what = dice.pick([v for v in ask if values.count(v) == count])
    return f"How many {ask[what]} are there?", str(count)


def _position(scene: Scene, dice: Dice) -> QA:
    if scene.kind != "image":
        return None
    a, *others = dice.shuffled(scene.things)
    if others and dice.chance(0.5):
        side = dice.pick(captions.relations(a, others[0]))
        either = (
            "above or below" if side in ("above", "below") else "to the left or to the right of"
        )
        return f"Is {_name(a)} {either} {_name(others[0])}?", side
    return f"Where is {_name(a)}?", captions.PLACES[a.cell]


def _yes_no(scene: Scene, dice: Dice) -> QA:
    true = dice.chance(0.5)
    answer = "yes" if true else "no"
    a, *others = dice.shuffled(scene.things)
    if scene.kind == "image" and others and dice.chance(0.5):
        side = dice.pick(captions.relations(a, others[0]))
        side = side if true else _CONVERSE[side]
        return (
            f"Is {_name(a)} {dice.pick(captions.RELATION_WORDS[side])} {_name(others[0])}?",
            answer,
        )
    movers = [t for t in scene.things if t.motion != "still"]
    if movers and dice.chance(0.5):
        a = dice.pick(movers)
        motion = a.motion if true else dice.pick([m for m in MOVING if m != a.motion])
        return f"Is {_name(a)} {dice.pick(captions.MOTION_WORDS[motion])[1]}?", answer
    color, shape = a.pair if true else _absent(scene, a, dice)
    return f"Is there {captions.article(f'{color} {shape}')}?", answer


def _absent(scene: Scene, thing: Thing, dice: Dice) -> tuple[str, str]:
    """Return a pair that the scene lacks, similar to the thing's, held out if and only if it is."""
    present = {t.pair for t in scene.things}
    held_out = thing.pair in HELD_OUT
    pairs = [p for p in PAIRS if p not in present and (p in HELD_OUT) == held_out]
    near = [(c, s) for c, s in pairs if c == thing.color or s == thing.shape]
    return dice.pick(near or pairs)


def _motion(scene: Scene, dice: Dice) -> QA:
    if scene.kind != "clip":
        return None
    movers = [t for t in scene.things if t.motion != "still"]
    thing = dice.pick(movers if dice.chance(0.8) else scene.things)
    answer = MOTION_ANSWERS[thing.motion]
    if thing.motion == "still" or not dice.chance(0.5):
        return f"What is {_name(thing)} doing?", answer
    if thing.motion in ("grow", "shrink"):
        return f"Is {_name(thing)} growing or shrinking?", answer
    return f"Which way is {_name(thing)} moving?", thing.motion


KINDS: dict[str, Callable[[Scene, Dice], QA]] = {
    "colour": _color,  # spelled as in the scores of existing runs
    "shape": _shape,
    "size": _size,
    "count": _count,
    "position": _position,
    "yes/no": _yes_no,
    "motion": _motion,
}
