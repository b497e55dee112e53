"""The caption tokenizer of the official COCO metrics, without Java.

`tokenize` returns the tokens of Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase`,
without those on pycocoevalcap's list of punctuation. The rules were derived by probing that program
with short strings, among them every word of up to five letters; tests/metrics/test_ptb.py states
how often the two disagree. As in any generated scanner the rule with the longest match,
trailing context included, wins, and the first of equals.

Quirks of the official pipeline, reproduced because scores depend on them:
  * brackets come out in lower case (`-lrb-`), so the list that should drop them misses them;
  * `?!` and `!!!` stay: only single marks are on that list;
  * a word before `.,` keeps its full stop (`dog., cat` -> `dog. cat`);
  * `can't` -> `ca n't`, `cannot` -> `can not`, `gonna` -> `gon na`;
  * a final single letter (`ave S.`) keeps its full stop depending on the first word of the next
    caption in the file; here it never does, which is the more common case;
  * `£5` -> `# 5`, `€5` -> `$ 5`, `5¢` -> `5 cents`; emoji vanish;
  * `22 3/4` and `555 123 4567` are one token each, with U+00A0 in place of their spaces: one word
    for ROUGE-L, and several for CIDEr and BLEU, which split captions at white space of every kind.

Not reproduced, as captions have none: markup tags with spaces, unusual smileys and e-mail
addresses, numbers of ten digits and more, accents of rare scripts.
"""

import functools
import itertools
import re

# Abbreviations whose full stop stays, and those that keep it only before a number.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros
ca calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens
esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan
kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg
natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys pres prof profs pte ptes pty ptys
pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu
thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_NUMBERED = "art|fig|figs|no|nos|op|pp|prop"
_SPLIT_WORDS = {  # cannot -> can not
    a + b: (a, b)
    for a, b in (w.split() for w in ("can not", "gim me", "lem me", "gon na", "wan na", "got ta"))
}
# A single letter loses its full stop before these words, if they are capitalized.
_STARTERS = """
a about after an as at but earlier he her here however if in it last many more now once one other
our she since so some such that the their then there these they this we what when while yet you
"""
# What the rules see of the next chunk: one of these is appended to the chunk.
_BEFORE_NUMBER, _BEFORE_STARTER = " 0", " A"

_L = r"(?:[^\W\d_¹²³⁰-₉¼-¾⅐-↋]|[\u0300-\u036f])"  # a letter or a combining accent
_A = rf"(?:{_L}|\d)"  # a letter or a digit
_Q = "['’]"  # an apostrophe

# Group 1, where there is one, is the token; the rest of the match is context for the next one.
_RULES = [
    *(rf"({a}){b}" for a, b in _SPLIT_WORDS.values()),
    rf"{_A}+",
    rf"{_A}(?:{_A}|[.,])*(?:-{_A}+)+",  # double-decker, 5.5-inch, u.s.-made
    rf"{_A}+(?:[-_/]{_A}+)+",  # and/or, 1/2-inch
    rf"{_L}{_A}*(?:\.{_L}{_A}*)+",  # street.a, foo.jpg, t.v
    r"[+-]?(?:\d*(?:[.,:]\d+)+|\d+)",  # 1,000  10:30  -5  .5
    r"\d{1,4}\xa0\d{1,4}[/⁄]\d{1,4}",  # 22 3/4
    # 555 123 4567, (555) 123-4567, ++49 30 123-4567
    r"(?:\(\d{2,3}\)\xa0?|(?:\+\+?)?(?:\d{2,4}[-\xa0])?\d{2,4}[-\xa0])\d{3,4}[-\xa0]?\d{3,5}",
    rf"{_L}(?:\.{_L})*\.",  # u.s.  t.v.  a.
    rf"({_L})\.{_BEFORE_STARTER}",
    rf"(?:ph\.d|{'|'.join(_ABBREVIATIONS.split())})\.",
    rf"((?:{_NUMBERED})\.)(?:\d|{_BEFORE_NUMBER})",
    rf"({_A}+\.)[,;:]",
    rf"(?:https?://|www\.){_A}[^\s<>\"]*[^\s<>\".,;:!?')]",
    rf"(?:{_A}|[.-])+\.(?:com|org)/{_A}[^\s<>\".,;:!?')]*",
    rf"{_A}(?:{_A}|[.,_-])*@{_A}+(?:[.-]{_A}+)*",
    rf"{_L}+[?!]{_L}+",  # what?who is one token
    # Apostrophes.
    rf"({_L}*(?!n){_L})n{_Q}t",  # do|n't
    r"n['’`]t",
    rf"{_Q}(?:s|d|m|ll|re|ve|n|\d0s)(?!{_L})",
    rf"{_Q}(?:em|till?|cause|n{_Q})",
    rf"({_Q}t)(?:is|was)(?!{_A})",
    rf"(?:[djly]|ol){_Q}",  # y'|all
    rf"(?:{_A}+-)*[dlno]{_Q}{_L}{_L}+(?:-{_A}+)*",  # o'clock, hors-d'oeuvre
    rf"{_L}+[aeiouy]{_Q}[aeiou]{_L}*",  # ma'am, ho'ohu
    rf"(?:c{_Q}(?:est|mon)|e{_Q}er|ev{_Q}ry|li{_Q}l|nor{_Q}easter|n{_Q}t)",
    # Signs.
    r"\.\.\.+",
    r"--+",
    r"[?!]+",
    r"_+|\*+|#+|<<|>>",
    r"[#@][a-z][\w]*",
    r"[A-Z]+(?:&[A-Z]+)+",
    r"<[/a-z!][^\s<>]*>",
    r"[:;=]-?[()]|[:;=]-?[dp](?![a-z])|\^_\^",
    r"c\+\+",
    r"[!-/:-@\[-`{-~¡-¿×÷\u0600-\u0603₠-↿←-⯿‐-‧‰-⁞、。]",
]
_SCANNERS = [re.compile(rule, 0 if "A-Z" in rule else re.IGNORECASE) for rule in _RULES]

_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": " ", "&quot;": '"', "&apos;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
# Control characters are the signs of Windows-1252, or separate words without being white space.
_REPAIR = str.maketrans(
    "\x80\x85\x91\x92\x93\x94\x96\x97\x1c\x1d\x1e\x1f", "€…‘’“”–—\0\0\0\0", "\xad"
)
# A space that may be part of a number; each other one ends a chunk.
_IN_NUMBER = re.compile(r"(?<=[\d)]) (?=\d)")
# Only a number that is one common space away has an effect on the word before.
_FAR_NUMBER = re.compile(r"(?<=\.)(?:\s\s+|[\u1680\u202f\u205f])(?=\d)")
_CHUNK = re.compile(r"(?:\S|\xa0)+")
_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")
_WRITTEN = {  # how the official program spells a sign
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¤": "$", "₠": "$", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "’": "'",
}  # fmt: skip
_WRITE = str.maketrans(_WRITTEN)
_DROPPED = re.compile(r"[.,:;?!\-'\"`‘’‚‛“”«»‹›–—―…]|''|``|--+|\.\.\.+")


@functools.lru_cache(maxsize=1 << 17)
def _scan(chunk: str, context: str) -> tuple[str, ...]:
    """Return the tokens of a chunk without spaces, followed by `context` (see `_context`)."""
    if chunk.isascii() and chunk.isalpha() and chunk.lower() not in _SPLIT_WORDS:
        return (chunk.lower(),)
    text = chunk + context
    tokens, start = [], 0
    while start < len(chunk):
        matches = [m for scanner in _SCANNERS if (m := scanner.match(text, start))]
        if not matches:  # emoji and control characters are dropped, but separate words
            start += 1
            continue
        best = max(matches, key=lambda m: m.end())
        token = next((group for group in best.groups() if group), best.group())
        start += len(token)
        if not _DROPPED.fullmatch(token):
            tokens.append(token.lower().translate(_WRITE))
    return tuple(tokens)


def _context(chunk: str, following: str) -> str:
    """Return what the rules see of the chunk after `chunk`, "" at the end of the caption."""
    if not chunk.endswith("."):
        return ""
    # The official program looks at the next caption, which usually starts with "A" or "The".
    if not following or (following[0].isupper() and following.lower() in _STARTERS.split()):
        return _BEFORE_STARTER
    return _BEFORE_NUMBER if following[0].isdigit() else ""


def tokenize(caption: str) -> list[str]:
    """Return the tokens of a caption, in lower case, without the punctuation COCO scorers drop.

    The official scorers join tokens by spaces; the only white space inside one is U+00A0. Line
    breaks of every kind count as spaces (the official wrapper replaces only `\\n`; any other would
    shift all later captions to the wrong image). A caption without words is allowed.
    """
    text = _LINE_BREAKS.sub(" ", caption.translate(_REPAIR)).replace("\xa0", " ")
    text = _FAR_NUMBER.sub(" \0 ", _IN_NUMBER.sub("\xa0", text))
    text = _ENTITY.sub(lambda m: _ENTITIES[m.group()], text)
    chunks = itertools.pairwise([*_CHUNK.findall(text), ""])
    return [token for chunk in chunks for token in _scan(chunk[0], _context(*chunk))]
