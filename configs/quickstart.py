"""The whole method on generated scenes: nothing to download, minutes on two CPU cores.

    vadapter quickstart

Three stages, with `--from-scratch` six, trained in this order:

    tlm        a tiny language model, on text alone
    llm        a larger language model, on text alone: the one that stays frozen later
    vision     a small ViT, as CoCa: captioning and contrastive loss
    decoder    stage 1 of the paper: the tiny LM is trained to caption what the frozen ViT sees
    perceiver  baseline: a perceiver-resampler between the frozen ViT and the frozen larger LM
    vadapter   stage 2 of the paper: resampler and tiny LM of stage 1 as the adapter

`perceiver` and `vadapter` read the same batches in the same order. Run 2026-11-30: 5 minutes.

Arguments:
    scale      factor on the steps of every stage
    queries    of the resamplers
    steps      of each stage that sees images through the frozen encoder, before `scale`
    weights    folder of the components encoder, tlm and llm, written by `vadapter export
               --components`; by default those of the package. `weights=` trains the three

Every key of a recipe is explained here once; the other recipes comment only on what they change.
"""

from ml_collections import ConfigDict

from vadapter.config import parse_arg


def get_config(arg=None):
    # `--config=configs/quickstart.py:scale=0.1` trains every stage for a tenth of its steps.
    arg = parse_arg(arg, scale=1.0, queries=64, steps=450, weights="packaged:scenes")

    def steps(count):
        return max(2, int(count * arg.scale))

    # Stages that train a component each, for later ones to start from; with `weights` none.
    pretraining = () if arg.weights else ("tlm", "llm", "vision")

    def component(name, **spec):
        """A component of these sizes or, with `weights`, that of the folder."""
        return dict(weights=f"{arg.weights}/{name}") if arg.weights else spec

    def after(stage):
        """The start of a component that is trained in a stage of `pretraining`."""
        return stage if stage in pretraining else "weights"

    batch = 24  # of the stages that see images through the frozen encoder

    # -- data -----------------------------------------------------------------------------------

    def scenes(media, split, count):
        """`count` generated scenes: text, images or clips of moving shapes, `size` pixels wide.

        The splits train and test share no scene.
        """
        return dict(kind="scenes", media=media, split=split, size=64, count=count, seed=0)

    def once(share):
        """As many examples as the share of a stage's rows, so that a stage sees each once."""
        return max(batch, int(share * steps(arg.steps) * batch))

    def prompted(form):
        """Held-out captions after a prompt in text, to see which prompts a language model uses.

        The prompt is nothing (plain), other captions of the scene (siblings), or their content
        words (keywords). Only the caption, the last piece of the document, counts in the loss.
        """
        source = {**scenes("text", "test", 400), "form": form}
        return dict(task="document", text_len=96, last_only=True, source=source)

    # task: caption (image → text), question (image and question → answer) or document (text).
    # text_len: tokens of a row; longer texts are cut. target_len: tokens that count in the loss.
    # texts: captions per image in one row. cache: encode each image once, train on its tokens.
    caption = dict(task="caption", text_len=76, target_len=72, texts=3, cache=True)
    question = dict(task="question", text_len=44, target_len=12, texts=2, cache=True)

    # -- components -----------------------------------------------------------------------------

    # vocab_size=0: that of the tokenizer. kv_heads=1: multi-query attention. max_len: positions.
    lm = dict(kind="lm", vocab_size=0, kv_heads=1, head_dim=32, max_len=256)
    # queries: learned vectors that attend to the image tokens; as many tokens leave the resampler.
    resampler = dict(kind="resampler", queries=arg.queries, query_dim=96, hidden_dim=96, heads=3)

    # -- stages ---------------------------------------------------------------------------------

    def optim(lr):
        """AdamW: linear warm-up, then linear decay; `clip` bounds the norm of the gradients."""
        return dict(lr=lr, warmup=steps(20) - 1, clip=1.0, weight_decay=1e-2)

    # save_every: steps between checkpoints. log_every: steps between rows of metrics.jsonl.
    logging = dict(save_every=steps(100), log_every=20)
    # What both language models share. kind="lm": next-token prediction on documents.
    pretrain = dict(kind="lm", batch=16, data=dict(documents=1.0), optim=optim(3e-3), **logging)
    # What the three stages that see images share. data: data sets with their sampling weights;
    # a stage mixes them. loss: data sets whose held-out loss is measured, on loss_batches batches.
    # evals: evaluations to run, every eval_every steps on eval_limit examples and at the end on
    # all.
    see = dict(
        encoder="encoder",
        steps=steps(arg.steps),
        batch=batch,
        optim=optim(2e-3),
        data=dict(images=4.0, clips=1.0),
        loss=("held_images",),
        loss_batches=4,
        evals=("captions", "clips", "answers"),
        eval_every=steps(arg.steps / 10),
        eval_limit=64,
        **logging,
    )
    return ConfigDict(
        dict(
            name="quickstart",
            seed=0,
            dtype="float32",  # of the computation; trained parameters are always float32
            # Devices along each axis; -1: all that remain. data: rows of a batch. fsdp: parameters
            # are sharded, and gathered layer by layer. tensor: heads and hidden units are sharded.
            mesh=dict(data=-1, fsdp=1, tensor=1),
            workers=0,  # processes that read data; 0: threads of this one
            # One tokenizer for all language models, trained on at most `texts` texts of `data`.
            tokenizer=dict(vocab_size=512, lowercase=True, data=("documents",), texts=20_000),
            # The parts that stages combine, by name; a stage trains some and freezes the others.
            components=dict(
                encoder=component(
                    "encoder",
                    kind="vit",
                    image_size=64,
                    patch=8,
                    stem="convolutions",
                    width=128,
                    depth=4,
                    heads=4,
                    mlp_dim=384,
                ),
                # Only in the vision stage (CoCa): attention pooling of the image tokens, a text
                # decoder without images, and one that fuses both and writes the caption.
                pooler=dict(kind="pooler", queries=33, width=128, heads=4),
                text={**lm, "width": 96, "depth": 1, "heads": 3, "mlp_dim": 256},
                fusion=dict(kind="fusion", depth=1, width=96, heads=3, mlp_dim=256, embed_dim=64),
                tlm=component("tlm", **lm, width=96, depth=3, heads=3, mlp_dim=256),
                llm=component("llm", **lm, width=128, depth=6, heads=4, mlp_dim=384),
                resampler={**resampler, "layers": 1},  # of the adapter
                perceiver={**resampler, "layers": 6},  # of the baseline: six layers, no tiny LM
                # Linear layers between parts of different widths; width=0: that of the next part.
                fc_in=dict(kind="fc", width=0),
                fc_out=dict(kind="fc", width=0),
            ),
            data=dict(
                documents=dict(
                    task="document",
                    text_len=96,
                    source=scenes("text", "train", 200_000),
                ),
                plain=prompted("plain"),
                siblings=prompted("siblings"),
                keywords=prompted("keywords"),
                pairs=dict(
                    task="caption",
                    text_len=48,
                    target_len=46,
                    source={**scenes("image", "train", 200_000), "form": "whole"},
                ),
                # media tells `vadapter plan`, which opens no data, what to expect.
                images={**caption, "media": "image", "source": scenes("image", "train", once(0.8))},
                clips={**caption, "media": "clip", "source": scenes("clip", "train", once(0.2))},
                held_images={**caption, "source": scenes("image", "test", 200)},
                held_clips={**caption, "source": scenes("clip", "test", 64)},
                questions={**question, "source": scenes("image", "test", 100)},
            ),
            # Greedy decoding of at most max_new tokens; limit=0: of all examples.
            evals=dict(
                captions=dict(data="held_images", max_new=36, batch=64, limit=0),
                clips=dict(data="held_clips", max_new=36, batch=64, limit=0),
                answers=dict(data="questions", max_new=6, batch=128, limit=0),
            ),
            chain=(*pretraining, "decoder", "perceiver", "vadapter"),  # in this order
            stages=dict(
                tlm=dict(lm="tlm", steps=steps(120), **pretrain),
                llm=dict(
                    lm="llm",
                    steps=steps(240),
                    loss=("plain", "siblings", "keywords"),
                    loss_batches=4,
                    **pretrain,
                ),
                # kind="vision": trains encoder, pooler, text and fusion.
                vision=dict(
                    kind="vision",
                    steps=steps(320),
                    batch=32,
                    data=dict(pairs=1.0),
                    optim=optim(2e-3),
                    **logging,
                ),
                # kind="decoder": the chain leads from the encoder to lm; chain and lm are trained.
                # start: the finished stage that a component is loaded from; others start random.
                decoder=dict(
                    kind="decoder",
                    lm="tlm",
                    chain=("resampler", "fc_in"),
                    start=dict(encoder=after("vision"), tlm=after("tlm")),
                    **see,
                ),
                # kind="adapter": only the chain is trained, here with the tiny LM in it.
                vadapter=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("resampler", "fc_in", "tlm", "fc_out"),
                    start=dict(
                        encoder=after("vision"),
                        resampler="decoder",
                        fc_in="decoder",
                        tlm="decoder",
                        llm=after("llm"),
                    ),
                    **see,
                ),
                perceiver=dict(
                    kind="adapter",
                    lm="llm",
                    chain=("perceiver", "fc_out"),
                    start=dict(encoder=after("vision"), llm=after("llm")),
                    **see,
                ),
            ),
        )
    )
