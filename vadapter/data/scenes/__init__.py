"""The embedded procedural data set."""

from vadapter.data.scenes.source import ScenesSource, blind_baselines

__all__ = ["ScenesSource", "blind_baselines"]
