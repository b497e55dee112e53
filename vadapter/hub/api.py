"""`VAdapter.from_pretrained`: an exported stage in use, from its folder or from a hub.

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
from vadapter.hub import record as form
from vadapter.hub.load import open_export
from vadapter.stages.restore import Loaded
from vadapter.weights import hub

ALLOW = ("*.json", "*.safetensors")

Given = str | os.PathLike[str] | Media


class VAdapter:
    """A vision adapter with its encoder and its language model, ready to write about images.

        model = VAdapter.from_pretrained("runs/quickstart-adapter")
        model.caption(["photo.jpg", "clip.mp4"])  # -> two captions
        model.ask("photo.jpg", "What color is the circle?")  # -> one answer

    An image is a file, a PIL image or pixels u8[H,W,3]; a clip a file or pixels u8[F,H,W,3].

    Attributes:
      folder: the export.
      loaded: the stage, see `train.restore`.
    """

    def __init__(self, loaded: Loaded):
        self.folder, self.loaded = loaded.workdir, loaded
        self._describer = Describer(loaded)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        weights: Mapping[str, str] | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> "VAdapter":
        """Opens what `vadapter export` wrote.

        Args:
          source: a folder, or a hub id, `owner/name` or `owner/name@revision`.
          weights: where public frozen parts lie, `{component: folder or hub id}`; by default where
            they lay at the export.
          mesh: devices along `data`, `fsdp` and `tensor`; by default all along `data`.

        Raises:
          CheckpointError: no such export; missing or damaged files; public weights that are missing
            or have changed.
          ConfigError: `weights` or `mesh` that do not fit.
        """
        found = hub.resolve(os.fspath(source), allow=ALLOW)
        return cls(open_export(found.path, weights, build(MeshConfig, mesh or {}, "mesh")))

    @overload
    def caption(self, media: Given, *, max_new: int = 32, batch: int = 8) -> str: ...
    @overload
    def caption(
        self, media: Sequence[Given], *, max_new: int = 32, batch: int = 8
    ) -> list[str]: ...
    def caption(self, media: Any, *, max_new: int = 32, batch: int = 8) -> Any:
        """Describes an image or a clip, or each of a list; greedy, so always the same.

        Args:
          media: one, or a list.
          max_new: longest text in tokens.
          batch: images at a time.

        Returns:
          A line of text; of a list, a list.

        Raises:
          DataError: one that cannot be read.
        """
        texts = self._texts(_listed(media), None, max_new, batch)
        return texts if _several(media) else texts[0]

    @overload
    def ask(self, media: Given, questions: str, *, max_new: int = 32, batch: int = 8) -> str: ...
    @overload
    def ask(self, media: Any, questions: Any, *, max_new: int = 32, batch: int = 8) -> Any: ...
    def ask(self, media: Any, questions: Any, *, max_new: int = 32, batch: int = 8) -> Any:
        """Answers a question about an image or a clip.

        Args:
          media, questions: one each, or lists of the same length; where one of them is a list, the
            other goes with each of it.
          max_new, batch: as in `caption`.

        Returns:
          A line of text; a list where either is one.

        Raises:
          DataError: an image that cannot be read.
          ConfigError: lists of different lengths, an empty question.
        """
        images, asked = _listed(media), _listed(questions)
        if not _several(media):
            images *= len(asked)
        if not _several(questions):
            asked *= len(images)
        if len(images) != len(asked):
            raise ConfigError(f"{len(images)} images and {len(asked)} questions: as many each")
        texts = self._texts(images, asked, max_new, batch)
        return texts if _several(media) or _several(questions) else texts[0]

    def _texts(
        self, media: list[Any], questions: list[str] | None, max_new: int, batch: int
    ) -> list[str]:
        known = [Path(item) if isinstance(item, str | os.PathLike) else item for item in media]
        texts = []
        replies = self._describer.replies(known, questions, max_new=max_new, batch=batch)
        for i, reply in enumerate(replies):
            if reply.error:
                name = reply.media if isinstance(reply.media, Path) else f"image {i}"
                raise DataError(f"{name}: {reply.error}")
            texts.append(reply.text)
        return texts

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Uploads the export's files, and creates the repository if there is none.

        Args:
          repo_id: `owner/name`.
          private: of a new repository; None: as the owner's settings say.

        Returns:
          The address of the repository.

        Raises:
          CheckpointError: the hub refuses it or cannot be reached, or a file has gone.
        """
        files = form.files(form.read(self.folder))
        return hub.upload(self.folder, files, repo_id, private=private)


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _listed(value: Any) -> list[Any]:
    return list(value) if _several(value) else [value]
