"""Types that describe a benchmark: its task, its official splits and files, and their reader."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from vadapter.data.example import Question


class Record(NamedTuple):
    """An image or clip of a split with its annotations."""

    id: str  # unique in its split, as in the official files and submissions
    # File name without folder and suffix, since users cut and store clips in formats of their own.
    media: str
    captions: tuple[str, ...] = ()  # one per annotator
    qa: tuple[Question, ...] = ()  # all questions about it in the split


class Counts(NamedTuple):
    """The official size of a split."""

    media: int  # images or clips
    texts: int  # captions or questions
    # Captions of an image, or answers to a question; 0 where answers are not public, None where the
    # number varies.
    per_item: int | None = None


class File(NamedTuple):
    """An official annotation file."""

    name: str  # the official one; `{split}` is replaced by the split's value in `splits`
    page: str  # the official page that offers it
    splits: Mapping[str, str]  # split that needs the file -> replacement of `{split}`
    archives: tuple[str, ...] = ()  # official zips that may contain it, as glob patterns
    folders: tuple[str, ...] = ()  # folders of the official download that may contain it
    aliases: tuple[str, ...] = ()  # other names of it

    def names(self, split: str) -> tuple[str, ...]:
        """Return the file's names for a split, the official one first."""
        return tuple(name.format(split=self.splits[split]) for name in (self.name, *self.aliases))


class MediaSet(NamedTuple):
    """An official set of images or clips: in folders, or in archives that are read in place."""

    folders: tuple[str, ...]  # folders that may hold them; `{split}` as in `File`
    page: str  # the official page that offers them
    splits: Mapping[str, str]  # split that needs the set -> replacement of `{split}`
    archives: tuple[str, ...] = ()  # zips or tars that may hold them: glob patterns with `{split}`


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark, as a row of `table.BENCHMARKS`."""

    name: str  # on the command line and in result files
    task: Literal["caption", "question"]
    media: Literal["image", "clip"]
    splits: Mapping[str, Counts]
    homepage: str  # the official page
    files: tuple[File, ...]  # the annotation files
    media_sets: tuple[MediaSet, ...]  # a split needs every set that names it
    reader: Callable[..., Iterator[Record]]  # of `formats`: (folder, split, *files) -> records
    default_split: str = "test"  # the split that is scored by default

    @property
    def training(self) -> str:
        """The split whose questions serve as examples in few-shot prompts; "" if none."""
        return "train" if self.task == "question" else ""
