"""Generations for the items of a source, on all devices and hosts, and their scores."""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from vadapter.config import digest, plain
from vadapter.console import Progress
from vadapter.data.batch import Batch
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.image_transform import ImageTransform
from vadapter.data.items import Slice, items_of
from vadapter.data.pipeline import Transform, eval_batches, require_usable
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.transforms import prompt_sample
from vadapter.distributed import hosts
from vadapter.distributed.mesh import filled, to_host, to_mesh, with_mesh
from vadapter.distributed.programs import Program
from vadapter.evaluate.partial_results import PartialResults
from vadapter.io import storage
from vadapter.io.json_files import write_json
from vadapter.metrics.scoring import METRICS, Generation, Result, score_generations
from vadapter.models import layered
from vadapter.models.decoding import Decode
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.stage import Stage

if TYPE_CHECKING:
    from vadapter.models.adapter_model import Params

MAX_QUESTION = 40  # tokens of a question with its prompt; longer questions count as wrong


class Decoder:
    """Compiled decoding of a stage's model, one program per batch shape.

    Args:
      watch: wraps every iterator of batches, for example to stop it at a signal.
    """

    def __init__(self, stage: Stage, watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter):
        self.stage, self._watch = stage, watch
        self.tokenizer, self.mesh = stage.tokenizer, stage.mesh
        self._cpu = self.mesh.devices.flat[0].platform == "cpu"
        self._programs: dict[tuple[Decode, bool], Program] = {}

    def _for_decoding(self, params: "Params", tokens: int) -> dict[str, Any]:
        """Return the parameters in the form that decodes so many tokens fastest."""
        if not self._cpu:
            return dict(params)
        new, lm = layered.in_float32(dict(params)), self.stage.config.lm
        if self.mesh.size == 1 and layered.pays(new[lm], tokens):
            new[lm] = layered.layered(new[lm])
        return new

    def _program(self, how: Decode, unrolled: bool) -> Program:
        """Return the program that generates: (params of all components, batch, shown) -> arrays."""
        stop, vocab = tuple(self.tokenizer.stop_ids), self.tokenizer.vocab_size

        def run(params: "Params", batch: Batch, shown: jax.Array | None) -> dict[str, jax.Array]:
            from vadapter.models.generate import decode  # models: only where it is traced

            model = self.stage.adapter_model
            return decode(model, params, batch, how, stop, vocab, shown, float32=self._cpu)

        if (how, unrolled) not in self._programs:
            facts = {"model": self.stage.facts, "stop": stop, "vocab": vocab, "how": plain(how)}
            use = "layered" if unrolled else ""
            program = Program(with_mesh(self.mesh, run), facts, self.mesh, use)
            self._programs[how, unrolled] = program
        return self._programs[how, unrolled]

    def generate(
        self,
        params: "Params",
        batches: Iterator[Batch],
        how: Decode,
        shown: jax.Array | None = None,
        count: int = 1,
    ) -> Iterator[list[Generation]]:
        """Yield the generations of the real rows of each batch, which is on the host.

        Args:
          shown: the embeddings of examples in the prompt, see `generate.prefill`.
          count: number of batches, as far as known: many of them are worth a longer compilation.
        """
        pending: tuple[Any, Any] | None = None
        params = self._for_decoding(params, count * how.max_new)
        program = self._program(how, layered.is_layered(params[self.stage.config.lm]))
        for batch in self._watch(batches):
            arrays = to_mesh(batch, self.mesh)
            out = program(params, arrays, shown)
            # Fetch the previous batch only now: the devices decode while the host reads ahead.
            if pending is not None:
                yield self._detokenize(*pending)
            pending = (arrays, out)
        if pending is not None:
            yield self._detokenize(*pending)

    def _detokenize(self, arrays: Batch, out: Any) -> list[Generation]:
        def text(ids: Any) -> str:
            return self.tokenizer.decode([int(id) for id in ids]).strip()

        columns = (arrays["id"], arrays["bad"], out["tokens"], out["ended"])
        prefixes = map(text, to_host(out["prefix"])) if "prefix" in out else itertools.repeat("")
        rows = zip(zip(*map(to_host, columns), strict=True), prefixes, strict=False)
        return [
            Generation(int(index), None if bad else text(tokens), bool(ended), prefix)
            for (index, bad, tokens, ended), prefix in rows
            if index >= 0  # not padding of the last batch
        ]


def predict(
    decoder: Decoder, params: "Params", items: Any, row: Transform, *, batch: int, how: Decode,
    shown: jax.Array | None = None, partial: PartialResults | None = None, title: str = "",
) -> list[Generation]:  # fmt: skip
    """Return one generation per item, in order; those in `partial` are not generated again.

    Batches are spread over the hosts and the mesh; the last one is padded, so that all hosts take
    the same number of steps. Hosts other than the first return only what was not in `partial`.

    Args:
      items: from `items_of`; `row` turns each into a row of a batch.
      batch: rows of a global batch; rounded up to a multiple of the devices.
      how, shown: see `Decoder.generate`.
      partial: keeps the generations as they are made; None: nothing is kept.
      title: of the progress on stderr; "" hides it.

    Raises:
      DataError: no items.
      RuntimeError: some items have no generation, or several.
    """
    require_usable(items, 1)
    hosts.require_connected()
    batch = filled(min(batch, len(items)), decoder.mesh)
    generations, start = [], 0
    if partial is not None:  # only the first host reads the file: the others skip as many items
        generations = partial.read(batch)[: len(items)]
        start = hosts.of_first(len(generations), f"evaluation {title}", patience=hosts.WORK)
    title = title if hosts.first() else ""
    with Progress(title, len(items), start, file=sys.stderr) as progress:
        if start < len(items):
            rest = Slice(items, start, len(items))
            batches = eval_batches(
                rest, row, batch, host_index=hosts.index(), host_count=hosts.count()
            )
            # Of all items: generations do not depend on where an earlier attempt ended.
            count = -(-len(items) // batch)
            for group in decoder.generate(params, batches, how, shown, count):
                new = [g._replace(index=start + g.index) for g in sorted(group)]
                if partial is not None:
                    partial.append(new)
                generations += new
                progress.advance(len(new))
    first = 0 if hosts.first() else start
    if [g.index for g in generations] != list(range(first, len(items))):
        raise RuntimeError(
            f"expected one generation for each of {len(items) - first} items, got "
            f"{len(generations)} for {len({g.index for g in generations})} items"
        )
    return generations


def evaluate(
    decoder: Decoder, params: "Params", source: Source, data: DataConfig, spec: EvalConfig,
    view: ImageTransform | None, *, partial: PartialResults | None = None, title: str = "",
) -> Result:  # fmt: skip
    """Generate captions or answers for a source, as `data` says and with images as in `view`.

    Returns the scores and predictions; with `partial` (see `predict`), none on hosts other than
    the first.
    """
    items = items_of(source, data.task, spec.limit)
    row = prompt_row(data, source, decoder.tokenizer, view)
    generations = predict(
        decoder, params, items, row, batch=spec.batch, how=spec.decode, partial=partial, title=title
    )
    if partial is not None and not hosts.first():  # it lacks the generations of earlier attempts
        return Result({}, [])
    return score_generations(items, generations, METRICS[_metric(data)])


def prompt_row(
    data: DataConfig, source: Source, tokenizer: Tokenizer, view: ImageTransform | None
) -> Transform:
    """Return the transform from an item of a data set to the row that is continued."""
    question = data.task == "question"
    return functools.partial(
        prompt_sample,
        tokenizer=tokenizer,
        view=data.view(view),
        frames=data.frames if source.kind == "clip" else 1,
        text_len=MAX_QUESTION if question else len(tokenizer.encode(CAPTION.after)),
    )


def limited(spec: EvalConfig, limit: int) -> EvalConfig:
    """Return an evaluation of at most `limit` items; 0: of as many as the recipe says."""
    return dataclasses.replace(spec, limit=min((n for n in (limit, spec.limit) if n), default=0))


def record_of(source: Source, data: DataConfig, spec: EvalConfig, result: Result) -> dict[str, Any]:
    """Return the record of a recipe's evaluation: its settings, and its protocol with the digest.

    The protocol is what was asked about which items, and how it was scored: two results are
    comparable if theirs are equal.
    """
    prompt, after = CAPTION, CAPTION.after
    if data.task == "question":
        prompt, after = QUESTION, QUESTION.template
    protocol = plain({
        "data": source.fingerprint(),
        "items": len(result.rows),
        "prompt": {"before": prompt.before, "after": after},
        "decode": spec.decode,
        "metric": _metric(data),
    })  # fmt: skip
    if data.decode != "exact":  # else as in the records of earlier versions
        protocol["images"] = {"decode": data.decode}
    return {"eval": plain(spec), "protocol": protocol, "protocol_digest": digest(protocol)}


def _metric(data: DataConfig) -> str:
    return "simple" if data.task == "question" else "cider"


def save_result(directory: Path, result: Result, **record: Any) -> None:
    """Write predictions.jsonl, then score.json: scores, their intervals and a record."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    storage.write_bytes(directory / "predictions.jsonl", text.encode())
    write_json(directory / "score.json", {**result.summary, **record})
