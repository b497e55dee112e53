"""Which facts of a caption of a scene are right: the caption is read, no texts are compared.

A caption mentions things, each with facts: words for color, shape, size, place and motion. Beside
them it may say how two things are placed to each other, how many there are, and what the background
is like. Every word of `captions` is known in any order, so that what a model writes is read, too;
words without a meaning are skipped.

The mentions are matched with the things of the scene, each with another one, so that all words for
color, shape and place are right, if that is possible, and as many facts as possible. A fact is
right if the thing has it. All facts of a mention that is left over are wrong, since the scene lacks
it. A caption is right if it has words for color, shape or place, and all of them are right.

How words are bound:

  place, motion   to the mention before them; where it has one, or there is none, to that after them
  relation        to the mentions before and after it
  "two circles"   two mentions: the next ones that do not contradict ("one red and one blue"), or
                  mentions of their own; right if there are as many circles
  "one shape", "two shapes", "a single …"   right if the scene has as many things

Places and relations are facts of images, motion is one of clips: elsewhere they are wrong.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vadapter.data.example import Judgment
from vadapter.data.scenes.captions import (
    COLOR_WORDS,
    GROUND_WORDS,
    MOTION_WORDS,
    PLACE_WORDS,
    PLACES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    plural,
    relations,
)
from vadapter.data.scenes.world import Scene, Thing

KINDS = ("color", "shape", "size", "place", "motion", "relation", "count", "background")
VISIBLE = ("color", "shape", "place")  # what is right in a caption that is right
MATCHED = 12  # mentions, from the first, that may be matched; a scene has three things at most

# What no scene has, but other language models may write.
OTHER_COLORS = ("black", "gray", "pink", "brown", "cyan", "magenta", "teal", "gold")
OTHER_SHAPES = ("rectangle", "oval", "diamond", "heart", "hexagon", "pentagon", "arrow", "line")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# A noun phrase ends before these and at punctuation; other unknown words may be within it.
_ENDS = ("a", "an", "the", "and", "or", "with", "while", "as", "that", "there", "also")


class Word(NamedTuple):
    """One word, or several, with a meaning.

    Beside those of facts there are the kinds `number`, `single`, `noun` (a word such as
    "shape"), `is` (adjectives may follow) and `end` (of a noun phrase).
    """

    kind: str
    value: str


Fact = tuple[str, str]  # kind and value


@dataclasses.dataclass(eq=False)
class Mention:
    """One thing that a caption mentions, or a group of `number` of them."""

    facts: list[Fact] = dataclasses.field(default_factory=list)
    number: int = 1

    def has(self, kind: str) -> bool:
        """Return whether a fact of a kind is mentioned."""
        return any(kind == own for own, _ in self.facts)

    def agrees(self, facts: Sequence[Fact]) -> bool:
        """Return whether no fact contradicts other facts."""
        return all(fact in self.facts or not self.has(fact[0]) for fact in facts)


class Relation(NamedTuple):
    """The place of one thing relative to another; None: the caption does not say which."""

    side: str  # a key of RELATION_WORDS
    of: Mention | None
    to: Mention | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a caption says.

    Attributes:
      mentions: the things, in the order of the words, groups resolved into single things.
      relations: between them.
      counts: (facts, number): how many things have all of these facts.
      background: keys of GROUND_WORDS, or other words.
    """

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...]
    counts: tuple[tuple[tuple[Fact, ...], int], ...]
    background: tuple[str, ...]


def judge(scene: Scene, caption: str) -> Judgment:
    """Return which facts of a caption are right, see above; any string is a caption."""
    read = reading(caption)
    mentioned, right = Counter[str](), Counter[str]()
    for mention in read.mentions:
        mentioned.update(kind for kind, _ in mention.facts)
    right.update(_best(scene, read))
    for facts, number in read.counts:
        mentioned["count"] += 1
        having = sum(all(_is(scene, thing, fact) for fact in facts) for thing in scene.things)
        right["count"] += having == number
    mentioned["relation"] = len(read.relations)
    mentioned["background"] = len(read.background)
    right["background"] = sum(x in (scene.tone, scene.texture) for x in read.background)
    facts = {kind: (right[kind], mentioned[kind]) for kind in KINDS if mentioned[kind]}
    visible = [facts[kind] for kind in VISIBLE if kind in facts]
    return Judgment(facts, right=bool(visible) and all(n == of for n, of in visible))


# -- matching ------------------------------------------------------------------------------------


def _is(scene: Scene, thing: Thing, fact: Fact) -> bool:
    """Return whether a thing has a fact."""
    kind, value = fact
    if kind == "place":
        return scene.kind == "image" and PLACES[thing.cell] == value
    if kind == "motion":
        return scene.kind == "clip" and thing.motion == value
    return getattr(thing, kind) == value


def _best(scene: Scene, read: Reading) -> Counter[str]:
    """Return how many facts of each kind the best matching makes right."""
    matched = read.mentions[:MATCHED]
    wanted = sum(kind in VISIBLE for mention in read.mentions for kind, _ in mention.facts)
    right = {
        (i, j): Counter(fact[0] for fact in mention.facts if _is(scene, thing, fact))
        for i, mention in enumerate(matched)
        for j, thing in enumerate(scene.things)
    }

    def of(matching: dict[int, int]) -> Counter[str]:
        """Return the right facts of a matching from things to mentions."""
        found = sum((right[i, j] for j, i in matching.items()), Counter[str]())
        things = {id(matched[i]): scene.things[j] for j, i in matching.items()}
        for side, a, b in read.relations:
            one, other = things.get(id(a)), things.get(id(b))
            found["relation"] += bool(one and other and side in relations(one, other))
        return found

    def key(found: Counter[str]) -> tuple[bool, int]:
        return sum(found[kind] for kind in VISIBLE) == wanted, found.total()

    return max(map(of, _matchings(len(scene.things), len(matched))), key=key)


def _matchings(things: int, mentions: int) -> Iterator[dict[int, int]]:
    """Yield every way to give things to different mentions: {thing: mention}, not all of them."""
    if not things:
        yield {}
        return
    for rest in _matchings(things - 1, mentions):
        yield rest
        used = rest.values()
        yield from (rest | {things - 1: i} for i in range(mentions) if i not in used)


# -- reading -------------------------------------------------------------------------------------


def _lexicon() -> dict[str, list[tuple[tuple[str, ...], Word]]]:
    """Return the phrases by their first word, the longest first."""
    shapes = SHAPE_WORDS | {shape: (shape,) for shape in OTHER_SHAPES}
    tables = {
        "color": COLOR_WORDS | {color: (color,) for color in OTHER_COLORS},
        "shape": {s: (*words, *map(plural, words)) for s, words in shapes.items()},
        "size": SIZE_WORDS,
        "place": {p: (*words, p) for p, words in PLACE_WORDS.items()} | {"center": ("middle",)},
        "relation": RELATION_WORDS,
        "motion": {m: tuple(itertools.chain(*ways)) for m, ways in MOTION_WORDS.items()},
        "number": {str(n): (word, str(n)) for n, word in enumerate(NUMBERS, 1)},
        "noun": {"shape": ("shape", "shapes", "thing", "things", "object", "objects")},
        "single": {"single": ("single",)},
        "is": {"is": ("is", "are")},
        "end": {word: (word,) for word in _ENDS},
    }
    tables["place"]["center"] += PLACE_WORDS["center"] + ("center",)
    found: dict[str, list[tuple[tuple[str, ...], Word]]] = {}
    for kind, table in tables.items():
        for value, phrases in table.items():
            for phrase in filter(None, phrases):
                words = tuple(phrase.split())
                found.setdefault(words[0], []).append((words, Word(kind, value)))
    for entries in found.values():
        entries.sort(key=lambda entry: -len(entry[0]))
    return found


_LEXICON = _lexicon()
_COLORS = {word for entries in _LEXICON.values() for (word, *_), w in entries if w.kind == "color"}
_GROUNDS = {word: key for key, words in GROUND_WORDS.items() for word in words}


def reading(caption: str) -> Reading:
    """Return what a caption says; any string can be read."""
    reader = _Reader()
    for word in _words(re.findall(r"[^\W_]+|[^\w\s]", caption.lower())):
        reader.take(word)
    return reader.finish()


def _words(tokens: Sequence[str]) -> Iterator[Word]:
    """Yield the words and phrases that have a meaning."""
    at = 0
    while at < len(tokens):
        if end := _ground_end(tokens, at):
            for token in tokens[at : end - 1]:
                yield Word("background", _GROUNDS.get(token, token))
            at = end
            continue
        for phrase, word in _LEXICON.get(tokens[at], ()):
            if tuple(tokens[at : at + len(phrase)]) == phrase:
                yield word
                at += len(phrase)
                break
        else:
            if not tokens[at][0].isalnum():
                yield Word("end", tokens[at])
            at += 1


def _ground_end(tokens: Sequence[str], at: int) -> int:
    """Return the end of what describes the background, such as "dim grainy background"; 0: none."""
    end = at
    while end < len(tokens) and (tokens[end] in _GROUNDS or tokens[end] in _COLORS):
        end += 1
    return end + 1 if at < end < len(tokens) and tokens[end] == "background" else 0


class _Reader:
    """Binds words to mentions, one word after the other."""

    def __init__(self) -> None:
        self._mentions: list[Mention] = []
        self._open = False  # whether the last mention takes further adjectives and a noun
        self._number = 0  # of the mention that follows; 0: none was given
        self._waiting: list[Fact] = []  # for the mention that follows
        self._relation: tuple[str, Mention | None] | None = None  # to the mention that follows
        self._relations: list[Relation] = []
        self._counts: list[tuple[tuple[Fact, ...], int]] = []
        self._background: list[str] = []

    def take(self, word: Word) -> None:
        """Read the next word."""
        match word.kind:
            case "color" | "shape" | "size":
                self._describe(word)
            case "noun":
                self._name()
            case "number":
                self._count(int(word.value))
            case "is":
                self._open = bool(self._mentions) and not self._number
            case "single":
                self._counts.append(((), 1))
            case "place" | "motion":
                self._bind(word)
            case "relation":
                self._relate(word.value)
            case "background":
                self._open = False
                self._background.append(word.value)
            case _:
                self._open = False

    def _describe(self, word: Word) -> None:
        if not self._open or self._mentions[-1].has(word.kind):
            self._mention()
        self._mentions[-1].facts.append(word)
        self._open = word.kind != "shape"

    def _mention(self) -> None:
        """Begin a mention."""
        new = Mention([*self._waiting], max(self._number, 1))
        if self._relation:
            self._relations.append(Relation(*self._relation, new))
        self._waiting, self._number, self._relation, self._open = [], 0, None, True
        self._mentions.append(new)

    def _name(self) -> None:
        """Read a word for any shape."""
        if not self._open and self._number:
            self._counts.append(((), self._number))
            self._number = 0
        elif not self._open:
            self._mention()
        self._open = False

    def _count(self, number: int) -> None:
        if number == 1 and self._open:  # "the red one"
            self._open = False
            return
        self._open, self._number = False, number

    def _bind(self, word: Word) -> None:
        self._open = False
        if self._mentions and not self._mentions[-1].has(word.kind):
            self._mentions[-1].facts.append(word)
        else:
            self._waiting.append(word)

    def _relate(self, side: str) -> None:
        self._open = False
        self._end_relation()
        self._relation = side, self._mentions[-1] if self._mentions else None

    def _end_relation(self) -> None:
        if self._relation:
            self._relations.append(Relation(*self._relation, None))

    def finish(self) -> Reading:
        """Return what was read."""
        self._end_relation()
        if self._waiting and not self._mentions:
            self._mentions.append(Mention())
        if self._waiting:  # nothing follows: a second place of the last mention
            self._mentions[-1].facts += self._waiting
        single = self._resolve_groups()
        mentions = tuple(mention for mention in single if mention.facts)
        return Reading(
            mentions, tuple(self._relations), tuple(self._counts), tuple(self._background)
        )

    def _resolve_groups(self) -> list[Mention]:
        """Return the mentions with single ones in place of groups."""
        found: list[Mention] = []
        for at, mention in enumerate(self._mentions):
            if mention.number == 1:
                found.append(mention)
                continue
            shared = tuple(mention.facts)
            self._counts.append((shared, mention.number))
            members = itertools.takewhile(lambda m: m.number == 1, self._mentions[at + 1 :])
            members = [m for m in members if m.agrees(shared)][: mention.number]
            for member in members:
                member.facts += [fact for fact in shared if fact not in member.facts]
            found += [Mention([*shared]) for _ in range(mention.number - len(members))]
        return found
