"""The original libraries, once a session."""

import pytest
from original import their_warnings


@pytest.fixture(scope="session")
def originals():
    """(torch, transformers)."""
    with their_warnings():
        torch = pytest.importorskip("torch", reason="needs the extra parity")
        transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return torch, transformers
