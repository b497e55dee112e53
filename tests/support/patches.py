"""What tests replace in this process, each in one place: steps, devices, clocks, decoding."""

import time
from collections.abc import Callable
from typing import Any

import av
import jax
import pytest
from PIL import Image
from support.runs import fake_step

from vadapter.distributed import hosts
from vadapter.distributed.mesh import MeshConfig, make_mesh, to_mesh
from vadapter.evaluate.runner import Decoder
from vadapter.recipe.schema import Recipe
from vadapter.stages import run, stage, steps
from vadapter.train import loop


def use_fake_step(patch: pytest.MonkeyPatch) -> None:
    """Let stages train with `fake_step`."""
    patch.setattr(steps, "make_train_step", fake_step)


def use_devices(patch: pytest.MonkeyPatch, count: int, mesh: MeshConfig | None = None) -> None:
    """Let runs use the first `count` devices alone, arranged as `mesh` or as their recipe says."""

    def make(config: MeshConfig) -> jax.sharding.Mesh:
        return make_mesh(mesh or config, jax.devices()[:count])

    patch.setattr(run, "make_mesh", make)


def use_host_count(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let this process take itself for one of `count` hosts."""
    patch.setattr(hosts, "count", lambda: count)


def use_clock(
    patch: pytest.MonkeyPatch, start: float = 0.0, name: str = "monotonic"
) -> list[float]:
    """Stop the clock `time.NAME` and return its time, a list of one number to change."""
    now = [start]
    patch.setattr(time, name, lambda: now[0])
    return now


def use_batches(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let training put `change(batch)` on the devices in place of each batch."""
    patch.setattr(loop, "to_mesh", lambda batch, mesh: to_mesh(change(batch), mesh))


def wrap_generate(patch: pytest.MonkeyPatch, wrapper: Callable[..., Any]) -> None:
    """Let decoders generate by `wrapper(generate, decoder, ...)`, given the real method."""
    generate = Decoder.generate

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(generate, *args, **kwargs)

    patch.setattr(Decoder, "generate", wrapped)


def forbid_decoding(patch: pytest.MonkeyPatch) -> None:
    """Let any attempt to decode an image or a clip raise TypeError."""
    patch.setattr(Image.Image, "load", None)
    patch.setattr(av.container.InputContainer, "decode", None, raising=False)


def with_recipe(loaded: stage.Stage, recipe: Recipe) -> stage.Stage:
    """Return a restored stage with its parameters, as if its run had that recipe."""
    other = stage.Stage(
        recipe, loaded.name, loaded.mesh, workdir=loaded.workdir, tokenizer=loaded.tokenizer
    )
    other.params, other.step, other.digests = dict(loaded.params), loaded.step, loaded.digests
    return other
