"""Small tokenizers in the styles of public models, each in a folder with its config files."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = ["A dog runs on the grass .", "The dogs run , don't they ?", "Two  men\n\nin 2024"] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(i: int, content: str, flag: bool = True) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not flag}
    return {"id": i, "content": content, "special": flag, **flags}


def write(folder: Path, tokenizer: dict | None = None, **files) -> Path:
    """A model's folder: tokenizer.json, and other JSON files by their name."""
    folder.mkdir(exist_ok=True)
    named = {"tokenizer": tokenizer} if tokenizer else {}
    for name, value in (named | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder


def byte_level(pre_tokenizer=None) -> dict:
    """A trained byte-level BPE, as JSON."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    )
    return json.loads(bpe.to_str())


def sentence_pieces(first: list[str]) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a BPE over text whose spaces are "▁", behind the tokens given."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    pieces = [*first, *(piece for piece in model["vocab"] if piece not in first)]
    merges = [m for m in model["merges"] if m[0] + m[1] not in first]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def neox(folder: Path) -> Path:
    """Id 0 is both BOS and EOS; runs of spaces are added tokens that are no specials."""
    spec = byte_level()
    old = spec["model"]["vocab"]
    spec["model"]["vocab"] = {"<|endoftext|>": 0} | {piece: i + 1 for piece, i in old.items()}
    n = len(old) + 1
    spec["added_tokens"] = [special(0, "<|endoftext|>")]
    spec["added_tokens"] += [special(n + k, " " * (4 - k), False) for k in range(3)]
    name = "<|endoftext|>"
    return write(
        folder, spec, tokenizer_config={"bos_token": name, "eos_token": name, "unk_token": name},
        config={"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0},
    )  # fmt: skip


def gpt2(folder: Path) -> Path:
    """vocab.json and merges.txt alone."""
    model = byte_level()["model"]
    folder.mkdir()
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    end = len(vocab) - 1
    return write(
        folder, config={"vocab_size": len(vocab), "bos_token_id": end, "eos_token_id": end}
    )


def llama3(folder: Path) -> Path:
    """Words of the vocabulary need no merges; the specials come last, some past the ends."""
    split = pre_tokenizers.Split(
        tokenizers.Regex(
            r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+|[^\s]+"
        ),
        "isolated",
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spec = byte_level(pre_tokenizers.Sequence([split, bytes_]))
    spec["model"]["ignore_merges"] = True
    n = len(spec["model"]["vocab"])
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_0|>"]
    spec["added_tokens"] = [special(n + k, name) for k, name in enumerate(names)]
    return write(
        folder, spec,
        tokenizer_config={"bos_token": {"content": names[0]}, "eos_token": names[1]},
        generation_config={"bos_token_id": n, "eos_token_id": [n + 1, n + 2]},
        config={"vocab_size": n + 4},
    )  # fmt: skip


def llama2(folder: Path) -> Path:
    """SentencePiece BPE with bytes and a prefix; its merges would make "</s>" out of text."""
    vocab, merges = sentence_pieces(
        ["<unk>", "<s>", "</s>", *BYTES, "</", "s>", "<", "/", "s", ">"]
    )
    merges += [["<", "/"], ["s", ">"], ["</", "s>"], ["<", "s>"]]
    spec = {
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": None,
        "added_tokens": [special(i, name) for i, name in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocab, "merges": [" ".join(pair) for pair in merges],
        },
    }  # fmt: skip
    return write(
        folder, spec, special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        config={"vocab_size": len(vocab) + 7},
    )  # fmt: skip


def gemma(folder: Path) -> Path:
    """No prefix; lines and tags are vocabulary; one special has no row in the model."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<table>", "\n\n", "▁▁"]
    vocab, merges = sentence_pieces([*names, *BYTES])
    n = len(vocab)
    spec = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    spec["model"] |= {"vocab": vocab, "merges": merges, "unk_token": "<unk>"}
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
    spec["added_tokens"] = [special(i, name, i < 4) for i, name in enumerate(names)]
    spec["added_tokens"] += [special(n, "<image_soft_token>")]
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
        "invert": False,
    }  # fmt: skip
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return write(
        folder, spec,
        tokenizer_config={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        config={"text_config": {"vocab_size": n}, "vocab_size": None},
    )  # fmt: skip


def unigram(folder: Path) -> Path:
    """SentencePiece unigram with bytes, and a prefix by "▁" before the first word."""
    chars = sorted({c for text in TEXTS for c in text.replace(" ", "▁")} | set("</s>"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((b, -20.0) for b in BYTES)]
    pieces += [(c, -6.0) for c in chars]
    pieces += [
        ("▁the", -2.0),
        ("▁dog", -2.5),
        ("▁▁", -3.0),
        ("run", -3.0),
        ("ru", -2.9),
        ("un", -4),
    ]
    bpe = tokenizers.Tokenizer(models.Unigram(pieces, 0, True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    return write(
        folder, json.loads(bpe.to_str()),
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
        config={"vocab_size": len(pieces) + 1},
    )  # fmt: skip


STYLES = {f.__name__: f for f in (neox, gpt2, llama3, llama2, gemma, unigram)}
MADE_BY_TEXT = ("llama2", "unigram")  # of these the library itself gives "</s>" for the text
