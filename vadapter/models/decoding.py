"""How text is generated; `generate` does it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Decode:
    """How text is generated.

    Attributes:
      max_new: G, the longest text in tokens, the end token included.
      min_new: the shortest text in tokens, the end token included.
      beams: K, the width of the beam search; 1: greedy.
      length_penalty: of the beam search, see `generate.beam`.
    """

    max_new: int = 32
    min_new: int = 0
    beams: int = 1
    length_penalty: float = 1.0
