"""The public Python API, `VAdapter`: an exported stage, from its folder or from the hub.

Legend: F frames, H height, W width.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from vadapter.config import build
from vadapter.distributed.mesh import MeshConfig
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.describe import Describer, Media
from vadapter.hub import record
from vadapter.hub.load import open_export
from vadapter.stages.stage import Stage
from vadapter.weights import hub

_FILES = ("*.json", "*.safetensors")  # what is downloaded from the hub

AnyMedia = str | os.PathLike[str] | Media


class VAdapter:
    """A vision adapter with its encoder and its language model, ready for inference.

        model = VAdapter.from_pretrained("runs/quickstart-adapter")
        model.caption(["photo.jpg", "clip.mp4"])  # -> two captions
        model.ask("photo.jpg", "What color is the circle?")  # -> one answer

    An image is a file, a PIL image or pixels u8[H,W,3]; a clip is a file or pixels u8[F,H,W,3].

    Attributes:
      folder: of the export.
      loaded: the stage: recipe, model, parameters, tokenizer and mesh.
    """

    def __init__(self, loaded: Stage):
        self.folder, self.loaded = loaded.workdir, loaded
        self._describer = Describer(loaded)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, weights: Mapping[str, str] | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> "VAdapter":  # fmt: skip
        """Load an adapter that `vadapter export` wrote.

        Args:
          source: a folder, or a hub id, `owner/name` or `owner/name@revision`.
          weights: component -> folder or hub id of its public weights, if they have moved.
          mesh: devices along `data`, `fsdp` and `tensor`; by default all along `data`.

        Raises:
          CheckpointError: no such export; missing or corrupt files; public weights that are missing
            or have changed.
          ConfigError: invalid `weights` or `mesh`.
        """
        snapshot = hub.resolve(os.fspath(source), allow=_FILES)
        return cls(open_export(snapshot.path, weights, build(MeshConfig, mesh or {}, "mesh")))

    @overload
    def caption(self, media: AnyMedia, *, max_new: int = 32, batch: int = 8) -> str: ...
    @overload
    def caption(
        self, media: Sequence[AnyMedia], *, max_new: int = 32, batch: int = 8
    ) -> list[str]: ...
    def caption(self, media: Any, *, max_new: int = 32, batch: int = 8) -> Any:
        """Caption an image or a clip, or each of a list. Greedy decoding: deterministic.

        Returns a line of at most `max_new` tokens; for a list, a list. `batch` images are read and
        captioned at a time.

        Raises:
          DataError: an image that cannot be read.
        """
        captions = self._generate(_as_list(media), None, max_new, batch)
        return captions if _is_list(media) else captions[0]

    @overload
    def ask(self, media: AnyMedia, questions: str, *, max_new: int = 32, batch: int = 8) -> str: ...
    @overload
    def ask(self, media: Any, questions: Any, *, max_new: int = 32, batch: int = 8) -> Any: ...
    def ask(self, media: Any, questions: Any, *, max_new: int = 32, batch: int = 8) -> Any:
        """Answer a question about an image or a clip, see `caption`.

        Two lists have the same length; a single image or question is combined with each element of
        the other list. Returns a list if either argument is one.

        Raises:
          DataError: an image that cannot be read.
          ConfigError: lists of different lengths, or an empty question.
        """
        images, texts = _as_list(media), _as_list(questions)
        if not _is_list(media):
            images *= len(texts)
        if not _is_list(questions):
            texts *= len(images)
        if len(images) != len(texts):
            raise ConfigError(
                f"got {len(images)} images but {len(texts)} questions; pass equal numbers, or a "
                "single image or question"
            )
        answers = self._generate(images, texts, max_new, batch)
        return answers if _is_list(media) or _is_list(questions) else answers[0]

    def _generate(
        self, media: list[Any], questions: list[str] | None, max_new: int, batch: int
    ) -> list[str]:
        media = [Path(item) if isinstance(item, str | os.PathLike) else item for item in media]
        texts = []
        replies = self._describer.replies(media, questions, max_new=max_new, batch=batch)
        for i, reply in enumerate(replies):
            if reply.error:
                name = reply.media if isinstance(reply.media, Path) else f"image {i}"
                raise DataError(f"{name}: {reply.error}")
            texts.append(reply.text)
        return texts

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Upload the files of the export to `owner/name`, and return the URL of the repository.

        A repository that does not exist yet is created, `private` or by default as its owner set.

        Raises:
          CheckpointError: the hub refuses the upload or is unreachable, or a file is missing.
        """
        files = record.files(record.read(self.folder))
        return hub.upload(self.folder, files, repo_id, private=private)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _as_list(value: Any) -> list[Any]:
    return list(value) if _is_list(value) else [value]
