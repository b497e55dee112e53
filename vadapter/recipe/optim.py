"""AdamW with warm-up and decay (paper, Table 10)."""

import dataclasses
import math
from collections.abc import Collection
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
    #: learning-rate multipliers by trained component, 1 for those that are not named. The decay of
    #: weights is multiplied, too; with 0 a component stays as it starts.
    lr_mults: dict[str, float] = dataclasses.field(default_factory=dict)


def check_optim(config: OptimConfig, steps: int, trained: Collection[str]) -> None:
    """Check the optimizer of a stage that takes `steps` and trains these components.

    Raises:
      ConfigError: unknown schedule, warm-up longer than the run, or a multiplier of a component
        that is not trained, or that is not a number from 0.
    """
    _check_schedule(config, steps)
    for name, factor in config.lr_mults.items():
        if name not in trained:
            raise ConfigError(
                f"optim.lr_mults.{name}: the stage does not train {name!r}; it trains "
                f"{', '.join(trained)}"
            )
        if not 0 <= factor < math.inf:
            raise ConfigError(f"optim.lr_mults.{name}={factor}: a finite number, 0 or more")


def _check_schedule(config: OptimConfig, steps: int) -> None:
    if config.warmup >= steps:
        raise ConfigError(f"optim.warmup={config.warmup} must be below steps={steps}")
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule={config.schedule!r}: one of {', '.join(SCHEDULES)}")


def learning_rate(config: OptimConfig, steps: int) -> "optax.Schedule":
    """Return the learning rate as a function of the optimizer step.

    Raises:
      ConfigError: unknown schedule, or warm-up longer than the run.
    """
    import optax  # loaded where something is trained: reading a recipe does without

    _check_schedule(config, steps)
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
    """Return the optimizer of the trained components: clipping, then AdamW on the schedule.

    Its parameters are a dict by component. Multipliers of learning rates have no state.
    """
    import optax

    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    adam = optax.adamw(
        learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=config.weight_decay, mask=decayed,
    )  # fmt: skip
    return optax.chain(*clip, adam, *([_scale(config.lr_mults)] if config.lr_mults else []))


def _scale(factors: dict[str, float]) -> "optax.GradientTransformation":
    """Return the transformation that multiplies the updates of components."""
    import optax

    def scaled(name: str, updates: Any) -> Any:
        return jax.tree.map(lambda x: x * factors[name], updates) if name in factors else updates

    return optax.stateless(
        lambda updates, _: {name: scaled(name, each) for name, each in updates.items()}  # type: ignore[attr-defined]
    )
