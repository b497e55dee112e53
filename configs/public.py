"""Public models and your own captioned images: both stages, and the perceiver as baseline.

    vadapter check --config=configs/public.py:encoder=E,tlm=T,llm=L,data=FOLDER
    vadapter train --config=configs/public.py:encoder=E,tlm=T,llm=L,data=FOLDER --workdir=RUN

Arguments:
    rung                laptop | gpu | v5e-8 | v5e-64 | v5p-128: a row of RUNGS, from a trial run to
                        the paper's size; schedules are proportional to its samples
    encoder, tlm, llm   hub ids or folders, instead of the rung's
    data                folder of tar shards `train-*.tar` and `val-*.tar`
    batch, samples      of each stage, instead of the rung's
    steps               of each stage, instead of samples / batch
    int8, int4          the LLM's weights in int8, half of bfloat16's memory, or in int4 by groups
                        of 64 inputs, 0.28 of it, which costs accuracy

Stage 2, planned (`vadapter plan`): memory per device; time of the whole stage, from the compiler's
estimate to 40 % of the peak. laptop 2.8 GB; gpu (H100) 22 GB, 0.5 h; v5e-8 11.7 GB, 2.6-3.3 h;
v5e-64 11.7 GB, 3.3-4.1 h; v5p-128 32 GB, 33-50 h. Stage 1 takes less. Not run.

Unlike configs/paper.py: images only, 64 queries instead of 256, a cosine instead of a linear
schedule, gradients clipped at norm 1, a warm-up of 4 % of the steps. configs/quickstart.py explains
every key.
"""

from typing import Any

from ml_collections import ConfigDict

from vadapter.config import choose, parse_arg

CLIP_B, CLIP_L = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
SIGLIP, COCA = "google/siglip-large-patch16-256", "laion/CoCa-ViT-L-14-laion2B-s13B-b90k"
TINY, SMALL = "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-1.7B"
GEMMA, LLAMA = "google/gemma-2-2b", "meta-llama/Meta-Llama-3-8B"
# In all of them the weights are replicated on each chip, so that none are communicated.
RUNGS: dict[str, dict[str, Any]] = {
    "laptop": dict(encoder=CLIP_B, llm=TINY, batch=8, samples=1_600, workers=0),
    "gpu": dict(encoder=CLIP_L, llm=SMALL, batch=64, samples=640_000, workers=-1),
    "v5e-8": dict(encoder=SIGLIP, llm=GEMMA, batch=128, samples=5_120_000, workers=-1),
    "v5e-64": dict(encoder=COCA, llm=GEMMA, batch=1024, samples=51_200_000, workers=-1),
    "v5p-128": dict(encoder=COCA, llm=LLAMA, batch=2048, samples=512_000_000, workers=-1),
}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        rung="gpu",
        encoder="",
        tlm=TINY,
        llm="",
        data="$VADAPTER_DATA/pairs",
        batch=0,
        samples=0,
        steps=0,
        int8=False,
        int4=False,
    )
    choose("rung", arg.rung, RUNGS)
    rung = RUNGS[arg.rung]
    batch = arg.batch or rung["batch"]
    steps = arg.steps or max(2, (arg.samples or rung["samples"]) // batch)

    def captioned(split, **options):
        source = dict(kind="tars", folder=arg.data, split=split)
        return dict(task="caption", text_len=64, source=source, **options)

    llm = dict(weights=arg.llm or rung["llm"], remat="names")
    if arg.int8:
        llm["int8"] = True
    if arg.int4:
        llm |= dict(int4=True, scale_group=64)
    resampler = dict(kind="resampler", queries=64, query_dim=768, hidden_dim=768, heads=12)
    training = dict(
        batch=batch,
        steps=steps,
        data=dict(train=1.0),
        loss=("val",),
        evals=("val",),
        eval_every=max(1, steps // 10),
        eval_limit=500,
        save_every=max(1, min(1000, steps // 20)),
        log_every=20,
        optim=dict(
            lr=5e-4, warmup=max(1, steps // 25), schedule="cosine", clip=1.0, weight_decay=1e-4
        ),
    )
    return ConfigDict(
        dict(
            name="public",
            seed=0,
            dtype="bfloat16",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=rung["workers"],
            # weights: kind, sizes and image preprocessing are read from the checkpoint, and the
            # language model's tokenizer is the checkpoint's
            components=dict(
                encoder=dict(weights=arg.encoder or rung["encoder"]),
                tlm=dict(weights=arg.tlm, remat="dots"),
                llm=llm,
                resampler={**resampler, "layers": 1},
                perceiver={**resampler, "layers": 6, "remat": "names"},
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(train=captioned("train", flip=True), val=captioned("val")),
            evals=dict(val=dict(data="val", max_new=32, batch=batch)),
            chain=("decoder", "vadapter", "perceiver"),
            stages=dict(
                decoder=dict(kind="decoder", lm="tlm", chain=("resampler", "fc_in"), **training),
                vadapter=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=dict(resampler="decoder", fc_in="decoder", tlm="decoder"),
                    **training,
                ),
                perceiver=dict(kind="adapter", lm="llm", chain=("perceiver", "fc_out"), **training),
            ),
        )
    )
