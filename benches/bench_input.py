"""Samples that one core reads per second: `python -m benches.bench_input --help`.

Decoding, resizing to S pixels per side and tokenizing, through this project's loader and through a
torch `DataLoader` with PIL (and PyAV for clips) on the same files in the same order, alternating,
in this process and on one thread. Images are also read with `decode=fast`, and how much its pixels
differ is stated. Rates are samples per second of CPU time, so that other processes
matter little. The torch side does what a plain `Dataset` does: it decodes a clip from its first
frame to the last one shown. Nothing is shuffled: grain's shuffle of a few dozen items takes longer
for each (0.4 ms of 64) than that of a real data set (0.02 ms of 6,000).

Legend: F frames, S pixels per side, T text tokens.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vadapter import console
from vadapter.data.image_transform import Decode
from vadapter.data.media.frames import load_square
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES, ImageTransform
from vadapter.data.pipeline import eval_batches
from vadapter.data.sources.table import ImageFolder
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.transforms import caption_sample
from vadapter.errors import DataError

# Samples per second, by compiler estimates of the 1B recipe's adapter stage at 288 pixels: a step
# of 8 samples per chip takes 113.5 ms on v5e, so a host of 4 chips needs 280; an H200 about 230.
NEEDS = {"one H200": 230, "a TPU v5e host of 4 chips": 280}
CAPTION = "a brown dog runs over the wet grass with a red ball in its mouth"
TEXT_LEN = 32
Reader = Callable[[], Iterator[int]]  # yields the number of samples it has just read


def bench(
    kinds: Mapping[str, Sequence[Path]], *, size: int = 224, frames: int = 8, rounds: int = 5,
    batch: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Time one pass over the files in every round, both sides alternating.

    Args:
      kinds: name -> files, all images or all clips.
      size: S.
      frames: F of a clip.
      rounds: after a first one that does not count.
      batch: samples at a time; fewer where they would not divide the files.

    Returns:
      A JSON object: of each kind `files`, `kilobytes` (mean), `ours` and `torch` (median samples
      per CPU second), `ratio` (median over rounds) and `cores` for `NEEDS`; of images also `fast`,
      `fast_ratio`, and the mean `difference` of fast and exact levels of 0..255; `without_torch`,
      the reason if there is no `torch`.
    """
    tokenizer = BPETokenizer.train([CAPTION], 300)
    torch_files, reason = torch_reader()
    results: dict[str, Any] = {"size": size, "rounds": rounds, "kinds": {}, "without_torch": reason}
    for name, files in kinds.items():
        rows = max(n for n in range(1, batch + 1) if len(files) % n == 0)
        with tempfile.TemporaryDirectory() as folder:
            ours = functools.partial(our_reader, Path(folder), files, tokenizer, size, frames, rows)
            readers: dict[str, Reader] = {"ours": ours()}
            if not (clips := files[0].suffix.lower() in CLIP_SUFFIXES):
                readers["fast"] = ours(decode="fast")
            if torch_files is not None:
                readers["torch"] = torch_files(files, tokenizer, size, frames, rows)
            rates = _rates(readers, rounds)
        medians = {side: statistics.median(values) for side, values in rates.items()}
        row: dict[str, Any] = {
            "files": len(files),
            "kilobytes": sum(path.stat().st_size for path in files) / len(files) / 1000,
            **medians,
            "cores": {what: need / medians["ours"] for what, need in NEEDS.items()},
        }
        for side, ratio in (("ours", "ratio"), ("fast", "fast_ratio")):
            if "torch" in rates and side in rates:
                pairs = zip(rates[side], rates["torch"], strict=True)
                row[ratio] = statistics.median(a / b for a, b in pairs)
        if not clips:
            row["difference"] = statistics.mean(_difference(path, size) for path in files)
        results["kinds"][name] = row
    return results


def _difference(path: Path, size: int) -> float:
    """Return the mean difference of the levels of an image, decoded fast and exactly."""
    exact, fast = (
        load_square(path, ImageTransform(size, decode=decode), frames=1).astype(int)
        for decode in ("exact", "fast")
    )
    return float(np.abs(fast - exact).mean())


def _rates(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {side: [] for side in readers}
    for number in range(rounds + 1):
        for side, reader in readers.items():
            start = time.process_time()
            count = sum(reader())
            if number:  # the first warms up
                rates[side].append(count / (time.process_time() - start))
    return rates


def our_reader(
    folder: Path, files: Sequence[Path], tokenizer: Any, size: int, frames: int, batch: int,
    decode: Decode = "exact",
) -> Reader:  # fmt: skip
    """Return this project's loader over the files; `folder` is for a table of them."""
    rows = (json.dumps({"image": os.path.relpath(path, "/"), "caption": CAPTION}) for path in files)
    (folder / "rows.jsonl").write_text("".join(row + "\n" for row in rows))
    source = ImageFolder(folder / "rows.jsonl", "/")
    transform: Any = functools.partial(
        caption_sample, tokenizer=tokenizer, view=ImageTransform(size, decode=decode),
        text_len=TEXT_LEN, target_len=TEXT_LEN, prompt_len=32,
        frames=frames if source.kind == "clip" else 1,
    )  # fmt: skip

    def read() -> Iterator[int]:
        for arrays in eval_batches(source, transform, batch, threads=0):
            if arrays["bad"].any():
                raise DataError(f"unusable files: {arrays['id'][arrays['bad']]}")
            yield len(arrays["id"])

    return read


def torch_reader() -> tuple[Callable[..., Reader] | None, str]:
    """Return a function that makes torch readers, with the arguments of `our_reader` but the first.

    Without torch, None and the reason.
    """
    try:
        import torch
    except ImportError as error:
        return None, f"{error}; pip install 'vadapter[parity]'"
    torch.set_num_threads(1)

    class Files(torch.utils.data.Dataset):
        def __init__(self, files: Sequence[Path], tokenizer: Any, size: int, frames: int):
            self.files, self.tokenizer, self.size, self.frames = files, tokenizer, size, frames

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            path = self.files[index]
            clip = path.suffix.lower() in CLIP_SUFFIXES
            decoded = _pyav(path, self.frames) if clip else [Image.open(path).convert("RGB")]
            pixels = np.stack([_square(image, self.size) for image in decoded])
            ids = self.tokenizer.encode(CAPTION)[:TEXT_LEN]
            return torch.from_numpy(pixels), torch.tensor(ids + [0] * (TEXT_LEN - len(ids)))

    def reader(files: Sequence[Path], tokenizer: Any, size: int, frames: int, batch: int) -> Reader:
        dataset = Files(files, tokenizer, size, frames)
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch)
        return lambda: (len(pixels) for pixels, _ in loader)

    return reader, ""


def _square(image: Image.Image, size: int) -> np.ndarray:
    """Resize the short side to S and crop the center."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(small.crop((left, top, left + size, top + size)))


def _pyav(path: Path, frames: int) -> list[Image.Image]:
    """Return F frames, uniform in number, decoding from the first one."""
    import av

    with av.open(str(path)) as container:
        count = sum(1 for packet in container.demux(video=0) if packet.size)
        indices = [(2 * i + 1) * count // (2 * frames) for i in range(frames)]
        container.seek(0)
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        chosen: dict[int, Image.Image] = {}
        for index, frame in enumerate(container.decode(stream)):
            if index in indices:
                chosen[index] = frame.to_image()
            if index >= indices[-1]:
                break
    last = max(chosen)
    return [chosen.get(index, chosen[last]) for index in indices]


def photos(folder: Path, count: int, shape: tuple[int, int] = (480, 640)) -> list[Path]:
    """Write JPEGs of `shape` (H, W) with the detail of photographs: noise of every scale."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(count):
        random = np.random.default_rng(n)
        pixels = np.full((*shape, 3), 128.0)
        for scale in (2, 8, 32, 128):
            coarse = (3, shape[0] // scale + 2, shape[1] // scale + 2)
            layer = [
                Image.fromarray(channel).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
                for channel in random.normal(0, 8 * scale**0.35, coarse).astype(np.float32)
            ]
            pixels += np.stack([np.asarray(channel) for channel in layer], -1)
        paths.append(folder / f"{n:04d}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def as_text(results: dict[str, Any]) -> str:
    """Return a table, and the number of cores that machines need."""
    rows, needs = [], []
    for name, row in results["kinds"].items():
        keys = ("ours", "torch", "ratio", "fast", "fast_ratio", "difference")
        digits = (1, 1, 2, 1, 2, 2)
        cells = (f"{row[k]:.{n}f}" if k in row else "—" for k, n in zip(keys, digits, strict=True))
        rows.append((name, str(row["files"]), f"{row['kilobytes']:.0f}", *cells))
        cores = (f"{what} ({NEEDS[what]} samples/s) {n:.1f}" for what, n in row["cores"].items())
        needs.append(f"cores for {name}: {'; '.join(cores)}")
    head = ("files", "number", "kB each", "ours", "torch + PIL", "ratio",
            "fast", "ratio", "levels differ by")  # fmt: skip
    about = f"Samples per CPU second on one thread, {results['size']} pixels, median of "
    lines = [f"{about}{results['rounds']} alternating rounds", "", console.table(rows, head), ""]
    lines += needs
    if results["without_torch"]:
        lines.append(f"no torch column: {results['without_torch']}")
    return "\n".join(lines)


def _files(folder: Path, suffixes: frozenset[str], limit: int) -> list[Path]:
    files = sorted(p.resolve() for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise DataError(f"{folder}: no files of type {', '.join(sorted(suffixes))}")
    return files[:limit]


def main(argv: list[str] | None = None) -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser("bench_input", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs (default: noise)")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="clips (default: none)")
    parser.add_argument("--size", type=int, default=224, help="pixels per side (224)")
    parser.add_argument("--limit", type=int, default=64, help="files of each kind (64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            kinds = {
                f"{width} × {height}": photos(Path(folder, str(width)), args.limit, (height, width))
                for width, height in ((640, 480), (1600, 1200))
            }
        else:
            kinds = {"images": _files(args.images, IMAGE_SUFFIXES, args.limit)}
        if args.clips is not None:
            kinds["clips"] = _files(args.clips, CLIP_SUFFIXES, args.limit)
        results = bench(kinds, size=args.size, rounds=args.rounds)
    print(json.dumps(results, indent=1) if args.json else as_text(results), flush=True)


if __name__ == "__main__":
    main()
