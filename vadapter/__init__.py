"""vadapter: align any frozen vision encoder with any frozen LLM by training a tiny LM.

Start reading here. The method, from the encoder to the training loop:

    data/transforms.py, data/pipeline.py   examples → rows → batches (data/batch.py)
    models/vit.py                          vision encoder: frames → visual tokens
    models/adapters/                       resampler, pooler, MLP: visual tokens → queries
    models/lm.py, models/transformer.py    the language model, tiny or large
    models/adapter_model.py                encoder → adapter → LLM, from named components
    models/losses.py                       cross-entropy over targets; contrastive loss
    stages/steps.py                        loss → gradients of the trainable components → update
    stages/stage.py                        a stage of a recipe on a mesh: model, state, step
    train/loop.py                          batch, step, after

vadapter/README.md has the same list with what surrounds it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vadapter.hub.api import VAdapter

__version__ = "0.1.0"
__all__ = ["VAdapter", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public API when it is first used: `import vadapter` does not load JAX."""
    if name != "VAdapter":
        raise AttributeError(f"module 'vadapter' has no attribute {name!r}")
    from vadapter.hub.api import VAdapter

    return VAdapter
