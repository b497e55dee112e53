"""Types that describe a benchmark: its task, its official splits and files, and their reader."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from vadapter.data.example import Question


class Record(NamedTuple):
    """An image or clip of a split with its annotations.

    Attributes:
      id: unique in its split, as in the official files and submissions.
      media: file name of the image or clip without folder and suffix, since users cut and store
        clips in formats of their own.
      captions: one per annotator.
      qa: all questions about it in the split.
    """

    id: str
    media: str
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()


class Counts(NamedTuple):
    """The official size of a split.

    Attributes:
      media: number of images or clips.
      texts: number of captions or questions.
      per_item: captions of an image, or answers to a question; 0 where answers are not public,
        None where the number varies.
    """

    media: int
    texts: int
    per_item: int | None = None


class File(NamedTuple):
    """An official annotation file.

    Attributes:
      name: its official name; `{split}` is replaced by the split's value in `splits`.
      page: the official page that offers it.
      splits: split that needs the file -> replacement of `{split}`.
      archives: official zips that may contain it, as glob patterns; they are read in place.
      folders: folders of the official download that may contain it.
      aliases: other names of it.
    """

    name: str
    page: str
    splits: Mapping[str, str]
    archives: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def names(self, split: str) -> tuple[str, ...]:
        """Return the file's names for a split, the official one first."""
        return tuple(name.format(split=self.splits[split]) for name in (self.name, *self.aliases))


class MediaSet(NamedTuple):
    """An official set of images or clips: in folders, or in archives that are read in place.

    Attributes:
      folders: folders that may hold them; `{split}` as in `File`.
      page: the official page that offers them.
      splits: split that needs the set -> replacement of `{split}`.
      archives: zips or tars that may hold them, as glob patterns with `{split}`.
    """

    folders: tuple[str, ...]
    page: str
    splits: Mapping[str, str]
    archives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark, as a row of `table.BENCHMARKS`.

    Attributes:
      name: on the command line and in result files.
      splits: name -> official counts.
      homepage: the official page.
      files: the annotation files.
      media_sets: the sets of images or clips; a split needs every set that names it.
      reader: a function of `formats`: (folder, split, *files) -> records.
      default_split: the split that is scored by default.
    """

    name: str
    task: Literal["caption", "question"]
    media: Literal["image", "clip"]
    splits: Mapping[str, Counts]
    homepage: str
    files: tuple[File, ...]
    media_sets: tuple[MediaSet, ...]
    reader: Callable[..., Iterator[Record]]
    default_split: str = "test"

    @property
    def training(self) -> str:
        """The split whose questions serve as examples in few-shot prompts; "" if none."""
        return "train" if self.task == "question" else ""
