"""What a benchmark is, as data: its task, official splits and files, and how the files are read."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from vadapter.data.example import Question


class Record(NamedTuple):
    """One image or clip of a split, and all that the annotation files say about it.

    Attributes:
      id: unique in its split, as the official files and submissions name the image or clip.
      media: the name of its file, without folder and suffix (one's own clips have many suffixes).
      captions: of the annotators.
      qa: all questions about it in the split.
    """

    id: str
    media: str
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()


class Counts(NamedTuple):
    """The official size of a split.

    Attributes:
      media: images or clips.
      texts: captions or questions.
      each: captions of an image, or answers to a question; 0 where answers are not public, None
        where their number differs.
    """

    media: int
    texts: int
    each: int | None = None


class File(NamedTuple):
    """An official annotation file.

    Attributes:
      name: its official name; `{split}` stands for what `splits` says of the split.
      page: the official page that it comes from.
      splits: the splits that need it -> what replaces `{split}`.
      archives: the official zips that may hold it, as glob patterns; they are read in place.
      folders: of the official download; it may lie in them or beside them.
      also: other names that it has.
    """

    name: str
    page: str
    splits: Mapping[str, str]
    archives: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def names(self, split: str) -> tuple[str, ...]:
        """Its names for a split."""
        return tuple(name.format(split=self.splits[split]) for name in (self.name, *self.also))


class Place(NamedTuple):
    """An official set of images or clips: in folders, or in archives that are read in place.

    Attributes:
      folders: where they may lie, any of them; `{split}` as in `File`.
      page: the official page that they come from.
      splits: the splits that need the set -> what replaces `{split}`.
      archives: zips or tars that may hold them, as glob patterns with `{split}`.
    """

    folders: tuple[str, ...]
    page: str
    splits: Mapping[str, str]
    archives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: on the command line and in result files.
      task: "caption" or "question".
      media: "image" or "clip".
      splits: name -> official counts.
      split: the one that is scored by default.
      homepage: the official page.
      files: the annotation files.
      places: the sets of images or clips; a split needs all that name it.
      read: (folder, split) -> the records in the order of the official files. Raises DataError
        for a file that is missing or not in the official format.
      training: the split whose questions stand in prompts as examples; "" if it has none.
    """

    name: str
    task: Literal["caption", "question"]
    media: Literal["image", "clip"]
    splits: Mapping[str, Counts]
    split: str
    homepage: str
    files: tuple[File, ...]
    places: tuple[Place, ...]
    read: Callable[[Path, str], Iterator[Record]]
    training: str = ""


def same(*splits: str) -> dict[str, str]:
    """Splits whose files carry the name of the split."""
    return {split: split for split in splits}
