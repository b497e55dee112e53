"""Flickr8k on two CPU cores: text-pretrained LMs, frozen MobileNetV2, stage 1, stage 2, baseline.

    export VADAPTER_DATA=/path/to/data
    vadapter train --config=configs/flickr8k.py --workdir=runs/flickr8k

The stages are those of configs/quickstart.py, which explains every key, without `vision`: the
encoder is a public MobileNetV2. Run 2026-11-25: 4 hours on one busy core. CIDEr on the test split:
stage 1 40.0, stage 2 36.6, perceiver 37.9 (BUILD_NOTES, "Flickr8k").
"""

from ml_collections import ConfigDict

from vadapter.config import parse_arg

TEXT = "$VADAPTER_DATA/text/"
PHOTOS = "$VADAPTER_DATA/flickr8k"


def get_config(arg=None):
    arg = parse_arg(arg, image_size=224, queries=16, scale=1.0)

    def steps(count):
        return max(2, int(count * arg.scale))

    def tars(split):
        """The shards of a split: images with five captions each."""
        return dict(kind="tars", folder=PHOTOS, split=split)

    def held_out(sort):
        """Validation captions after a prompt: nothing, sibling captions, or their content words."""
        source = dict(
            kind="documents",
            groups=[PHOTOS + "/captions.jsonl"],
            split="val",
            variants=1,  # documents per caption
            mixture={sort: 1.0},
        )
        return dict(task="document", text_len=128, source=source, last_only=True)

    # Groups of captions of one image, written as documents: with sibling captions in the prompt,
    # with keywords, or plain. This teaches the LMs to write what their context says.
    documents = dict(
        task="document",
        text_len=128,
        source=dict(
            kind="documents",
            groups=[TEXT + "caption_groups.jsonl.gz"],
            mixture=dict(siblings=0.4, keywords=0.4, plain=0.2),
        ),
    )
    photos = dict(
        task="caption", text_len=96, target_len=91, texts=5, cache=True, size=arg.image_size
    )

    lm = dict(kind="lm", vocab_size=0, kv_heads=1, head_dim=32, max_len=512)
    resampler = dict(
        kind="resampler",
        queries=arg.queries,
        query_dim=128,
        hidden_dim=128,
        heads=4,
        time_embed=False,  # there are no clips
        space_embed=True,  # MobileNet's grid has no positions of its own
    )

    optim = dict(lr=2e-3, warmup=max(1, int(50 * arg.scale)), clip=1.0, weight_decay=1e-2)
    pretrain = dict(
        kind="lm",
        data=dict(documents=1.0),
        optim=optim,
        loss=("plain", "siblings", "keywords"),
        loss_batches=16,
        save_every=200,
        log_every=20,
    )

    def see(count, lr):
        """What the stages that see images share: `count` steps at learning rate `lr`."""
        return dict(
            encoder="encoder",
            batch=16,
            steps=steps(count),
            data=dict(photos=1.0),
            optim={**optim, "lr": lr},
            loss=("val",),
            loss_batches=16,
            eval_every=steps(count // 4),
            eval_limit=500,
            evals=("val", "test"),
            save_every=200,
            log_every=20,
        )

    return ConfigDict(
        dict(
            name="flickr8k",
            seed=0,
            dtype="float32",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=0,
            tokenizer=dict(vocab_size=4096, lowercase=True, data=("documents",), texts=300_000),
            components=dict(
                encoder=dict(
                    kind="mobilenet",
                    image_size=arg.image_size,
                    images_at_once=2,  # bounds the memory of activations
                    weights="$VADAPTER_DATA/weights/mobilenet",
                ),
                # dropout is active only in stages with use_dropout=True
                tlm={**lm, "width": 128, "depth": 4, "heads": 4, "mlp_dim": 384, "dropout": 0.1},
                llm={**lm, "width": 192, "depth": 5, "heads": 6, "mlp_dim": 576},
                resampler={**resampler, "layers": 1},
                perceiver={**resampler, "layers": 6},
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(
                documents=documents,
                plain=held_out("plain"),
                siblings=held_out("siblings"),
                keywords=held_out("keywords"),
                photos={**photos, "source": tars("train"), "flip": True},  # mirrored at random
                val={**photos, "source": tars("val")},
                test={**photos, "source": tars("test")},
            ),
            evals=dict(
                val=dict(data="val", max_new=24, batch=100, limit=0),
                test=dict(data="test", max_new=24, batch=100, limit=0),
            ),
            chain=("tlm", "llm", "decoder", "vadapter", "perceiver"),
            stages=dict(
                tlm=dict(lm="tlm", steps=steps(600), batch=24, **pretrain),
                llm=dict(lm="llm", steps=steps(2400), batch=16, **pretrain),
                decoder=dict(
                    kind="decoder",
                    lm="tlm",
                    chain=("resampler", "fc_in"),
                    start=dict(tlm="tlm"),
                    use_dropout=True,
                    **see(4000, 1.5e-3),
                ),
                vadapter=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=dict(resampler="decoder", fc_in="decoder", tlm="decoder", llm="llm"),
                    **see(2400, 1e-3),
                ),
                perceiver=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("perceiver", "fc_out"),
                    start=dict(llm="llm"),
                    **see(2400, 1e-3),
                ),
            ),
        )
    )
