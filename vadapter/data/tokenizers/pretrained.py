"""The tokenizer of a public language model.

Text that looks like a special token ("</s>", "<|endoftext|>", "<image>") is encoded as its
characters, so that no caption or question can inject one. Special tokens are therefore removed from
the vocabulary; only the layout of a row adds their ids. Special are the added tokens that
tokenizer.json marks so, those that the model's other files name, and all of the form <|…|>. Other
added tokens (such as runs of spaces) are ordinary vocabulary and stay.

The ids of BOS, EOS and PAD come from the first of these that has them:

  1. tokenizer_config.json      bos_token, eos_token, pad_token
  2. special_tokens_map.json    the same
  3. generation_config.json     bos_token_id, eos_token_id, pad_token_id
  4. config.json                the same, or else in its text_config

Without a BOS, EOS replaces it: it separated the texts that such a model was trained on. Generation
ends at EOS and at what the original model ends at: the ids that generation_config.json lists, or
config.json where there is no such file. All are `stop_ids`. Id 0 may be an ordinary token.

SentencePiece adds a space before a complete text (its "dummy prefix"), whereas the pieces of a row
(`vadapter.data.prompts`) have their own. So `encode(text)` adds none and is the inverse of
`decode`; `encode(text, start=True)` encodes a complete text like the model's own tokenizer.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from vadapter.data.tokenizers import Tokenizer, clean, until_stop
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.tokenizers.files import Spec, read_json, read_spec
from vadapter.errors import CheckpointError, DataError
from vadapter.io import storage
from vadapter.io.json_files import COMPONENT_FORMAT

_HEADER = {"format": "vadapter-pretrained-tokenizer", "version": 1}
_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
_IDS = ("generation_config.json", "config.json")
_MARKUP = re.compile(r"<\|.*\|>", re.DOTALL)
_UNREACHABLE = ""  # a piece that no text has
_PREFIXING = ("normalizer", "pre_tokenizer", "decoder")


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a public language model, whose embedding has `rows`.

    Rows past `vocab_size` are padding. Batches are padded by their masks, without `pad_id`: the
    model's own, or EOS.
    """

    def __init__(self, dump: bytes):
        """Read the bytes that `save` writes; use `load` instead."""
        record = json.loads(dump)
        self._dump = dump
        self.bos_id, self.eos_id, self.pad_id = (record[f"{k}_id"] for k in ("bos", "eos", "pad"))
        self.stop_ids = tuple(record["stop_ids"])
        self.vocab_size, self.rows = record["vocab_size"], record["rows"]
        spec = record["tokenizer"]
        bare = {**spec, **{key: _without_prefix(spec[key]) for key in _PREFIXING}}
        no_prefix = all(bare[key] == spec[key] for key in _PREFIXING[:2])
        self._piece = _build(bare)
        self._start = self._piece if no_prefix else _build(spec)
        self._text = frozenset(_text_ids(spec))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rows: int = 0):
        """Read a model's folder, or the file that `save` wrote.

        The model's embedding has `rows`; 0: as many as `vocab_size` in the folder's config.json
        says, or else as the tokenizer has ids.

        Raises:
          DataError: no tokenizer, or one that is corrupt, not supported, or without EOS.
          CheckpointError: the tokenizer has more ids than the model has rows.
        """
        path = storage.as_path(path)
        try:
            record = _record(path, rows) if path.is_dir() else read_json(path)
            if any(record.get(k) != v for k, v in _HEADER.items()):
                raise DataError(f"No tokenizer of a public model at {path}: expected {_HEADER}.")
            tokenizer = cls(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"tokenizer {path} is corrupt: {error!r}. Download it again") from error
        if rows and rows < tokenizer.vocab_size:
            raise _too_few_rows(path, tokenizer.vocab_size, rows)
        return tokenizer

    def __reduce__(self):
        return PretrainedTokenizer, (self._dump,)

    def dump(self) -> bytes:
        """Return the tokenizer as JSON."""
        return self._dump

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Return the ids of a text; with `start` like the model's own tokenizer."""
        bpe = self._start if start else self._piece
        return bpe.encode(clean(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` up to the first of `stop_ids`, without other special ids."""
        plain = [i for i in until_stop(ids, self.stop_ids, self.rows) if i in self._text]
        return self._piece.decode(plain, skip_special_tokens=False)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the file that either kind of tokenizer saved, or the tokenizer of a model's folder.

    Raises:
      DataError: no tokenizer, or one that is corrupt or not supported.
      CheckpointError: the tokenizer has more ids than the model has rows.
    """
    path = storage.as_path(path)
    if path.is_dir():
        config = read_json(path / "config.json")
        if config.get("model_type") != COMPONENT_FORMAT:
            return PretrainedTokenizer.load(path)
        return _of_component(path / "tokenizer.json", config)
    public = read_json(path).get("format") == _HEADER["format"]
    return PretrainedTokenizer.load(path) if public else BPETokenizer.load(path)


def _of_component(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of an exported component, whose config.json says what its digest is."""
    tokenizer = load_tokenizer(path)
    if tokenizer.digest != config.get("tokenizer"):
        raise DataError(f"tokenizer {path} is corrupt: its digest is not that of config.json")
    return tokenizer


def _record(folder: Path, rows: int) -> dict[str, Any]:
    """Return the record that `save` writes for a model's folder."""
    spec = read_spec(folder)
    configs = {name: read_json(folder / name) for name in (*_NAMES, *_IDS)}
    config = configs["config.json"]
    if isinstance(inner := config.get("text_config"), dict):
        kept = {k for k, v in config.items() if k.endswith("_token_id") and v is not None}
        config |= {k: v for k, v in inner.items() if v is not None and k not in kept}
    declared = configs["tokenizer_config.json"].get("added_tokens_decoder") or {}
    added = [*spec["added_tokens"], *({**token, "id": int(i)} for i, token in declared.items())]
    ids = dict(_vocab(spec)) | {token["content"]: token["id"] for token in added}
    bos, eos, pad = (_special(kind, configs, ids, folder) for kind in ("bos", "eos", "pad"))
    if ids.get("\n<s>\n") == 1:  # llama2.c, where they are fixed
        bos, eos = bos or [1], eos or [2]
    if not eos:
        raise DataError(
            f"No end token for the tokenizer in {folder}: none of {', '.join(configs)} names "
            "an eos_token or eos_token_id. Add one; without it generation never stops"
        )
    stops = list(dict.fromkeys(eos + _ids_of(configs["generation_config.json"] or config, "eos")))
    bos = bos or eos
    ends = {*bos, *stops}
    token_of = {i: token for token, i in ids.items()}
    controls = {token_of[i] for i in ends if i in token_of} | _controls(added, configs)
    vocab_size = 1 + max(*ids.values(), *ends)
    _remove(controls, spec, ends)
    rows = int(rows or config.get("vocab_size") or vocab_size)
    needed = 1 + max(*_text_ids(spec), *bos, *eos)
    if rows < needed:
        raise _too_few_rows(folder, needed, rows)
    return {
        **_HEADER,
        "bos_id": bos[0],
        "eos_id": eos[0],
        "pad_id": (pad or eos)[0],
        "stop_ids": [i for i in stops if i < rows],
        "vocab_size": min(vocab_size, rows),  # special ids without a row cannot occur
        "rows": rows,
        "tokenizer": spec,
    }


def _too_few_rows(path: Path, needed: int, rows: int) -> CheckpointError:
    return CheckpointError(
        f"tokenizer {path} has {needed} ids, but the model's embedding only {rows} rows (more "
        "would be padding). They belong to different models: take both from one"
    )


def _special(kind: str, configs: dict[str, dict], ids: dict[str, int], folder: Path) -> list[int]:
    """Return the ids of "bos", "eos" or "pad" from the first file that has any."""
    for name in _NAMES:
        token = _content(configs[name].get(f"{kind}_token"))
        if token in ids:
            return [ids[token]]
        if token is not None:
            raise DataError(
                f"{folder / name} names {token!r} as {kind}_token, but the tokenizer next to it "
                "has no such token: download both again, from one model"
            )
    return next(filter(None, (_ids_of(configs[name], kind) for name in _IDS)), [])


def _ids_of(config: dict[str, Any], kind: str) -> list[int]:
    """Return `eos_token_id` or a similar key as a list: none, one or several ids."""
    value = config.get(f"{kind}_token_id")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= -1 for i in values):
        raise ValueError(f"{kind}_token_id is {value!r}")
    return [i for i in values if i >= 0]  # -1 is "none" in some


def _content(token: Any) -> str | None:
    """Return the text of a special token, which a file gives alone or with flags."""
    return token.get("content") if isinstance(token, dict) else token or None


def _controls(added: list[dict], configs: dict[str, dict]) -> set[str]:
    """Return the contents of all special tokens: added ones, and those that other files name."""
    controls = {t["content"] for t in added if t.get("special") or _MARKUP.fullmatch(t["content"])}
    for name in _NAMES:
        for key in ("bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token"):
            controls.add(_content(configs[name].get(key)) or "")
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = configs[name].get(key) or []
            more = more.values() if isinstance(more, dict) else more
            controls |= {_content(token) or "" for token in more}
    return controls - {""}


def _vocab(spec: Spec) -> Iterable[tuple[str, int]]:
    """Return (piece, id) of the vocabulary without added tokens."""
    vocab = spec["model"]["vocab"]
    is_bpe = spec["model"]["type"] == "BPE"
    return vocab.items() if is_bpe else ((piece, i) for i, (piece, _) in enumerate(vocab))


def _text_ids(spec: Spec) -> Iterable[int]:
    """Return the ids that encode text, after `_remove`."""
    return (i for piece, i in _vocab(spec) if piece != _UNREACHABLE)


def _remove(controls: set[str], spec: Spec, ends: set[int]) -> None:
    """Remove special tokens from the vocabulary, in place; all others keep their ids.

    The unknown token stays, as an unreachable piece, unless it is one of the `ends`.
    """
    model = spec["model"]
    kept = [t for t in spec["added_tokens"] if t["content"] not in controls]
    spec["added_tokens"] = kept
    if model["type"] == "BPE":
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in controls}
        unknown = model.get("unk_token")
        if unknown in controls:
            index = model["vocab"].get(unknown)
            model["unk_token"] = None if index is None or index in ends else _UNREACHABLE
            vocab |= {} if model["unk_token"] is None else {_UNREACHABLE: index}
        # The library renumbers added tokens that the vocabulary lacks, so put them into it.
        model["vocab"] = vocab | {t["content"]: t["id"] for t in kept}
        skip = len(model.get("continuing_subword_prefix") or "")
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if controls.isdisjoint((a, b, a + b[skip:]))]
        return
    if model.get("unk_id") in ends:
        raise ValueError("its unknown token ends a text")
    pieces = [[_UNREACHABLE if p in controls else p, score] for p, score in model["vocab"]]
    size = 1 + max([len(pieces) - 1, *(t["id"] for t in kept)])
    highest = max(score for _, score in pieces)
    pieces += [[_UNREACHABLE, highest] for _ in range(size - len(pieces))]
    for token in kept:
        if token["id"] >= len(model["vocab"]):
            pieces[token["id"]][0] = token["content"]
    model["vocab"] = pieces


def _build(spec: Spec) -> tokenizers.Tokenizer:
    unused = dict.fromkeys(("truncation", "padding", "post_processor"))
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **unused, **spec}))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from None
    for token in spec["added_tokens"]:
        if built.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"the added token {token['content']!r} cannot keep its id")
    return built


def _without_prefix(part: Any) -> Any:
    """Return a normalizer, pre-tokenizer or decoder that neither adds nor removes a first space."""
    match part:
        case list():
            return [rest for p in part if (rest := _without_prefix(p)) is not None]
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            kept = {k: part[k] for k in ("type", "replacement", "split") if k in part}
            return {**kept, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**part, "add_prefix_space": False}
        case {"type": "Strip", "content": " "}:
            return {**part, "start": 0}
        case dict():
            return {k: _without_prefix(v) for k, v in part.items()}
    return part
