"""Public encoders beside the original library's: their modules, parameters and tokens."""

import functools

import flax.linen as nn
import jax
import numpy as np
from support.public_models import read_checkpoint

from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import Checkpoint


def load(folder, **overrides):
    """(module, parameters, report) of a checkpoint, some fields of whose spec are replaced."""
    checkpoint = Checkpoint.open(folder)
    module = make_module("encoder", dict(checkpoint.spec) | overrides)
    size = module.config.image_size
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    return module, params, report


@functools.partial(jax.jit, static_argnums=0)
def _tokens(module, params, pixels):
    return module.apply({"params": params}, pixels)


def run(module, params, pixels):
    """The tokens of images or clips; modules of one configuration are compiled once."""
    return np.asarray(_tokens(module, params, pixels))
