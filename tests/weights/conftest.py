"""The original libraries, once a session, and a hub on this machine."""

import functools
import http.server
import os
import threading

import pytest
from support.hub_server import FILES, NEW, Hub
from support.original import draw, imported, their_warnings
from support.paths import ROOT


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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.main = [], FILES, NEW
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def env(tmp_path):
    """The environment of someone who never used the hub, but for what a test adds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    root = ROOT
    return {
        **{k: v for k, v in kept.items() if "proxy" not in k.lower()},
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(root),
    }
