"""Examples and batches: sources, media, tokenizers, transforms and the stream of batches."""

from absl import logging

# Grain warns when it is imported that an older jaxlib cannot profile its worker processes.
logging.get_absl_logger().addFilter(lambda record: "worker profiling" not in str(record.msg))
