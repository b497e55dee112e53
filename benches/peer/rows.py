"""The rows by name, each with what it measures; the code of a row is loaded when it is run."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row: the module that measures it, and the arguments of its function `measure`."""

    module: str
    settings: dict[str, Any]
    about: str


RECIPES = {  # name -> recipe, and the visual tokens that its runs cache
    "nano": ("configs/quickstart.py:weights=", (64, 128)),
    "flickr8k": ("configs/flickr8k.py", (49, 1280)),
    "s30m": ("benches/peer/s30m.py", None),
}
STAGES = {"lm": "llm", "decoder": "decoder", "vadapter": "vadapter", "perceiver": "perceiver"}
SMOL = "benches/peer/smol.py"


def _train(name: str, kind: str) -> Row:
    recipe, features = RECIPES[name]
    stage = STAGES[kind]
    settings = {"recipe": recipe, "stage": stage, "features": features if kind != "lm" else None}
    return Row("train_rows", settings, f"train step of {stage}, {recipe}")


def _decode(name: str, batch: int) -> Row:
    recipe, features = RECIPES[name]
    settings = {"recipe": recipe, "stage": "vadapter", "features": features, "batch": batch}
    return Row("decode_rows", settings, f"captions of {batch} images, {recipe}")


def _continue(dtype: str, batch: int) -> Row:
    settings = {"recipe": SMOL, "stage": "llm", "batch": batch, "dtype": dtype}
    return Row("decode_rows", settings, f"continue {batch} texts in {dtype}, {SMOL}")


TRAIN = {
    f"{name}-{kind}": _train(name, kind)
    for name in RECIPES
    for kind in STAGES
    if (name, kind) != ("s30m", "lm")
}
DECODE = {
    f"{name}-decode-{batch}": _decode(name, batch)
    for name in ("flickr8k", "s30m")
    for batch in (1, 16, 64)
}
CONTINUE = {
    f"{name}-decode-{batch}": _continue(dtype, batch)
    for name, dtype in (("smol", "float32"), ("smol-bf16", "bfloat16"))
    for batch in (1, 8)
}
SHAPES = {"jpeg-640": (480, 640), "jpeg-1600": (1200, 1600)}  # H and W
INPUT = {
    f"{name}{end}": Row(
        "input_rows",
        {"shape": shape, "decode": decode},
        f"16 JPEGs of {shape[1]}×{shape[0]} to 224, {decode}",
    )
    for name, shape in SHAPES.items()
    for end, decode in (("", "exact"), ("-fast", "fast"))
} | {
    "clips": Row("input_rows", {"count": 8}, "8 frames of each of 8 clips, $VADAPTER_DATA"),
}
OTHERS = {
    "scoring": Row("scoring_rows", {}, "CIDEr, BLEU and ROUGE-L of 5,000 captions"),
    "start-warm": Row("start_rows", {"cold": False}, "`vadapter caption` of one image, again"),
    "start-cold": Row("start_rows", {"cold": True}, "`vadapter caption` of one image, first time"),
}
ROWS: dict[str, Row] = TRAIN | DECODE | CONTINUE | INPUT | OTHERS


def function(name: str) -> Callable[..., dict[str, Any]]:
    """Return the function of a row: `Options` and its settings -> result."""
    return importlib.import_module(f"benches.peer.{ROWS[name].module}").measure
