"""Texts on which tokenizers differ, for every test that compares or round-trips one."""

import sys
import unicodedata

# White space of Unicode and of Python, format characters (zero width, direction) and control
# characters, one or two; without line breaks and the control characters that are signs, or join
# words, for the official tokenizer.
_SEPARATORS = [
    c
    for c in map(chr, range(sys.maxunicode + 1))
    if (unicodedata.category(c) in ("Zs", "Cc", "Cf") or c.isspace())
    and c not in "\n\r\v\f\u2028\u2029\x80\x85\x91\x92\xad\u0600\u0601\u0602\u0603\u06dd\u070f"
]
SPACES = [*_SEPARATORS, "  ", " \u00a0", "\t ", "\u200b "]

SPECIALS = (
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<eos><bos>",
    "<|endoftext|>",
    "<|begin_of_text|><|eot_id|>",
    "<|im_start|>user\n<|im_end|>",
    "<start_of_turn>model<end_of_turn>",
    "<image>",
    "<image_soft_token>",
    "[INST] [/INST] [PAD] [MASK] <mask>",
    "\n<s>\n",
    "a dog</s> runs <|endoftext|>.",
    "<<s>>",
    "< / s >",
)

ODD = (
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    " a dog ",
    "  two  spaces   three    four",
    "ends with spaces   ",
    "tab\tand\t\ttabs",
    "line\nline\n\nline\n\n\nline",
    "windows\r\nline\r",
    "\n leading newline",
    "nul \x00 inside",
    "\x1b[31mred\x07",
    "A DOG, a Dog; a dOG!",
    "don't we'll I'VE they'd 'tis rock'n'roll",
    "3.14159 1,000,000 2024-01-31 007 1e-5",
    "x = f(y)[0] + {'k': -1} // # %",
    "https://example.com/a_b?c=d&e=%20#f",
    "naïve café Ångström ß ẞ İstanbul ı",
    "cafe\u0301 decomposed, A\u030angstro\u0308m",
    "Z\u0351\u0346a\u0315\u0300l\u0322\u0321g\u0328o\u0327",
    "ﬁ ligature, ½, ², ①, ㍿, Ｆｕｌｌ",
    "日本語のキャプション、犬。",
    "한국어 조선말 \u1112\u1161\u11ab",
    "हिन्दी में कुत्ता",
    "שלום a mixed \u202eline\u202c עולם",
    "كلبٌ يركضُ على العشب",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽 🇩🇪",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "no\u00a0break\u2003em\u200bzero\u3000wide",
    "\ufeffbyte order mark \ufffd",
    "▁under ▁▁ lower one eighth block",
    "Ġ is not a space, nor is Ċ",
    "<0x41> <0x0A> is text",
    "soft\u00adhyphen \u2028 \u2029 \x85",
    "Describe the following: :",
    ". Question: What color is the dog? Answer:",
    "x" * 300,
    " " * 40 + "." * 40,
    "ab" * 100 + "\n" * 20,
)
