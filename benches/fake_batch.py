"""A batch without data, for the benchmark of a step and for tests; see `vadapter.data.batch`."""

import ml_dtypes
import numpy as np

from vadapter.data.batch import Batch


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
    """Return a valid batch of random content, for shapes, compilation, timing and tests.

    Args:
      batch_size: B.
      frames: F; 0 gives a text batch, with neither `frames` nor `features`.
      size: S.
      features: (N, D) for a batch of features instead of frames.
      prompt_len: P.
      text_len: T, also M.
      segments: independent texts in a row, each of random length up to its share of the row.
      vocab_size: V.
      seed: determines the batch.
    """
    rng = np.random.default_rng(seed)
    share = text_len // segments
    if share < 2 or vocab_size <= 3:
        raise ValueError(f"{segments=} need text_len >= {2 * segments} and a vocab_size above 3")
    shape = (batch_size, text_len)
    tokens, segment_ids, positions, target_at, targets = np.zeros((5, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    for row in range(batch_size):
        start = 0
        for segment in range(1, segments + 1):
            n = int(rng.integers(2, share + 1))
            span = slice(start, start + n)
            tokens[row, span] = rng.integers(3, vocab_size, n)
            segment_ids[row, span] = segment
            positions[row, span] = np.arange(n)
            target_at[row, span] = np.arange(start, start + n)
            targets[row, span] = [*tokens[row, start + 1 : start + n], 2]
            weights[row, span] = 1
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
