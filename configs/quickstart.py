"""The whole method on embedded scenes, with nothing to download: two CPU cores, minutes.

    vadapter quickstart

Pretrains a tiny LM, a larger LM and a small ViT (CoCa), aligns the tiny LM as a caption decoder
(stage 1), then trains it as the adapter of the frozen larger LM (stage 2) beside the
perceiver-resampler baseline on the same batches in the same order. Run 2026-11-27: 3 minutes.
"""

from ml_collections import ConfigDict

from vadapter.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, scale=1.0, queries=8)
    steps = lambda n: max(2, int(n * arg.scale))

    scenes = lambda media, split, count: dict(
        kind="scenes", media=media, split=split, size=64, count=count, seed=0
    )
    # In front of a held-out caption, as text: nothing, other captions of the scene, its keywords.
    written = lambda form: dict(
        task="document", text_len=96, last_only=True,
        source={**scenes("text", "test", 400), "form": form},
    )  # fmt: skip
    caption = dict(task="caption", text_len=64, target_len=60, texts=3, cache=True)
    question = dict(task="question", text_len=44, target_len=12, texts=2, cache=True)
    lm = dict(kind="lm", vocab_size=0, kv_heads=1, head_dim=32, max_len=256)
    resampler = dict(kind="resampler", queries=arg.queries, query_dim=96, hidden_dim=96, heads=3)
    optim = lambda lr, warmup=20: dict(lr=lr, warmup=steps(warmup) - 1, clip=1.0, weight_decay=1e-2)
    every = dict(save_every=steps(100), log_every=20)
    see = dict(
        encoder="encoder", batch=24, data=dict(images=2.0, clips=1.0),
        loss=("held_images",), loss_batches=4, evals=("captions", "clips", "answers"),
        eval_every=steps(40), eval_limit=64, **every,
    )  # fmt: skip
    return ConfigDict(
        dict(
            name="quickstart",
            seed=0,
            dtype="float32",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=0,
            tokenizer=dict(vocab_size=512, lowercase=True, data=("documents",), texts=20_000),
            components=dict(
                encoder=dict(
                    kind="vit", image_size=64, patch=8, width=96, depth=3, heads=3, mlp_dim=256
                ),
                pooler=dict(kind="pooler", queries=9, width=96, heads=3),
                text={**lm, "width": 96, "depth": 1, "heads": 3, "mlp_dim": 256},
                fusion=dict(
                    kind="fusion", depth=1, width=96, heads=3, mlp_dim=256, embed_dim=64
                ),
                tlm={**lm, "width": 96, "depth": 3, "heads": 3, "mlp_dim": 256},
                llm={**lm, "width": 128, "depth": 4, "heads": 4, "mlp_dim": 384},
                resampler={**resampler, "layers": 1},
                perceiver={**resampler, "layers": 6},
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(
                documents=dict(
                    task="document", text_len=96, source=scenes("text", "train", 6_000)
                ),
                plain=written("plain"),
                siblings=written("siblings"),
                keywords=written("keywords"),
                pairs=dict(
                    task="caption",
                    text_len=32,
                    target_len=30,
                    source=scenes("image", "train", 8_000),
                ),
                images={**caption, "media": "image", "source": scenes("image", "train", 8_000)},
                clips={**caption, "media": "clip", "source": scenes("clip", "train", 1_500)},
                held_images={**caption, "source": scenes("image", "test", 200)},
                held_clips={**caption, "source": scenes("clip", "test", 64)},
                questions={**question, "source": scenes("image", "test", 100)},
            ),
            evals=dict(
                captions=dict(data="held_images", max_new=28, batch=64, limit=0),
                clips=dict(data="held_clips", max_new=28, batch=64, limit=0),
                answers=dict(data="questions", max_new=6, batch=128, limit=0),
            ),
            chain=("tlm", "llm", "vision", "decoder", "perceiver", "vadapter"),
            stages=dict(
                tlm=dict(
                    kind="lm", lm="tlm", steps=steps(120), batch=16, data=dict(documents=1.0),
                    optim=optim(3e-3), **every,
                ),
                llm=dict(
                    kind="lm", lm="llm", steps=steps(240), batch=16, data=dict(documents=1.0),
                    optim=optim(3e-3), loss=("plain", "siblings", "keywords"), loss_batches=4,
                    **every,
                ),
                vision=dict(
                    kind="vision", steps=steps(320), batch=32, data=dict(pairs=1.0),
                    optim=optim(2e-3), **every,
                ),
                decoder=dict(
                    kind="decoder", lm="tlm", chain=("resampler", "fc_in"), steps=steps(100),
                    start=dict(encoder="vision", tlm="tlm"), optim=optim(2e-3), **see,
                ),
                vadapter=dict(
                    kind="adapter", lm="llm", chain=("resampler", "fc_in", "tlm", "fc_out"),
                    steps=steps(120), optim=optim(2e-3), **see,
                    start=dict(
                        encoder="vision", resampler="decoder", fc_in="decoder", tlm="decoder",
                        llm="llm",
                    ),
                ),
                perceiver=dict(
                    kind="adapter", lm="llm", chain=("perceiver", "fc_out"), steps=steps(120),
                    start=dict(encoder="vision", llm="llm"), optim=optim(2e-3), **see,
                ),
            ),
        )
    )  # fmt: skip
