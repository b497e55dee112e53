"""The original libraries, from the extra `parity`: torch, transformers and open_clip."""

import contextlib
import functools
import importlib
import warnings

import pytest


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
    scale = "norm" in name.lower() or ".ln_" in name or "lambda" in name
    return 0.1 * torch.randn_like(p) + (1.0 if scale and not name.endswith("bias") else 0.0)


def imported(name):
    """One of the original libraries; the test is skipped where the extra is not installed."""
    with their_warnings():
        declare_operators()
        return pytest.importorskip(name, reason="needs the extra parity")


@functools.cache
def declare_operators():
    """Let torchvision, which the others import, load beside another build of torch.

    Its compiled operators do not load there. Those that it insists on are declared in their place;
    no model here calls them.
    """
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators  # they live as long as it does
    return None
