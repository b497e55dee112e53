"""Public models and your own captioned pictures: both stages, and the perceiver as baseline.

    vadapter check --config=configs/public.py:encoder=E,tlm=T,llm=L,data=FOLDER
    vadapter train --config=configs/public.py:encoder=E,tlm=T,llm=L,data=FOLDER --workdir=RUN

Arguments:
    encoder, tlm, llm   hub ids or folders
    data                folder of tar shards `train-*.tar` and `val-*.tar`
    batch, steps        of each stage; stage 1 and 2 read batch · steps pictures each
    int8                the LLM's weights in int8, half of bfloat16's memory

The defaults (CLIP-L, SmolLM2-135M, SmolLM2-1.7B) want one accelerator of 24 GB or more. Not run.
"""

from ml_collections import ConfigDict

from vadapter.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg, encoder="openai/clip-vit-large-patch14", tlm="HuggingFaceTB/SmolLM2-135M",
        llm="HuggingFaceTB/SmolLM2-1.7B", data="$VADAPTER_DATA/pairs", batch=64, steps=10_000,
        int8=False,
    )  # fmt: skip
    caption = dict(task="caption", text_len=64)
    tars = lambda split: dict(kind="tars", folder=arg.data, split=split)
    see = dict(
        batch=arg.batch, steps=arg.steps, data=dict(train=1.0), loss=("val",), evals=("val",),
        eval_every=max(1, arg.steps // 10), eval_limit=500, save_every=500, log_every=20,
        optim=dict(
            lr=5e-4, warmup=min(500, arg.steps // 10), schedule="cosine", clip=1.0,
            weight_decay=1e-4,
        ),
    )  # fmt: skip
    aligned = dict(resampler="decoder", fc_in="decoder", tlm="decoder")
    resampler = dict(kind="resampler", queries=64, query_dim=768, hidden_dim=768, heads=12)
    return ConfigDict(
        dict(
            name="public",
            seed=0,
            dtype="bfloat16",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=8,
            components=dict(
                encoder=dict(weights=arg.encoder),
                tlm=dict(weights=arg.tlm),
                llm={"weights": arg.llm, **({"int8": True} if arg.int8 else {})},
                resampler={**resampler, "layers": 1},
                perceiver={**resampler, "layers": 6},
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(
                train={**caption, "source": tars("train"), "flip": True},
                val={**caption, "source": tars("val")},
            ),
            evals=dict(val=dict(data="val", max_new=32, batch=arg.batch)),
            chain=("decoder", "vadapter", "perceiver"),
            stages=dict(
                decoder=dict(kind="decoder", lm="tlm", chain=("resampler", "fc_in"), **see),
                vadapter=dict(
                    kind="adapter", lm="llm", chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=aligned, **see,
                ),
                perceiver=dict(kind="adapter", lm="llm", chain=("perceiver", "fc_out"), **see),
            ),
        )
    )  # fmt: skip
