"""AdamW with warm-up and decay (paper, Table 10)."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from vadapter.errors import ConfigError

if TYPE_CHECKING:
    import optax

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate; the defaults are the paper's."""

    lr: float = 5e-4  #: peak learning rate
    warmup: int = 1000  #: steps in which the learning rate rises to `lr`
    schedule: str = "linear"  #: linear | cosine decay to 0 at the last step, or constant
    b1: float = 0.9  #: of Adam
    b2: float = 0.999  #: of Adam
    eps: float = 1e-8  #: of Adam
    weight_decay: float = 1e-4  #: decoupled, of kernels and embeddings only
    clip: float = 1.0  #: global norm of the trained components' gradients; 0 for off


def check_schedule(config: OptimConfig, steps: int) -> None:
    """Check what `learning_rate` needs.

    Raises:
      ConfigError: unknown schedule, or warm-up longer than the run.
    """
    if config.warmup >= steps:
        raise ConfigError(f"optim.warmup={config.warmup} must be below steps={steps}")
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule={config.schedule!r}: one of {', '.join(SCHEDULES)}")


def learning_rate(config: OptimConfig, steps: int) -> "optax.Schedule":
    """Return the learning rate as a function of the optimizer step.

    Raises:
      ConfigError: see `check_schedule`.
    """
    import optax  # loaded where something is trained: reading a recipe does without

    check_schedule(config, steps)
    rest = steps - config.warmup
    decays = {
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
        "constant": optax.constant_schedule(config.lr),
    }
    # Warm-up counts from 1, so that the first step already moves the parameters.
    warm = optax.linear_schedule(config.lr / (config.warmup + 1), config.lr, config.warmup)
    return optax.join_schedules([warm, decays[config.schedule]], [config.warmup])


def decayed(params: Any) -> Any:
    """Return a tree that is True at the leaves with weight decay: kernels and embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", "") in ("kernel", "embedding"), params
    )


def make_optimizer(config: OptimConfig, steps: int) -> "optax.GradientTransformation":
    """Return the optimizer of the trained components: clipping, then AdamW on the schedule."""
    import optax

    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    adam = optax.adamw(
        learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=config.weight_decay, mask=decayed,
    )  # fmt: skip
    return optax.chain(*clip, adam)
