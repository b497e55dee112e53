"""The batch: the one thing that data and models both know.

A batch is a dict of arrays, laid out as the decoder reads it: prompt, visual tokens, text. All rows
of a batch are of one kind, so its shapes are those of one of a few compiled programs.

A caption segment reads [" :", w1 … wn] with the targets [w1 … wn, EOS]; a document [BOS, w1 … wn]
with the same targets. EOS is only ever a target, unless it is also BOS. Id 0 is a token like any
other: in a public model it may be a word, or EOS.

Legend: B batch, F frames, S pixels a side, N visual tokens a frame, D encoder width, P prompt
tokens, T text tokens, M targets, V vocabulary.
"""

import typing
from typing import Annotated, Any, NotRequired, TypedDict, cast

import numpy as np

from vadapter.errors import DataError

PAD, BOS, EOS = 0, 1, 2  # of the project's own tokenizer; never produced by raw text
PROMPT_PAD = -1  # no token's id
Array = Any  # numpy arrays from the pipeline, jax arrays on the devices
Row = dict[str, np.ndarray]  # one row of a batch: the same keys, without B


class Batch(TypedDict):
    """The arrays of a batch, each with its dtype and dimensions.

    The visual input is `frames`, or `features` if a frozen encoder computed them before; a batch
    of text has neither. `check_batch` verifies the contract.
    """

    frames: Annotated[NotRequired[Array], "uint8", "BFSSC"]  # C is 3; F is 1 for images
    features: Annotated[NotRequired[Array], "bfloat16", "BFND"]

    # The tokens before the visual tokens, padded with PROMPT_PAD on the left, so that the prompt
    # always ends where the visual tokens begin.
    prompt: Annotated[Array, "int32", "BP"]

    # The text after the visual tokens. A row may hold several independent texts, such as the
    # captions of one image behind one prefix, or documents packed in a row: segment k of 1..K.
    # Segment 0 is padding. Positions count from 0 in every segment.
    tokens: Annotated[Array, "int32", "BT"]
    segments: Annotated[Array, "int32", "BT"]
    positions: Annotated[Array, "int32", "BT"]

    # The loss: at `tokens[target_at]` the model must predict `targets`. Gathering these M positions
    # before the output projection saves computing logits nobody needs.
    target_at: Annotated[Array, "int32", "BM"]
    targets: Annotated[Array, "int32", "BM"]
    weights: Annotated[Array, "float32", "BM"]  # 1 for a target, 0 for padding and in bad rows

    id: Annotated[Array, "int32", "B"]  # index in the source; -1: a row that only fills the batch
    bad: Annotated[Array, "bool", "B"]  # the sample could not be used; its weights are all 0


SPEC: dict[str, tuple[str, str]] = {  # key -> dtype, dimensions
    key: hint.__metadata__
    for key, hint in typing.get_type_hints(Batch, include_extras=True).items()
}
_VISUAL = ("frames", "features")


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raise DataError unless a host batch keeps the contract; for the first batch of a run.

    On the devices an id outside the vocabulary is silently clamped or becomes NaN, and a negative
    one gives a finite but wrong loss. Therefore it is checked here, on the host. The error names
    the key, and the row if a single one is at fault.
    """
    arrays = cast(dict[str, np.ndarray], batch)
    missing = [key for key in SPEC if key not in arrays and key not in _VISUAL]
    unknown = [key for key in arrays if key not in SPEC]
    if missing or unknown or all(key in arrays for key in _VISUAL):
        raise DataError(
            f"not a batch: missing keys {missing}, unknown keys {unknown}, at most one of "
            f"{_VISUAL} allowed; got {sorted(arrays)}"
        )
    sizes = {"C": 3}
    for key, value in arrays.items():
        dtype, dims = SPEC[key]
        fits = value.ndim == len(dims) and all(
            sizes.setdefault(dim, size) == size for dim, size in zip(dims, value.shape, strict=True)
        )
        if value.dtype != dtype or not fits:
            raise DataError(
                f"batch[{key!r}] is {value.dtype}{list(value.shape)}, expected {dtype} with "
                f"dimensions {dims}; the other keys have {sizes}"
            )
    for key, lowest in (("prompt", PROMPT_PAD), ("tokens", 0), ("targets", 0)):
        _check_range(arrays, key, vocab_size, "is the tokenizer that of the model?", lowest)
    for key in ("positions", "target_at"):
        _check_range(arrays, key, max(sizes["T"], 1), "an index past the text")
    _check_range(arrays, "segments", sizes["T"] + 1, "more segments than tokens")

    weights = arrays["weights"]
    in_text = np.take_along_axis(arrays["segments"], arrays["target_at"], axis=1) > 0
    unusable = arrays["bad"] | (arrays["id"] < 0)
    wrong = ~np.isfinite(weights) | (weights < 0)
    wrong |= (weights > 0) & (~in_text | unusable[:, None])
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"batch['weights'][{row}, {column}] = {weights[row, column]} (id {arrays['id'][row]}): "
            "weights must be finite, not negative, and 0 at padding and in bad rows"
        )


def _check_range(
    arrays: dict[str, np.ndarray], key: str, limit: int, hint: str, lowest: int = 0
) -> None:
    value = arrays[key]
    outside = (value < lowest) | (value >= limit)
    if outside.any():
        row = int(np.argwhere(outside)[0][0])
        raise DataError(
            f"batch[{key!r}] has {value[outside][0]} in row {row} (id {arrays['id'][row]}), "
            f"outside {lowest}..{limit - 1}: {hint}"
        )
