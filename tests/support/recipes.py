# ruff: noqa: C408
"""A whole chain of stages in seconds: drawn images of 32 pixels, models of width 16 and 24.

    shapes = draw(tmp_path / "shapes")
    train(read(tiny_recipe(shapes)), tmp_path / "run")

or `vadapter train --config=tests/support/recipes.py:FOLDER --workdir=RUN`.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image, ImageDraw

SIZE = 32
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
SHAPES = ("circle", "square", "bar")
GROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15)}
FRAMES = 8


def draw(folder: Path) -> Path:
    """Draw 36 images and 24 clips with captions and questions; a third of them is held out.

    Files: images.jsonl (captions), questions.jsonl (of the same images) and clips.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {"images": [], "questions": [], "clips": []}
    kinds = list(itertools.product(COLORS, SHAPES, GROUNDS))
    for i, (color, shape, ground) in enumerate(kinds * 2):
        name, split = f"{i:02d}.png", "val" if i % 3 == 2 else "train"
        _image(color, shape, ground, offset=i // len(kinds)).save(folder / name)
        captions = [f"a {color} {shape} on {ground}", f"{color} {shape} , {ground} ground"]
        tables["images"].append({"image": name, "captions": captions, "split": split})
        for question, answer, kind in (
            ("what colour is it?", color, "colour"),
            ("is the ground black?", "yes" if ground == "black" else "no", "yes/no"),
        ):
            row = {"image": name, "question": question, "answer": answer, "kind": kind}
            tables["questions"].append({**row, "split": split})
    for i, (color, way, _) in enumerate(itertools.product(COLORS, ("left", "right"), range(4))):
        name, split = f"{i:02d}.gif", "val" if i % 3 == 2 else "train"
        steps = [n if way == "right" else FRAMES - 1 - n for n in range(FRAMES)]
        frames = [_image(color, "bar", "white", offset=2 * n - 7) for n in steps]
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=100)
        captions = [f"a {color} bar moves {way}", f"the {color} bar goes to the {way}"]
        tables["clips"].append({"clip": name, "captions": captions, "split": split})
    for name, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def _image(color: str, shape: str, ground: str, offset: int = 0) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), GROUNDS[ground])
    pen, x = ImageDraw.Draw(image), SIZE // 2 + offset
    if shape == "circle":
        pen.ellipse((x - 8, 8, x + 8, 24), fill=COLORS[color])
    else:
        half = 8 if shape == "square" else 3
        pen.rectangle((x - half, 8, x + half, 24), fill=COLORS[color])
    return image


def get_config(arg: str) -> ConfigDict:
    """The recipe over the folder that `draw` filled, trained until it writes captions."""
    return tiny_recipe(Path(arg), steps=40)


def tiny_recipe(shapes: Path, *, steps: int = 4, batch: int = 8) -> ConfigDict:
    """All kinds of stage: tlm, llm (lm) → vision → decoder → vadapter, perceiver (adapter).

    Args:
      shapes: the folder that `draw` filled.
      steps: of every stage.
      batch: of every stage; the tests' eight devices divide it.
    """
    source = lambda table, split: dict(  # noqa: E731
        kind="folder", table=str(shapes / f"{table}.jsonl"), split=split
    )
    caption = dict(task="caption", text_len=40, target_len=36, texts=2)
    question = dict(task="question", text_len=60, target_len=20, texts=2)
    documents = dict(kind="documents", groups=[str(shapes / "images.jsonl")], variants=2)
    lm = dict(kind="lm", vocab_size=0, depth=1, heads=2, max_len=160)
    vit = dict(kind="vit", image_size=SIZE, patch=8, width=16, depth=1, heads=2, mlp_dim=32)
    queries = dict(kind="resampler", queries=4, query_dim=16, hidden_dim=16, heads=2, frames=FRAMES)
    every = dict(
        steps=steps, batch=batch, save_every=steps, log_every=2,
        optim=dict(lr=1e-2, warmup=1, clip=1.0),
    )  # fmt: skip
    still = dict(data=dict(images=1.0), loss=("held",), loss_batches=1)
    looks = dict(eval_every=steps // 2, eval_limit=8)
    start = dict(resampler="decoder", fc_in="decoder", tlm="decoder", llm="llm", encoder="vision")
    return ConfigDict(
        dict(
            name="tiny",
            seed=0,
            dtype="float32",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=0,
            tokenizer=dict(vocab_size=320, data=("documents", "questions", "clips"), texts=1000),
            components=dict(
                encoder=vit,
                pooler=dict(kind="pooler", queries=3, width=16, heads=2),
                text={**lm, "width": 16, "mlp_dim": 32},
                fusion=dict(kind="fusion", depth=1, width=16, heads=2, mlp_dim=32, embed_dim=8),
                tlm={**lm, "width": 16, "mlp_dim": 32},
                llm={**lm, "width": 24, "mlp_dim": 48},
                resampler={**queries, "layers": 1},
                perceiver={**queries, "layers": 2},
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(
                documents=dict(task="document", text_len=48, source=documents),
                images=dict(**caption, source=source("images", "train")),
                questions=dict(**question, source=source("questions", "train")),
                clips=dict(**caption, source=source("clips", "train")),
                held=dict(**caption, source=source("images", "val")),
                held_questions=dict(**question, source=source("questions", "val")),
                held_clips=dict(**caption, source=source("clips", "val")),
            ),
            evals=dict(
                captions=dict(data="held", max_new=12, batch=8, limit=0),
                answers=dict(data="held_questions", max_new=4, batch=8, limit=0),
                clips=dict(data="held_clips", max_new=12, batch=8, limit=0),
            ),
            chain=("tlm", "llm", "vision", "decoder", "vadapter", "perceiver"),
            stages=dict(
                tlm=dict(kind="lm", lm="tlm", data=dict(documents=1.0), **every),
                llm=dict(
                    kind="lm", lm="llm", data=dict(documents=1.0), loss=("documents",),
                    loss_batches=1, **every,
                ),
                vision=dict(kind="vision", data=dict(images=1.0), **every),
                decoder=dict(
                    kind="decoder", lm="tlm", chain=("resampler", "fc_in"),
                    start=dict(tlm="tlm", encoder="vision"), **still, **every,
                ),
                vadapter=dict(
                    kind="adapter", lm="llm", chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=start, **{**still, "data": dict(images=1.0, clips=1.0)}, **looks,
                    evals=("captions", "answers", "clips"), **every,
                ),
                perceiver=dict(
                    kind="adapter", lm="llm", chain=("perceiver", "fc_out"),
                    start=dict(llm="llm", encoder="vision"), **still, **looks,
                    evals=("captions",), **every,
                ),
            ),
        )
    )  # fmt: skip
