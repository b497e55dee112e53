"""Rows of reading images and clips: our loader beside torch's `DataLoader` with Pillow or PyAV.

Both decode the same files, resize them to 224 pixels a side and tokenize a caption, on one thread,
see `benches.bench_input`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from benches import bench_input
from benches.bench_input import CAPTION, Reader, photos
from benches.peer.measure import Options, Skipped, alternate, summary
from vadapter.data.image_transform import Decode
from vadapter.data.media.images import CLIP_SUFFIXES
from vadapter.data.tokenizers.bpe import BPETokenizer

SIZE, FRAMES = 224, 8


def measure(
    options: Options, *, shape: tuple[int, int] | None = None, count: int = 16,
    decode: Decode = "exact",
) -> dict[str, Any]:  # fmt: skip
    """Return the times of one pass over `count` files.

    Args:
      shape: (H, W) of JPEGs that are made; None: clips of the folder `msvd_clips` of VADAPTER_DATA.
      decode: how our side decodes JPEGs, see `DataConfig`.

    Raises:
      Skipped: there are no clips.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder), count, shape) if shape else _clips(count)
        tokenizer = BPETokenizer.train([CAPTION], 300)
        common = (files, tokenizer, SIZE, FRAMES)
        torch_files, reason = bench_input.torch_reader()
        if torch_files is None:
            raise Skipped(reason)
        readers: dict[str, Reader] = {
            "ours": bench_input.our_reader(Path(folder), *common, count, decode),
            "torch": torch_files(*common, count),
        }
        sides = {name: lambda read=read: sum(read()) for name, read in readers.items()}
        for read in sides.values():
            read()
        times = alternate(sides, options.rounds, calls=1)
    kind = f"JPEGs of {shape[1]}×{shape[0]}" if shape else f"clips, {FRAMES} frames"
    return {"what": f"{count} {kind}", "same": "the same files", "sides": summary(times)}


def _clips(count: int) -> list[Path]:
    folder = Path(os.environ.get("VADAPTER_DATA", "")) / "msvd_clips"
    found = sorted(path for path in folder.glob("*") if path.suffix in CLIP_SUFFIXES)
    if len(found) < count:
        raise Skipped(f"{len(found)} clips in {folder}, {count} needed: set VADAPTER_DATA")
    return found[:count]
