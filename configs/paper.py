"""The paper's recipe (arXiv 2402.10896, Table 10): batch 2048, 250K steps, 288 px, 8 frames.

    vadapter train --workdir=RUN --config=configs/paper.py:stage=2,encoder=l,llm=1b

Arguments:
    stage     1 (tiny LM as caption decoder) | 2 (as adapter of the frozen LLM)
    adapter   vadapter | resampler (Table 2) | mlp (Table 13)
    front     resampler | pooler | perceiver: between encoder and tiny LM (Table 4)
    init      stage1 | text | random: initialization of the tiny LM in stage 2 (Table 3)
    encoder   b | l | g
    llm       1b | 8b
    batch, steps

configs/quickstart.py explains every key. Frozen and pretrained components are loaded from finished
stages (`--config.stages.S.start.llm=RUN_DIR/STAGE`), data from tar shards in
$VADAPTER_DATA/{pairs,clips}. Paper: 512 TPU v3, about 8 h (stage 1) and 20 h (stage 2), COCO CIDEr
83.0 (B), 89.6 (L), 97.5 (g) with the 1B model. Ours: not run. Planned (`vadapter plan`, the
compiler's estimate, without traffic between chips): stage 1, L on 32 chips v5e 2.9 days; stage 2,
L + 1B on 64 2.4 days, g + 8B on 256 2.5.
"""

from ml_collections import ConfigDict

from vadapter.config import choose, parse_arg

FRONTS = ("resampler", "pooler", "perceiver")


def get_config(arg=None):
    arg = parse_arg(
        arg,
        stage=2,
        adapter="vadapter",
        front="resampler",
        init="stage1",
        encoder="l",
        llm="1b",
        batch=2048,
        steps=250_000,
    )
    arg.encoder, arg.llm = arg.encoder.lower(), arg.llm.lower()
    # What leads from the frozen encoder to the frozen LLM in stage 2.
    chains = dict(
        vadapter=(arg.front, "fc_in", "tlm", "fc_out"),
        resampler=("perceiver", "fc_out"),
        mlp=("mlp",),
    )
    choose("stage", arg.stage, (1, 2))
    choose("adapter", arg.adapter, chains)
    choose("front", arg.front, FRONTS)
    choose("init", arg.init, ("stage1", "text", "random"))

    # Finished stages to start from, RUN_DIR/STAGE: set them on the command line.
    encoder, text, llm = "pretrained/encoder", "pretrained/tlm", "pretrained/llm"
    if arg.stage == 1:
        name = "decoder"
        stage = dict(
            kind="decoder",
            lm="tlm",
            chain=(arg.front, "fc_in"),
            start=dict(encoder=encoder, tlm=text),
        )
    else:
        name = arg.adapter
        starts = dict(
            stage1=dict.fromkeys((arg.front, "fc_in", "tlm"), "stage1/decoder"),
            text=dict(tlm=text),
            random={},
        )
        trained = starts[arg.init] if arg.adapter == "vadapter" else {}
        stage = dict(
            kind="adapter",
            lm="llm",
            chain=chains[arg.adapter],
            start=dict(encoder=encoder, llm=llm) | trained,
        )
    stage |= dict(
        steps=arg.steps,
        batch=arg.batch,
        data=dict(pairs=1.0, clips=1.0),
        optim=dict(lr=5e-4, warmup=1000, schedule="linear", b1=0.9, b2=0.999, weight_decay=1e-4),
        save_every=1000,
        log_every=100,
    )

    def captioned(media, folder):
        source = dict(kind="tars", folder=f"$VADAPTER_DATA/{folder}", split="train")
        return dict(task="caption", text_len=64, media=media, source=source)

    # remat: what the backward pass recomputes instead of keeping it. names: all but the named
    # matrix products. dots: all but matrix products. full: all but the inputs of the blocks. The
    # mlp passes all 2048 visual tokens of a clip to the LLM, which leaves room for nothing more.
    llm_remat = "full" if arg.adapter == "mlp" else "names"
    return ConfigDict(
        dict(
            name="paper",
            seed=0,
            dtype="bfloat16",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=-1,
            tokenizer=dict(vocab_size=256_000, lowercase=False, data=("pairs", "clips")),
            # size: a row of models/registry.SIZES, whose fields can be overridden
            components=dict(
                encoder=dict(size=f"coca_{arg.encoder}"),
                tlm=dict(size="tlm_108m", remat="dots"),
                llm=dict(size=f"llm_{arg.llm}", remat=llm_remat, max_len=4096),
                resampler=dict(size="resampler_x1"),
                perceiver=dict(size="resampler_x6", remat="names"),
                pooler=dict(kind="pooler", queries=256, width=768, heads=12),
                mlp=dict(kind="mlp", hidden_dim=2048, width=0, frames=8),
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(pairs=captioned("image", "pairs"), clips=captioned("clip", "clips")),
            chain=(name,),
            stages={name: stage},
        )
    )
