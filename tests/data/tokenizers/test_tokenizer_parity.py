"""Tokenizers of public models against transformers: the same ids, texts and special ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.odd_text import ODD, SPECIALS
from support.original import imported, their_warnings
from support.public_tokenizers import (
    BYTES,
    MADE_BY_TEXT,
    STYLES,
    byte_level,
    llama3,
    sentence_pieces,
    write,
)

from vadapter.data.tokenizers.pretrained import PretrainedTokenizer

COUNT = 300  # of texts drawn, beside the odd ones


@pytest.fixture(scope="module")
def transformers():
    library = imported("transformers")
    library.utils.logging.set_verbosity_error()
    return library


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Odd texts, and pieces of them joined."""
    rng, parts = (
        np.random.default_rng(0),
        [*ODD, *SPECIALS, *"abc .,!?\n\u0301", " dog", "the", "▁"],
    )
    drawn = ["".join(rng.choice(parts, rng.integers(1, 6))) for _ in range(COUNT)]
    return [*ODD, *SPECIALS, *drawn]


# -- files as they are found ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=STYLES)
def found(request, tmp_path_factory, transformers):
    """(style, its folder, transformers' tokenizer of it)"""
    folder = STYLES[request.param](tmp_path_factory.mktemp("found") / request.param)
    with their_warnings():
        if request.param == "gpt2":  # without a tokenizer.json
            theirs = transformers.GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)
        else:
            theirs = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True
            )
    return request.param, folder, theirs


def specials(folder: Path) -> dict[str, int]:
    if not (folder / "tokenizer.json").exists():
        return {"<|endoftext|>": json.loads((folder / "config.json").read_text())["eos_token_id"]}
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in tokens if token["special"]}


def compare_ids(ours, theirs, texts, never: set[int]) -> None:
    for text in texts:
        ids = ours.encode(text, start=True)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert never.isdisjoint(ids), text


def test_ids_are_those_of_transformers_with_specials_read_as_text(found, texts):
    style, folder, theirs = found
    never = specials(folder)
    if style in MADE_BY_TEXT:  # these names are pieces of theirs, even where they are not read so
        texts = [text for text in texts if not any(name in text for name in never)]
    assert len(texts) > 200
    compare_ids(PretrainedTokenizer.load(folder), theirs, texts, set(never.values()))


# What decoding takes from the front, where encoding has put a space: from ours, and from both.
def _one(text: str) -> str:
    return text.removeprefix(" ")


def _all(text: str) -> str:
    return text.lstrip(" ")  # theirs takes as many as the first token has


FRONT = {"llama2": (_one, str), "unigram": (_all, _all)}


def test_decoded_texts_are_those_of_transformers(found, texts):
    style, folder, theirs = found
    ours, (front, theirs_front) = PretrainedTokenizer.load(folder), FRONT.get(style, (str, str))
    for text in texts:
        ids = ours.encode(text, start=True)
        want = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert front(ours.decode(ids)) == theirs_front(want), text


# -- files as the models' own classes write them -------------------------------------------------


def byte_pairs(*first: str) -> dict:
    model = byte_level()["model"]
    vocab = dict(zip(first, range(len(first)), strict=True))
    vocab |= {piece: len(first) + i for piece, i in model["vocab"].items()}
    return {"vocab": vocab, "merges": [tuple(m) for m in model["merges"]]}


def pieces(*first: str) -> dict:
    vocab, merges = sentence_pieces([*first, *BYTES])
    return {"vocab": vocab, "merges": [tuple(m) for m in merges]}


LLAMA = ("<unk>", "<s>", "</s>")
# name: (class, its vocabulary and merges, options)
CLASSES = {
    "Llama": ("LlamaTokenizer", lambda: pieces(*LLAMA), {}),
    "Llama, without a prefix": (
        "LlamaTokenizer", lambda: pieces(*LLAMA), {"add_prefix_space": False}),
    "Gemma": ("GemmaTokenizer", lambda: pieces("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), {}),
    "Qwen2": ("Qwen2Tokenizer", lambda: byte_pairs("<|endoftext|>"), {}),
    "GPT-2": ("GPT2Tokenizer", lambda: byte_pairs("<|endoftext|>"), {}),
    "GPT-NeoX": ("GPTNeoXTokenizer", lambda: byte_pairs("<|endoftext|>", "<|padding|>"), {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CLASSES)
def written(request, tmp_path_factory, transformers):
    """(folder, transformers' tokenizer of it)"""
    name, model, options = CLASSES[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    kind, folder = getattr(transformers, name), tmp_path_factory.mktemp("written")
    with their_warnings():
        kind(**model(), **options).save_pretrained(folder)
        return folder, kind.from_pretrained(folder, split_special_tokens=True)


def test_files_written_by_a_models_own_class_are_read_alike(written, texts):
    folder, theirs = written
    ours = PretrainedTokenizer.load(folder)
    compare_ids(ours, theirs, texts, set(theirs.all_special_ids))
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == (ours.eos_id if theirs.bos_token_id is None else theirs.bos_token_id)
    assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_a_batch_is_padded_with_the_same_id(written):
    folder, theirs = written
    ours, rows = PretrainedTokenizer.load(folder), ["a dog", "the dogs run on the grass", ""]
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token  # as their users do
    with their_warnings():
        want = theirs(rows, padding=True, padding_side="right", add_special_tokens=False)
    ids = [ours.encode(text, start=True) for text in rows]
    width = max(map(len, ids))
    assert want["input_ids"] == [row + [ours.pad_id] * (width - len(row)) for row in ids]
    assert want["attention_mask"] == [[1] * len(row) + [0] * (width - len(row)) for row in ids]


# -- special ids ---------------------------------------------------------------------------------

NO_NAMES = {"tokenizer_config": {}, "special_tokens_map": {}}
# What config.json and generation_config.json say of ids, without names elsewhere.
IDS = {
    "config.json alone": ({"bos_token_id": 286, "eos_token_id": 287}, None),
    "several ends": ({"bos_token_id": 286, "eos_token_id": [288, 287]}, None),
    "generation_config.json first": (
        {"bos_token_id": 286, "eos_token_id": 287, "pad_token_id": 289},
        {"bos_token_id": 286, "eos_token_id": [288, 287], "pad_token_id": 289}),
    "no start": ({"eos_token_id": 287, "pad_token_id": 0}, None),
    "the whole model's before its text model's": (
        {"bos_token_id": 286, "eos_token_id": [287, 288],
         "text_config": {"eos_token_id": 289, "bos_token_id": 286}}, None),
    "the text model's alone": ({"text_config": {"eos_token_id": [287, 288]}}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", IDS)
def test_ids_of_the_config_files_are_those_that_transformers_would_generate_with(
    case, tmp_path, transformers
):
    config, generation = IDS[case]
    folder = llama3(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    files = {"config": {"model_type": "llama", "vocab_size": 290, **config}}
    files |= {"generation_config": generation} if generation else {}
    write(folder, **files, **NO_NAMES)
    with their_warnings():
        if generation:
            theirs = transformers.GenerationConfig.from_pretrained(folder)
        else:
            theirs = transformers.GenerationConfig.from_model_config(dict(files["config"]))
    ours, ends = PretrainedTokenizer.load(folder), theirs.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert ours.stop_ids == tuple(ends)
    assert ours.eos_id == ends[0]
    assert ours.bos_id == (config.get("bos_token_id") or ends[0])
    if "bos_token_id" in config:
        assert ours.bos_id == theirs.bos_token_id
    # A name elsewhere is EOS; generation still ends where the original's does.
    write(folder, tokenizer_config={"eos_token": "<|reserved_0|>"})
    named = PretrainedTokenizer.load(folder)
    assert {*named.stop_ids} == {named.eos_id, *ends}
    assert ours.pad_id == (ends[0] if theirs.pad_token_id is None else theirs.pad_token_id)
