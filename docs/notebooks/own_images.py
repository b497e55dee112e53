# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From installation to captions of your own images
#
# This notebook installs vadapter, trains the whole method on generated images (a few minutes on
# two CPU cores), exports the adapter and captions images of your own. Run it as a script, or
# convert it with `pip install jupytext && jupytext --to ipynb own_images.py`. It uses the run in
# the environment variable NOTEBOOK_RUN, by default `runs/quickstart` in the current directory.

# %%
import os
import subprocess
import sys
from pathlib import Path

try:
    import vadapter
except ImportError:  # from a checkout: the repository's root is two folders up
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "../.."], check=True)
    import vadapter

print("vadapter", vadapter.__version__)

# %% [markdown]
# ## Train
#
# `vadapter quickstart` starts from a small vision encoder and two language models of the package,
# aligns the tiny LM in two stages and trains the perceiver-resampler baseline. Stop it at any time:
# the same command resumes, and finished stages are skipped.

# %%
RUN = os.environ.get("NOTEBOOK_RUN", "runs/quickstart")
OPTIONS = os.environ.get(
    "NOTEBOOK_OPTIONS", ""
).split()  # such as --config.stages.vadapter.steps=100


def run(*command):
    """Run a command line of vadapter and print its last lines."""
    words = [sys.executable, "-m", "vadapter", *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    print("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    done.check_returncode()


run("quickstart", f"--workdir={RUN}", *OPTIONS)

# %% [markdown]
# ## Export
#
# The trained components, the tokenizer and a model card, as one folder to use or to share.

# %%
run("export", RUN, "my-adapter", "--stage=vadapter")

# %% [markdown]
# ## Your own images
#
# Put images into the folder `my-images`. The quickstart's model has only seen colored shapes on
# plain backgrounds; two such images are drawn here if the folder is empty.

# %%
from PIL import Image, ImageDraw

folder = Path("my-images")
folder.mkdir(exist_ok=True)
if not any(folder.iterdir()):
    for name, color in (("circle", "red"), ("square", "blue")):
        image = Image.new("RGB", (128, 128), (235, 235, 235))
        pen = ImageDraw.Draw(image)
        draw = pen.ellipse if name == "circle" else pen.rectangle
        draw((24, 24, 72, 72), fill=color)
        image.save(folder / f"{color}-{name}.png")
files = sorted(folder.iterdir())
print(*files, sep="\n")

# %% [markdown]
# ## Captions and answers

# %%
from vadapter import VAdapter

model = VAdapter.from_pretrained("my-adapter")
captions = model.caption(files)
for file, caption in zip(files, captions, strict=True):
    print(f"{file.name}: {caption}")

# %%
for file, answer in zip(files, model.ask(files, "What color is it?"), strict=True):
    print(f"{file.name}: {answer}")

# %%
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, len(files), figsize=(3 * len(files), 3), squeeze=False)
for axes, file, caption in zip(panels[0], files, captions, strict=True):
    axes.imshow(Image.open(file))
    axes.set_title(caption, fontsize=8, wrap=True)
    axes.set_axis_off()
plt.show()

# %% [markdown]
# ## Next
#
# Real images want a real encoder and LLM: `configs/public.py` joins public models over your own
# captioned images. Check first, then train:
#
# ```bash
# MODELS=encoder=openai/clip-vit-base-patch32,llm=HuggingFaceTB/SmolLM2-360M
# vadapter check --config=configs/public.py:$MODELS,data=/data/pairs
# vadapter train --config=configs/public.py:$MODELS,data=/data/pairs --workdir=runs/mine
# ```
