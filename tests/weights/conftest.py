"""The original libraries, once a session, and a hub on this machine."""

import functools

import pytest
from support import hub_server
from support.hub_server import FILES
from support.original import draw, imported, their_warnings


@pytest.fixture(scope="session")
def originals():
    """(torch, transformers)."""
    torch, transformers = imported("torch"), imported("transformers")
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


@pytest.fixture
def hub():
    """The server: `asked` lists its requests, `files` is what it has, `main` its newest commit."""
    with hub_server.serving(FILES, "owner/model", "owner/gated-info", "owner/gated-files") as hub:
        yield hub


@pytest.fixture
def env(tmp_path):
    """The environment of someone who never used the hub, but for what a test adds."""
    return hub_server.environment(tmp_path / "hf")
