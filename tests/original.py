"""The original libraries, from the extra `parity`: torch and transformers."""

import contextlib
import warnings


@contextlib.contextmanager
def their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def draw(name, p):
    """Random values for a parameter: norms about 1, everything else about 0."""
    import torch

    if p.ndim > 1:
        return 0.3 * torch.randn_like(p)
    scale = "norm" in name or ".ln_" in name or "lambda" in name
    return 0.1 * torch.randn_like(p) + (1.0 if scale and not name.endswith("bias") else 0.0)
