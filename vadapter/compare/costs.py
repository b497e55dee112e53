"""What a training step of a stage costs, and the sizes that a reader of a comparison asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vadapter.data.open import prompt_len
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.recipe.schema import Recipe
from vadapter.stages.abstract_state import row_shapes
from vadapter.stages.flops import step_flops
from vadapter.stages.restore import read_run
from vadapter.stages.run import tokenizer_path
from vadapter.stages.stage import Stage


@dataclass(frozen=True)
class Cost:
    """A training step of one stage; means over its data sets, by their weights.

    Attributes:
      samples: rows of a batch.
      flops: training FLOPs of a step.
      llm_tokens: rows of the sequences that the frozen LLM reads in a step: prompt, visual tokens
        and text, padding included; 0 for a stage without it, such as the paper's stage 1.
      visual_tokens: that the language model reads for one sample, by data set.
      trained, total: number of parameters.
    """

    samples: int
    flops: float
    llm_tokens: float
    visual_tokens: dict[str, int]
    trained: int
    total: int


def stage_costs(workdir: Path, names: tuple[str, ...]) -> dict[str, Cost]:
    """Return the costs of stages of a run, from its recipe and its tokenizer alone.

    Raises:
      CheckpointError: there is no run, or no tokenizer yet.
      ConfigError: the recipe is not valid.
    """
    recipe = read_run(workdir)
    return {name: _cost(recipe, name, workdir) for name in names}


def _cost(recipe: Recipe, name: str, workdir: Path) -> Cost:
    tokenizer = load_tokenizer(tokenizer_path(recipe, recipe.stages[name], workdir))
    mesh = make_mesh(MeshConfig())
    stage = Stage(recipe, name, mesh, workdir=workdir, tokenizer=tokenizer)
    weights = stage.config.data
    read = {data: _sequence(stage, data) for data in weights}
    mean = sum(weights[data] * read[data][0] for data in weights) / sum(weights.values())
    parameters = {part: _size(tree) for part, tree in stage.abstract.items()}
    frozen_lm = stage.config.lm not in stage.trained
    return Cost(
        samples=stage.config.batch,
        flops=step_flops(stage),
        llm_tokens=stage.config.batch * mean * frozen_lm,
        visual_tokens={data: visual for data, (_, visual) in read.items()},
        trained=sum(parameters[part] for part in stage.trained),
        total=sum(parameters.values()),
    )


def _sequence(stage: Stage, data: str) -> tuple[int, int]:
    """Return the length of the sequence of one sample, and how much of it are visual tokens."""
    model = stage.adapter_model
    rows = stage.recipe.data[data]
    prompt = prompt_len(rows.task, stage.tokenizer)
    kind = rows.media or stage.source(data).kind
    batch: Any = row_shapes(stage.sizes(data, kind=kind, prompt=prompt))

    def sequence(params: Any, batch: Any) -> Any:
        visual = model.encode(params, batch)
        prefix = None if visual is None else model.prefix(params, visual)
        return model.layout(params, prefix, batch)[0]

    length = jax.eval_shape(sequence, stage.abstract, batch).shape[1]
    return length, length - batch["prompt"].shape[1] - batch["tokens"].shape[1]


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
