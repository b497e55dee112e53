"""Items of an evaluation: the examples or the questions of a source, one prediction each."""

from typing import Any

from vadapter.data.example import Example, Question, Source


class Questions:
    """The (example, question) pairs of a source.

    Args:
      source: examples with questions.
      limit: number of pairs to keep; 0: all.
    """

    def __init__(self, source: Source, limit: int = 0):
        self._source = source
        self._pairs: list[tuple[int, int]] = []
        for i in range(len(source)):
            if limit and len(self._pairs) >= limit:
                break
            self._pairs += [(i, j) for j in range(len(source.text_only(i).qa))]
        self._pairs = self._pairs[: limit or None]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Example, Question]:
        i, j = self._pairs[index]
        example = self._source[i]
        return example, example.qa[j]

    def text_only(self, index: int) -> tuple[Example, Question]:
        """Return the pair without the media of its example."""
        i, j = self._pairs[index]
        example = self._source.text_only(i)
        return example, example.qa[j]


class Slice:
    """The items `start` to `stop` of a source; `stop` may exceed its length."""

    def __init__(self, source: Source, start: int, stop: int):
        self._source, self._start = source, start
        self._length = max(min(stop, len(source)) - start, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._source[self._start + index]

    def text_only(self, index: int) -> Any:
        """Return the item without its media."""
        return self._source.text_only(self._start + index)


def items_of(source: Source, task: str, limit: int = 0) -> Any:
    """Return what is predicted one by one.

    Args:
      source: examples.
      task: "caption" for examples, "question" for (example, question) pairs.
      limit: number of items to keep; 0: all.
    """
    if task == "question":
        return Questions(source, limit)
    return Slice(source, 0, limit) if limit else source
