"""Flickr8k: frozen MobileNetV2, an LLM pretrained here or a public one, both stages, the baseline.

    export VADAPTER_DATA=/path/to/data
    vadapter train --config=configs/flickr8k.py --workdir=runs/flickr8k
    vadapter train --config=configs/flickr8k.py:llm=HuggingFaceTB/SmolLM2-135M --workdir=runs/smol

Arguments:
    llm, tlm             public weights, hub ids or folders, of the large and the tiny language
                         model; by default both are pretrained on the texts of VADAPTER_DATA
    queries              of the resamplers; an image has 49 tokens
    steps, batch, texts  of the stages in front of the LLM: steps, images a step, captions an image
    stage1_steps, stage1_batch
                         of stage 1: steps, and images a step, with all five captions
    limit                images of the validation split that get captions; 0 for all
    image_size           pixels a side
    scale                factor on all steps

SIZES has their defaults. The stages are those of configs/quickstart.py, which explains every key,
without `vision`: the encoder is public.

Run 2026-11-25: 4 hours on one busy core with an LLM pretrained here. CIDEr on the test split: stage
1 40.0, stage 2 36.6, perceiver 37.9. Run 2026-12-01: 80 minutes on one core with SmolLM2-135M,
stage 2 of 500 steps: 12.8, perceiver 20.6, MLP 21.5 (BUILD_NOTES, "Flickr8k", "The method on
photos").
"""

from ml_collections import ConfigDict

from vadapter.config import parse_arg, split_arg

TEXT = "$VADAPTER_DATA/text/"
PHOTOS = "$VADAPTER_DATA/flickr8k"

LM = dict(kind="lm", vocab_size=0, kv_heads=1, head_dim=32, max_len=512)
TINY = dict(width=128, depth=4, heads=4, mlp_dim=384)  # with embeddings 1.2M parameters
SMALL = dict(width=256, depth=6, heads=8, mlp_dim=1024)  # 6.9M
# Defaults of the arguments, and sizes, by the frozen LLM: one of 2.9M parameters that is pretrained
# here, or a public one, of 135M say, through which a step takes 40 times as long.
SIZES = dict(
    pretrained=dict(
        queries=16, steps=2400, batch=16, texts=5, stage1_steps=4000, stage1_batch=16, limit=0
    ),
    public=dict(
        queries=49, steps=400, batch=8, texts=2, stage1_steps=1000, stage1_batch=16, limit=200
    ),
)


def get_config(arg=None):
    own, rest = split_arg(arg, llm="", tlm="", image_size=224, scale=1.0)
    frozen = parse_arg(own, llm="", tlm="", image_size=224, scale=1.0)
    arg = parse_arg(rest, **SIZES["public" if frozen.llm else "pretrained"])
    width = 256 if frozen.llm else 128  # of the resamplers

    def steps(count):
        return max(2, int(count * frozen.scale))

    def tars(split):
        """The shards of a split: images with five captions each."""
        return dict(kind="tars", folder=PHOTOS, split=split)

    def photos(split, texts, **options):
        """A split as rows of `texts` captions an image: an image is encoded once."""
        return dict(
            task="caption",
            text_len=19 * texts + 1,
            target_len=18 * texts + 1,
            texts=texts,
            cache=True,
            size=frozen.image_size,
            source=tars(split),
            **options,
        )

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

    def language_model(weights, **sizes):
        return dict(weights=weights) if weights else LM | sizes

    resampler = dict(
        kind="resampler",
        queries=arg.queries,
        query_dim=width,
        hidden_dim=width,
        heads=width // 32,
        time_embed=False,  # there are no clips
        space_embed=True,  # MobileNet's grid has no positions of its own
    )

    def optim(lr, count):
        warmup = max(1, int(min(50, count // 8) * frozen.scale))
        return dict(lr=lr, warmup=warmup, clip=1.0, weight_decay=1e-2)

    def pretrain(lm, count, batch):
        """The stage that pretrains a language model."""
        return dict(
            kind="lm",
            lm=lm,
            steps=steps(count),
            batch=batch,
            data=dict(documents=1.0),
            optim=optim(2e-3, count),
            loss=("plain", "siblings", "keywords"),
            loss_batches=16,
            save_every=200,
            log_every=20,
        )

    def see(count, batch, data, lr):
        """What the stages that see images share: `count` steps at learning rate `lr`."""
        return dict(
            encoder="encoder",
            batch=batch,
            steps=steps(count),
            data={data: 1.0},
            optim=optim(lr, count),
            loss=("val",),
            loss_batches=16,
            eval_every=steps(count // 4),
            eval_limit=500,
            evals=("val", "test"),
            save_every=200,
            log_every=20,
        )

    # The language models that are pretrained here.
    models = dict(tlm=frozen.tlm, llm=frozen.llm)
    pretrained = tuple(name for name, weights in models.items() if not weights)
    stages = dict(tlm=pretrain("tlm", 600, batch=24), llm=pretrain("llm", 2400, batch=16))
    start = {name: name for name in pretrained}
    return ConfigDict(
        dict(
            name="flickr8k_public" if frozen.llm else "flickr8k",
            seed=0,
            dtype="float32",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=0,
            tokenizer=dict(vocab_size=4096, lowercase=True, data=("documents",), texts=300_000),
            components=dict(
                encoder=dict(
                    kind="mobilenet",
                    image_size=frozen.image_size,
                    images_at_once=2,  # bounds the memory of activations
                    weights="$VADAPTER_DATA/weights/mobilenet",
                ),
                # dropout is active only in stages with use_dropout=True
                tlm=language_model(frozen.tlm, **(SMALL if frozen.llm else TINY), dropout=0.1),
                llm=language_model(frozen.llm, width=192, depth=5, heads=6, mlp_dim=576),
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
                photos=photos("train", 5, flip=True),  # mirrored at random
                few=photos("train", arg.texts, flip=True),
                val=photos("val", arg.texts),
                test=photos("test", arg.texts),
            ),
            evals=dict(
                val=dict(data="val", max_new=24, batch=100, limit=arg.limit),
                test=dict(data="test", max_new=24, batch=100, limit=0),
            ),
            chain=(*pretrained, "decoder", "vadapter", "perceiver"),
            stages={name: stages[name] for name in pretrained}
            | dict(
                decoder=dict(
                    kind="decoder",
                    lm="tlm",
                    chain=("resampler", "fc_in"),
                    start=dict(tlm=start.get("tlm", "weights")),
                    use_dropout=True,
                    **see(arg.stage1_steps, arg.stage1_batch, "photos", 1.5e-3),
                ),
                vadapter=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=dict(
                        resampler="decoder",
                        fc_in="decoder",
                        tlm="decoder",
                        llm=start.get("llm", "weights"),
                    ),
                    **see(arg.steps, arg.batch, "few", 1e-3),
                ),
                perceiver=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("perceiver", "fc_out"),
                    start=dict(llm=start.get("llm", "weights")),
                    **see(arg.steps, arg.batch, "few", 1e-3),
                ),
            ),
        )
    )
