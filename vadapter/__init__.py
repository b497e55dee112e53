"""vadapter: align any frozen vision encoder with any frozen LLM by training a tiny LM."""

__version__ = "0.1.0"
