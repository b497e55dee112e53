"""Tokenizers beside vision-language checkpoints: ids, media tokens and ends are the original's."""

import json

import pytest
from support.original import their_warnings
from support.public_tokenizers import STYLES

from vadapter.data.tokenizers.pretrained import PretrainedTokenizer

TEXTS = ("A dog runs on the grass .", "The dogs run, don't they?\n\nIn 2024", " two  men")
# kind: (style of its tokenizer, tokens that are added behind its vocabulary, its end token or that
# of the style, further ends of generation_config.json, rows of the embedding beyond the ids, where
# config.json says the number of rows)
KINDS = {
    "paligemma": ("gemma", ["<image>", *(f"<loc{i:04}>" for i in range(4)), "<seg000>"], "", [],
                  64, "text_config"),
    "gemma3": ("gemma", ["<start_of_turn>", "<end_of_turn>", "<start_of_image>"], "",
               ["<end_of_turn>"], 64, "text_config"),
    "llava": ("llama2", ["<image>", "<pad>"], "", [], 62, "text_config"),
    "llava_onevision": ("neox", ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], "<|im_end|>",
                        ["<|endoftext|>"], 32, "text_config"),
    "smolvlm": ("neox", ["<end_of_utterance>", "<fake_token_around_image>", "<image>"],
                "<end_of_utterance>", [], 0, "text_config"),
    "idefics3": ("llama3", ["<end_of_utterance>", "<fake_token_around_image>", "<image>"],
                 "<end_of_utterance>", ["<|eot_id|>"], 5, "text_config"),
    "qwen2_5_vl": ("neox", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"],
                   "<|im_end|>", ["<|endoftext|>"], 266, ""),
    "qwen3_vl": ("neox", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"],
                 "<|im_end|>", ["<|endoftext|>"], 266, "text_config"),
}  # fmt: skip


@pytest.fixture
def folder(request, tmp_path, originals):
    """(kind, folder of its tokenizer as transformers saves it, the original's tokenizer)."""
    _, transformers = originals
    kind = request.param
    style, added, end, more, padding, group = KINDS[kind]
    made = STYLES[style](tmp_path / "style")
    if style == "llama3":  # an older form of the file, which they do not read
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        (made / "tokenizer_config.json").write_text(json.dumps(names))
    with their_warnings():
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(made)
        theirs.add_special_tokens({"additional_special_tokens": added})
        if end:
            theirs.eos_token = end
        new = tmp_path / kind
        theirs.save_pretrained(new)
    rows = {"vocab_size": len(theirs) + padding}
    whole = {"model_type": kind, "vision_config": {}, **({group: rows} if group else rows)}
    (new / "config.json").write_text(json.dumps(whole))
    ends = theirs.convert_tokens_to_ids([theirs.eos_token, *more])
    generation = {"eos_token_id": ends if more else ends[0]}
    (new / "generation_config.json").write_text(json.dumps(generation))
    return kind, new, theirs


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_texts_have_the_originals_ids_and_media_tokens_cannot_be_written(folder):
    kind, new, theirs = folder
    ours = PretrainedTokenizer.load(new)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, start=True) == expected
        assert ours.decode(ours.encode(text)) == text
    media = theirs.convert_tokens_to_ids(KINDS[kind][1])
    for token, i in zip(KINDS[kind][1], media, strict=True):
        ids = ours.encode(f"a {token} b")
        assert i not in ids
        assert ours.decode(ids) == f"a {token} b"
    assert ours.rows == len(theirs) + KINDS[kind][4]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_generation_ends_where_the_originals_does(folder, originals):
    _, new, theirs = folder
    _, transformers = originals
    ours = PretrainedTokenizer.load(new)
    ends = transformers.GenerationConfig.from_pretrained(new).eos_token_id
    assert ours.eos_id == theirs.eos_token_id
    assert set(ours.stop_ids) == {*(ends if isinstance(ends, list) else [ends])}
    for stop in ours.stop_ids:
        ids = [*ours.encode("the dog"), stop, *ours.encode(" runs")]
        assert ours.decode(ids) == "the dog"
