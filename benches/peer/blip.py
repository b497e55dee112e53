"""Caption an image with a BLIP of the sizes of configs/quickstart.py, as a user would.

`python -m benches.peer.blip FOLDER IMAGE`; `make` writes the folder.
"""

import sys
from pathlib import Path

from benches.peer.originals import transformers

# As many layers and widths as the quickstart's ViT and LLM.
TEXT = {
    "vocab_size": 512, "hidden_size": 128, "encoder_hidden_size": 96, "intermediate_size": 384,
    "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 64,
    "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 64, "patch_size": 8, "projection_dim": 64,
}  # fmt: skip


def make(folder: Path) -> None:
    """Write a checkpoint with random weights."""
    library = transformers()
    config = library.BlipConfig(text_config=TEXT, vision_config=VISION, projection_dim=64)
    library.BlipForConditionalGeneration(config).save_pretrained(folder)
    library.BlipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def main(folder: str, image: str) -> None:
    """Print the tokens of a caption of at most 32 tokens."""
    library = transformers()
    import torch
    from PIL import Image

    model = library.BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = library.BlipImageProcessorPil.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt")
        print(model.generate(**pixels, max_new_tokens=32, do_sample=False).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
