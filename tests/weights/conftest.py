"""The original libraries, once a session."""

import functools

import pytest
from original import draw, their_warnings


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


@pytest.fixture(scope="module")
def original_of(originals, tmp_path_factory):
    """build(transformers, case) -> (case -> (random model, its folder)), each made once."""
    torch, transformers = originals

    def pairs(build):
        @functools.cache
        def make(case):
            torch.manual_seed(0)
            with their_warnings(), torch.no_grad():
                model = build(transformers, case).eval()
                for name, p in model.named_parameters():
                    p.copy_(draw(name, p))
                folder = tmp_path_factory.mktemp("checkpoint")
                model.save_pretrained(folder)
            return model, folder

        return make

    return pairs
