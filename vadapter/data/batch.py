"""The batch: the one thing that data and models both know.

A batch is a plain dict of arrays, laid out as the decoder reads it: prompt, visual tokens, text.
All rows of a batch are of one kind, so its shapes are those of one of a few compiled programs.

    frames    u8[B,F,S,S,3]   F is 1 for images; or instead
    features  bf16[B,F,N,D]   encoder tokens computed before; a text batch has neither
    prompt    i32[B,P]        tokens in front of the visual tokens, padded with -1 on the left
    tokens    i32[B,T]        text behind the visual tokens; what is padding, `segments` says
    segments  i32[B,T]        0 is padding; 1..k are independent texts behind the same prefix, such
                              as the captions of one image, or the documents packed in a row
    positions i32[B,T]        position inside the segment, from 0
    target_at i32[B,M]        index into `tokens` of a position whose next token is a target
    targets   i32[B,M]        the token to predict there
    weights   f32[B,M]        1 for a target, 0 for padding and in a row that is bad
    id        i32[B]          index in the source; -1 in a row that only fills the batch
    bad       bool[B]         the sample could not be used; its weights are all 0

A caption segment reads [" :", w1 … wn] with the targets [w1 … wn, EOS]; a document [BOS, w1 … wn]
with the same targets. EOS is only ever a target, unless it is BOS, too. Id 0 is a token like any
other: a public model's may be a word, or its EOS.

Legend: B batch, F frames, S pixels a side, N visual tokens a frame, D encoder width, P prompt
tokens, T text tokens, M targets, V vocabulary.
"""

from typing import Any

import ml_dtypes
import numpy as np

from vadapter.errors import DataError

PAD, BOS, EOS = 0, 1, 2  # of the project's own tokenizer; never produced by raw text
PROMPT_PAD = -1  # no token's id
Row = dict[str, np.ndarray]
Batch = dict[str, Any]  # numpy arrays from the pipeline, jax arrays on the devices

SPEC: dict[str, tuple[str, str]] = {
    "frames": ("uint8", "BFSSC"),
    "features": ("bfloat16", "BFND"),
    "prompt": ("int32", "BP"),
    "tokens": ("int32", "BT"),
    "segments": ("int32", "BT"),
    "positions": ("int32", "BT"),
    "target_at": ("int32", "BM"),
    "targets": ("int32", "BM"),
    "weights": ("float32", "BM"),
    "id": ("int32", "B"),
    "bad": ("bool", "B"),
}
_VISUAL = ("frames", "features")


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Checks a host batch against the contract, for the first batch of a run and for tests.

    An id past the vocabulary is clamped or turned into NaN by the devices, and a negative one
    gives a finite wrong loss; neither says so, which is why it is looked at here.

    Args:
      batch: numpy arrays as in the table above.
      vocab_size: V; every id must be below it.

    Raises:
      DataError: names the key, and the row where there is one.
    """
    missing = [key for key in SPEC if key not in batch and key not in _VISUAL]
    unknown = [key for key in batch if key not in SPEC]
    if missing or unknown or all(key in batch for key in _VISUAL):
        raise DataError(
            f"Not a batch: missing {missing}, unknown {unknown}, and at most one of {_VISUAL} may "
            f"be there; it has {sorted(batch)}."
        )
    sizes = {"C": 3}
    for key, value in batch.items():
        dtype, dims = SPEC[key]
        fits = value.ndim == len(dims) and all(
            sizes.setdefault(dim, size) == size for dim, size in zip(dims, value.shape, strict=True)
        )
        if value.dtype != dtype or not fits:
            raise DataError(
                f"batch[{key!r}] is {value.dtype}{list(value.shape)}, expected {dtype} with the "
                f"dimensions {dims}, of which the other keys fix {sizes}."
            )
    for key, lowest in (("prompt", PROMPT_PAD), ("tokens", 0), ("targets", 0)):
        _check_range(batch, key, vocab_size, "another tokenizer than the model's?", lowest)
    for key in ("positions", "target_at"):
        _check_range(batch, key, max(sizes["T"], 1), "an index past the text")
    _check_range(batch, "segments", sizes["T"] + 1, "more segments than tokens")

    weights = batch["weights"]
    read = np.take_along_axis(batch["segments"], batch["target_at"], axis=1) > 0
    wrong = ~np.isfinite(weights) | (weights < 0) | ((weights > 0) & ~read)
    wrong |= (weights > 0) & (batch["bad"] | (batch["id"] < 0))[:, None]
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"batch['weights'][{row}, {column}] = {weights[row, column]} (id {batch['id'][row]}): "
            "weights are finite, not negative, and 0 at padding and in bad rows."
        )


def _check_range(batch: Batch, key: str, limit: int, hint: str, lowest: int = 0) -> None:
    value = batch[key]
    outside = (value < lowest) | (value >= limit)
    if outside.any():
        row = int(np.argwhere(outside)[0][0])
        raise DataError(
            f"batch[{key!r}] holds {value[outside][0]} in row {row} (id {batch['id'][row]}), "
            f"outside {lowest}..{limit - 1}: {hint}"
        )


def fake_batch(
    batch_size: int,
    *,
    frames: int = 1,
    size: int = 32,
    features: tuple[int, int] | None = None,
    prompt_len: int = 4,
    text_len: int = 24,
    segments: int = 2,
    vocab_size: int = 64,
    seed: int = 0,
) -> Batch:
    """A valid batch of random content, for tests, shapes, compilation and timing.

    Args:
      batch_size: B.
      frames: F; 0 gives a text batch, with neither `frames` nor `features`.
      size: S, pixels a side.
      features: (N, D) for a batch of features instead of frames.
      prompt_len: P.
      text_len: T, also M.
      segments: independent texts a row, each of random length in its share of the row.
      vocab_size: V.
      seed: the same seed gives the same batch.

    Returns:
      A batch of numpy arrays.
    """
    rng = np.random.default_rng(seed)
    share = text_len // segments
    if share < 2 or vocab_size <= 3:
        raise ValueError(f"{segments=} need text_len >= {2 * segments} and a vocab_size above 3")
    shape = (batch_size, text_len)
    tokens, segment_ids, positions, target_at, targets = (
        np.zeros(shape, np.int32) for _ in "12345"
    )
    weights = np.zeros(shape, np.float32)
    for row in range(batch_size):
        start = 0
        for segment in range(1, segments + 1):
            n = int(rng.integers(2, share + 1))
            here = slice(start, start + n)
            tokens[row, here] = rng.integers(3, vocab_size, n)
            segment_ids[row, here] = segment
            positions[row, here] = np.arange(n)
            target_at[row, here] = np.arange(start, start + n)
            targets[row, here] = [*tokens[row, start + 1 : start + n], 2]
            weights[row, here] = 1
            start += n
    batch: Batch = {
        "prompt": rng.integers(3, vocab_size, (batch_size, prompt_len)).astype(np.int32),
        "tokens": tokens,
        "segments": segment_ids,
        "positions": positions,
        "target_at": target_at,
        "targets": targets,
        "weights": weights,
        "id": np.arange(batch_size, dtype=np.int32),
        "bad": np.zeros(batch_size, bool),
    }
    if frames and features:
        shape = (batch_size, frames, *features)
        batch["features"] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    elif frames:
        shape = (batch_size, frames, size, size, 3)
        batch["frames"] = rng.integers(0, 256, shape, np.uint8)
    return batch
