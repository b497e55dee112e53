"""The original libraries, from the extra `parity`: torch, transformers and open_clip."""

import contextlib
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
    scale = "norm" in name or ".ln_" in name or "lambda" in name
    return 0.1 * torch.randn_like(p) + (1.0 if scale and not name.endswith("bias") else 0.0)


def import_open_clip():
    """open_clip; the test is skipped where it is absent.

    Its import reaches torchvision, whose compiled operators do not load beside another build of
    torch. Those that torchvision insists on are declared then; no ViT calls them.
    """
    with their_warnings():
        torch = pytest.importorskip("torch", reason="needs the extra parity")
        try:
            pytest.importorskip("torchvision", reason="needs the extra parity")
        except RuntimeError:
            missing = torch.library.Library("torchvision", "DEF")
            _kept.append(missing)  # the declarations live as long as it does
            for name in ("nms", "qnms"):
                missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return pytest.importorskip("open_clip", reason="needs the extra parity")


_kept = []
