"""Reading the tokenizer files of public language models into one JSON form.

The form is that of the `tokenizers` library. The files may be:

  tokenizer.json              the form itself
  vocab.json, merges.txt      GPT-2's byte-level BPE
  tok*.bin                    llama2.c's: pieces of a SentencePiece BPE with their scores
"""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vadapter.errors import DataError

Spec = dict[str, Any]  # JSON of `tokenizers`

_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_MAX_PIECE = 1 << 10


def read_spec(folder: Path) -> Spec:
    """Read the tokenizer of a model's folder from the first of the files above that exists.

    Its keys are `model` (BPE or Unigram), `added_tokens`, `normalizer`, `pre_tokenizer`, `decoder`.

    Raises:
      DataError: no such file, a corrupt one, or a kind of tokenizer that is not supported.
    """
    binaries = sorted(folder.glob("tok*.bin"))
    if (folder / "tokenizer.json").is_file():
        return _parse(folder / "tokenizer.json", _from_json)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _parse(folder / "merges.txt", _from_gpt2)
    if len(binaries) == 1:
        return _parse(binaries[0], _from_llama2c)
    there = ", ".join(sorted(p.name for p in folder.glob("*")))
    raise DataError(
        f"No tokenizer in {folder} (it contains {there or 'nothing'}): expected tokenizer.json, or "
        "vocab.json with merges.txt, or one tok*.bin. A tokenizer.model is converted by\n"
        "  python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('FOLDER')"
        ".save_pretrained('FOLDER')\"\nwherever transformers and sentencepiece are installed."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} without a file; DataError if it is another value."""
    if not path.is_file():
        return {}
    value = _parse(path, lambda p: json.loads(p.read_bytes()))
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object: fetch it again.")
    return value


def _parse(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:  # a corrupt or foreign file may cause any
        raise DataError(
            f"Cannot read the tokenizer file {path} ({type(error).__name__}: {error}): fetch it "
            "again."
        ) from error


def _from_json(path: Path) -> Spec:
    spec = json.loads(path.read_bytes())
    model = spec["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram"):
        raise DataError(f"{path} is a tokenizer of type {kind!r}; supported are BPE and Unigram.")
    kept = ("normalizer", "pre_tokenizer", "decoder")
    added = spec.get("added_tokens") or []
    return {"model": {**model, "type": kind}, "added_tokens": added, **{k: spec[k] for k in kept}}


def _from_gpt2(path: Path) -> Spec:
    folder = path.parent
    config = read_json(folder / "tokenizer_config.json")
    if (kind := config.get("tokenizer_class")) not in _GPT2_CLASSES:
        raise DataError(
            f"vocab.json and merges.txt in {folder} belong to a {kind}, which splits text in "
            "another way than GPT-2; only its tokenizer.json says how: fetch that too."
        )
    vocab = json.loads((folder / "vocab.json").read_bytes())
    lines = path.read_text("utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for left, right in merges:
        if left + right not in vocab:
            raise ValueError(f"{left + right!r} of merges.txt is not in vocab.json")
    extra = read_json(folder / "added_tokens.json")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    prefix = bool(config.get("add_prefix_space"))
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None},
        "added_tokens": [_special_token(i, token) for token, i in extra.items()],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": prefix},
        "decoder": {**byte_level, "add_prefix_space": True},
    }


def _special_token(i: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True, **flags}


def _from_llama2c(path: Path) -> Spec:
    """Read llama2.c's file as merges: the best-scored pair first, the leftmost among equals.

    Source: encode() of run.c, github.com/karpathy/llama2.c, whose pieces have plain spaces.
    """
    data = path.read_bytes()
    pieces, scores, offset = [], [], 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        end = offset + 8 + length
        if not 0 < length <= _MAX_PIECE or end > len(data) or not math.isfinite(score):
            raise ValueError(f"piece {len(pieces)} has {length} bytes and the score {score}")
        pieces.append(data[offset + 8 : end].decode())
        scores.append(score)
        offset = end
    if pieces[3:259] != [f"<0x{byte:02X}>" for byte in range(256)]:  # after <unk>, <s>, </s>
        raise ValueError("pieces 3 to 258 are not the bytes")
    score_of = dict(zip(pieces[259:], scores[259:], strict=True))
    ranked = sorted(
        ((-score_of[piece], piece, cut) for piece in score_of for cut in range(1, len(piece))),
        key=lambda item: item[0],  # a stable sort
    )
    splits = [[piece[:cut], piece[cut:]] for _, piece, cut in ranked]
    merges = [pair for pair in splits if pair[0] in score_of and pair[1] in score_of]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    options = {"unk_token": "<unk>", "byte_fallback": True}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **options},
        "added_tokens": [_special_token(i, pieces[i]) for i in range(3)],
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
