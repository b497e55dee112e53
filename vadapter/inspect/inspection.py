"""What one trained stage does with images: the measurements, as JSON and for the page.

Legend: B batch, F frames, S pixels a side, Q soft tokens, K nearest words.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vadapter.data.example import Example
from vadapter.data.image_transform import ImageTransform
from vadapter.data.pipeline import eval_batches
from vadapter.data.prompts import CAPTION
from vadapter.data.transforms import prompt_sample
from vadapter.distributed.mesh import filled
from vadapter.errors import UserError
from vadapter.evaluate.describe import image_settings, read_pixels
from vadapter.inspect.attention import Maps
from vadapter.inspect.held_out import Chosen, Encoded, HeldOut, batches, open_held_out
from vadapter.inspect.probe import Look, Nearest, Probe
from vadapter.inspect.words import Vocabulary, Words, whole_words, words_of
from vadapter.metrics.bootstrap import Sample, intervals, paired
from vadapter.metrics.scoring import METRICS, Generation, score_generations
from vadapter.models.decoding import Decode
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.stage import Stage

TEXTS = 2000  # of the tokenizer's data, whose words are the whole words of a run's own tokenizer
COMMON = 12  # most frequent nearest words that are reported
Facts = dict[str, Any]  # what becomes JSON


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is looked at.

    Attributes:
      limit: items of each evaluation; 0: all.
      show: of them, those that the page shows with attention maps.
      layers: of the language model; (): the middle one.
      top: nearest words of each soft token.
      evals: names of evaluations; (): those of the stage.
    """

    limit: int = 200
    show: int = 4
    layers: tuple[int, ...] = ()
    top: int = 5
    evals: tuple[str, ...] = ()


class Shown(NamedTuple):
    """An item with its pixels, for the page."""

    facts: Facts  # of the item
    frames: np.ndarray  # u8[F,S,S,3]
    maps: Sequence[Maps]


class Inspected(NamedTuple):
    """What was found about one subject."""

    label: str
    facts: Facts
    shown: dict[str, list[Shown]]  # by evaluation


# -- of a stage ------------------------------------------------------------------------------------


def open_probe(stage: Stage, settings: Settings) -> Probe:
    """Return the programs of a stage; ConfigError for a layer that it does not have."""
    return Probe(stage, _words(stage), settings.layers, settings.top)


def _words(stage: Stage) -> Words:
    """Return the whole words of the stage's tokenizer; a run's own has texts it was trained on."""
    own = not stage.recipe.components[stage.config.lm].get("weights")
    texts: list[str] = []
    if own:
        for name in stage.recipe.tokenizer.data:
            try:
                texts += itertools.islice(stage.source(name).texts(), TEXTS)
            except UserError:  # moved or deleted: not needed to look at images
                continue
    return whole_words(stage.tokenizer, texts)


def describe_stage(label: str, probe: Probe) -> Facts:
    """Return what is known of a stage without data."""
    stage = probe.stage
    return {
        "label": label,
        "run": str(stage.workdir),
        "stage": stage.name,
        "kind": stage.config.kind,
        "step": stage.step,
        "chain": list(stage.config.chain),
        "lm": stage.config.lm,
        "lm_layers": probe.depth,
        "no_soft_tokens": probe.without_prefix,
        "whole_words": {"count": len(probe.words.ids), "rule": probe.words.rule},
    }


def inspect_held_out(
    label: str, probe: Probe, evals: Mapping[str, EvalConfig], settings: Settings
) -> Inspected:
    """Return what a stage does with held-out items.

    Raises:
      UserError: data that cannot be read, or fewer than two images.
    """
    facts, shown = describe_stage(label, probe) | {"evals": {}}, {}
    norms: list[np.ndarray] = []
    opened = [open_held_out(probe.stage, *item, settings.limit) for item in evals.items()]
    # Of questions about images whose captions are looked at, too, the prefix is not shown again.
    captioned = {held.frames for held in opened if held.data.task == "caption"}
    for held in opened:
        name, looks = held.name, held.data.task == "caption" or held.frames not in captioned
        found = _Evaluation(probe, held, settings, looks)
        norms += found.norms
        facts["evals"][name], shown[name] = found.facts(), found.shown
    facts["norms"] = _norms(probe, norms)
    return Inspected(label, facts, shown)


def inspect_files(
    label: str, probe: Probe, files: Sequence[Path], settings: Settings, max_new: int = 32
) -> tuple[Inspected, dict[Path, str]]:
    """Return what a stage does with files, and why some cannot be read."""
    view, clip_frames = image_settings(probe.stage)
    errors: dict[Path, str] = {}
    groups: dict[int, list[tuple[Path, np.ndarray]]] = {}  # by number of frames
    for file in files:
        pixels, reason = read_pixels(file, view, clip_frames)
        if pixels is None:
            errors[file] = reason
        else:
            groups.setdefault(len(pixels), []).append((file, pixels))
    shown: dict[Path, Shown] = {}
    norms: list[np.ndarray] = []
    for group in groups.values():
        for (file, pixels), facts, look, maps in _read_files(probe, group, view, max_new):
            norms.append(look)
            shown[file] = Shown(facts, pixels, maps)
    facts = describe_stage(label, probe) | {"norms": _norms(probe, norms)}
    in_order = [shown[file] for file in dict.fromkeys(files) if file in shown]
    facts["files"] = [each.facts for each in in_order]
    return Inspected(label, facts, {"files": in_order}), errors


def _read_files(
    probe: Probe, group: list[tuple[Path, np.ndarray]], view: ImageTransform, max_new: int
) -> Iterator[tuple[tuple[Path, np.ndarray], Facts, np.ndarray, list[Maps]]]:
    stage = probe.stage
    items: Any = [Example(str(i), pixels) for i, (_, pixels) in enumerate(group)]
    size = filled(min(len(items), 8), stage.mesh)

    def row(item: Example, rng: Any = None) -> Any:
        return prompt_sample(
            item, stage.tokenizer, rng, view=ImageTransform(view.size), frames=len(group[0][1]),
            text_len=len(stage.tokenizer.encode(CAPTION.after)),
        )  # fmt: skip

    for each in eval_batches(items, row, size, threads=0):
        batch: dict[str, Any] = dict(each)
        batch["features"] = probe.encode(batch.pop("frames"))
        (generations,) = probe.decoder.generate(probe.params, iter([batch]), Decode(max_new))  # type: ignore[list-item]
        said = {g.index: g for g in generations}
        look = None if probe.without_prefix else probe.look(batch)
        maps = probe.attention(batch["features"])
        for i, index in enumerate(batch["id"]):
            if index >= 0:
                file, pixels = group[int(index)]
                name = str(file).encode("utf-8", "backslashreplace").decode()
                own = said[int(index)]
                facts: Facts = {"file": name, "text": _line(own.text), "ended": own.ended}
                if own.prefix:
                    facts["prefix_text"] = own.prefix
                if look is not None:
                    facts |= _soft_tokens(probe, look, i)
                norm = np.zeros(0) if look is None else look.norm[i]
                yield (file, pixels), facts | _spread(maps[i]), norm, maps[i]


# -- of an evaluation ------------------------------------------------------------------------------


class _Evaluation:
    """The measurements of one evaluation; everything is computed when it is made."""

    def __init__(self, probe: Probe, held: HeldOut, settings: Settings, looks: bool):
        self.looks = looks  # at the soft tokens
        self.probe, self.held, self.settings = probe, held, settings
        self.norms: list[np.ndarray] = []
        self.shown: list[Shown] = []
        self._items: dict[int, Facts] = {}  # by index, of those that can be used
        self._unusable = 0
        self._said: dict[str, dict[int, Generation]] = {c: {} for c in held.conditions}
        self._captions = {}
        encoded = Encoded(probe, held)
        for rows in batches(held, probe.stage):
            self._add(rows, encoded)
        self._score()

    def _add(self, rows: Any, encoded: Encoded) -> None:
        inputs = encoded.inputs(rows)
        real = [int(row) for row in np.flatnonzero(rows.usable & (inputs.partner >= 0))]
        self._unusable += int((rows.index >= 0).sum()) - len(real)
        for row in real:
            index = int(rows.index[row])
            self._items[index] = self._describe(index, int(inputs.partner[row]))
        for condition, features in inputs.of.items():
            nats, targets = self.probe.nats({**rows.texts, "features": features})
            for row in real:
                count = float(targets[row])
                entry = {"loss": float(nats[row]) / count, "targets": int(count)}
                self._items[int(rows.index[row])]["inputs"][condition] = entry
        prompts = ({**rows.prompts, "features": x} for x in inputs.of.values())
        decoder, how = self.probe.decoder, self.held.spec.decode
        said = decoder.generate(self.probe.params, prompts, how)  # type: ignore[arg-type]
        for condition, generations in zip(inputs.of, said, strict=True):
            self._said[condition] |= {g.index: g for g in generations}
        shown = real[: self.settings.show - len(self.shown)]
        maps: list[list[Maps]] = [[] for _ in shown]
        if self.looks and not self.probe.without_prefix:
            look = self.probe.look({**rows.prompts, "features": inputs.of["right"]})
            for row in real:
                self.norms.append(look.norm[row])
                item = self._items[int(rows.index[row])]
                item |= _soft_tokens(self.probe, look, row)
        if self.looks:
            maps = self.probe.attention(inputs.of["right"][shown]) if shown else []
        for row, each in zip(shown, maps, strict=True):
            item = self._items[int(rows.index[row])]
            item |= _spread(each)
            self.shown.append(Shown(item, rows.frames[row], each))

    def _describe(self, index: int, partner: int) -> Facts:
        example = self.held.example(index)
        facts: Facts = {"index": self.held.items.indices[index], "id": example.id}
        if self.held.data.task == "question":
            _, question = self.held.items.text_only(index)
            facts |= {"question": question.text, "answer": question.answer}
        else:
            facts["references"] = list(example.captions)
        return facts | {"wrong": self.held.example(partner).id, "partner": partner, "inputs": {}}

    def _score(self) -> None:
        """Add generations and their scores to the items."""
        indices = sorted(self._items)
        self._items = {i: self._items[i] for i in indices}
        items = Chosen(self.held.items, indices)
        metric = METRICS["simple" if self.held.data.task == "question" else "cider"]
        self.score_name = metric.primary
        for condition, said in self._said.items():
            generations = [said[i]._replace(index=n) for n, i in enumerate(indices)]
            result = score_generations(items, generations, metric)
            for index, row in zip(indices, result.rows, strict=True):
                entry = self._items[index]["inputs"][condition]
                entry |= {"text": _line(row["prediction"]), "ended": row["ended"]}
                if condition == "right" and said[index].prefix:
                    self._items[index]["prefix_text"] = said[index].prefix
                if "score" in row:
                    entry["score"] = row["score"]

    def facts(self) -> Facts:
        """Return the summary and the items."""
        held, items = self.held, [*self._items.values()]
        facts: Facts = {
            "data": held.spec.data,
            "task": held.data.task,
            "media": held.source.kind,
            "n": len(items),
            "images": len({item["id"] for item in items}),
            "unusable": self._unusable,
            "fingerprint": held.source.fingerprint(),
            "score": self.score_name,
            "inputs": self._inputs(items),
            "generations": self._generations(items),
        }
        if held.data.task == "caption":
            facts |= self._shares(items)
        for item in items:
            item.pop("partner")
        return facts | {"items": items}

    def _inputs(self, items: Sequence[Facts]) -> Facts:
        """Return loss and score with each input, and their differences to the right one."""
        names, clusters = [item["index"] for item in items], [item["id"] for item in items]

        def measured(key: str) -> Facts:
            samples = {}
            for condition in self.held.conditions:
                entries = [item["inputs"][condition] for item in items]
                if not all(key in entry for entry in entries):
                    return {}
                weights = [e["targets"] if key == "loss" else 1 for e in entries]
                parts = [(e[key] * w, w) for e, w in zip(entries, weights, strict=True)]
                samples[condition] = Sample(names, clusters, np.array(parts, np.float64))
            return _with_differences(samples, "right")

        return {"loss": measured("loss"), "score": measured("score")}

    def _generations(self, items: Sequence[Facts]) -> Facts:
        """Return how the generations with the right image end, their lengths and words."""
        said = [item["inputs"]["right"] for item in items]
        lengths = np.array([len(entry["text"].split()) for entry in said])
        used = {word for entry in said for word in words_of(entry["text"])}
        texts = [text for item in items for text in item.get("references", [item.get("answer")])]
        known = {word for text in texts for word in words_of(text)}
        return {
            "ended": float(np.mean([entry["ended"] for entry in said])),
            "distinct": len({entry["text"] for entry in said}) / len(said),
            "words": _spread_of(lengths) | {"counts": np.bincount(lengths).tolist()},
            "vocabulary": len(used),
            "vocabulary_of_references": len(known),
            "vocabulary_in_both": len(used & known),
        }

    def _shares(self, items: Sequence[Facts]) -> Facts:
        """Return how many soft tokens are near a word of the image's captions, or of another's."""
        own = {i: Vocabulary(self.held.example(i).captions) for i in self._items}
        found: Facts = {}
        views = {"nearest": "soft_tokens"} | {f"lens_{n}": f"lens_{n}" for n in self.probe.layers}
        for name, key in views.items():
            if not all(key in item for item in items):
                continue
            shares = {"own": [], "other": []}
            for index, item in self._items.items():
                words = [token[0][0] for token in item[key]]
                other = Vocabulary(self.held.example(item["partner"]).captions)
                shares["own"].append(own[index].share(words))
                shares["other"].append(other.share(words))
            names, clusters = [item["index"] for item in items], [item["id"] for item in items]
            samples = {k: Sample.of_means(names, clusters, v) for k, v in shares.items()}
            best = [token[0] for item in items for token in item[key]]
            counts = Counter(word for word, _ in best)
            measured = _with_differences(samples, "other")
            found[name] = {
                "own": measured["own"], "other": measured["other"],
                "similarity": float(np.mean([score for _, score in best])),
                "distinct": len(counts),
                "common": [[word, count / len(best)] for word, count in counts.most_common(COMMON)],
            }  # fmt: skip
        return found


def _with_differences(samples: Mapping[str, Sample], base: str) -> Facts:
    """Return each score with its interval, and its difference to that of `base`."""
    ends = intervals(samples)
    facts: Facts = {}
    for name, sample in samples.items():
        facts[name] = {"value": sample.value, "interval": ends.get(name)}
        if name != base:
            facts[name][f"minus_{base}"] = paired(sample, samples[base])._asdict()
    return facts


# -- of an item ------------------------------------------------------------------------------------


def _soft_tokens(probe: Probe, look: Look, row: int) -> Facts:
    """Return the nearest words of every soft token of a row, and of its states in the LM."""
    facts: Facts = {"soft_tokens": _nearest(probe.words, look.words, row)}
    facts |= {f"lens_{n}": _nearest(probe.words, each, row) for n, each in look.lens.items()}
    return facts


def _nearest(words: Words, nearest: Nearest, row: int) -> list[list[list[Any]]]:
    return [
        [[words.texts[i], round(float(s), 4)] for i, s in zip(index, score, strict=True)]
        for index, score in zip(nearest.index[row], nearest.score[row], strict=True)
    ]


def _spread(maps: Sequence[Maps]) -> Facts:
    """Return the attention of all queries together, and how concentrated it is."""
    if not maps:
        return {}
    return {
        "attention": {
            each.component: {
                "grid": each.is_grid,
                "mean": np.round(each.maps.mean(0), 5).tolist(),
                "effective_share": round(each.spread, 4),
                "elsewhere": round(each.rest, 4),
            }
            for each in maps
        }
    }


def _norms(probe: Probe, norms: Sequence[np.ndarray]) -> Facts:
    """Return the norms of soft tokens and of word embeddings, and the ratio of their means."""
    soft, words = np.concatenate([np.zeros(0), *norms]), probe.word_norms
    facts: Facts = {"words": _spread_of(words)}
    if len(soft):
        facts["soft_tokens"] = _spread_of(soft)
        facts["ratio"] = float(soft.mean() / words.mean())
    return facts


def _spread_of(values: np.ndarray) -> Facts:
    p5, p50, p95 = (float(v) for v in np.percentile(values, (5, 50, 95)))
    return {"mean": float(values.mean()), "p5": p5, "median": p50, "p95": p95}


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
