"""The libraries that reach buckets, and what they say when something is wrong.

gcsfs reads and writes objects; google-cloud-storage, which comes with it, makes the requests with
preconditions. Credentials are those of the machine, see Application Default Credentials.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.errors import ConfigError

REACH = 30.0  # seconds in which a bucket has to answer
_LIBRARIES = {"aiohttp", "gcsfs", "google", "requests"}


@functools.cache
def prepare() -> None:
    """Settles how the libraries behave.

    Raises:
      ConfigError: they are not installed.
    """
    if not importlib.util.find_spec("gcsfs"):
        raise ConfigError("gs:// paths need gcsfs: pip install 'vadapter[gs]'")
    import fsspec.config

    # One library, whether or not TensorFlow is there.
    os.environ.setdefault("EPATH_USE_TF", "0")
    # With it each bucket's kind is asked for by another service; zonal buckets need it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "fsspec"):  # they log, with tracebacks, what they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("gcs", "gs"):  # other hosts write, too: no listing is kept
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def filesystem() -> Any:
    """gcsfs, of this process."""
    prepare()
    import fsspec

    return fsspec.filesystem("gcs")


def refusal(error: BaseException) -> str:
    """What a library of buckets has to say, as one line; "" if the error is not one of theirs."""
    if not prepare.cache_info().currsize:
        return ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
            text = " ".join(str(error).split())
            return f"{type(error).__name__}: {text[:240]}"
        trace = trace.tb_next
    return ""


def out_of_reach(error: BaseException) -> bool:
    """Whether a bucket could not be asked, as opposed to not holding what was asked for."""
    if re.match(r"(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED)", str(error)):
        return True  # TensorStore's
    return bool(refusal(error)) and not isinstance(error, FileNotFoundError)


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """What goes wrong with a bucket, wherever it is met, is something to mend.

    Raises:
      ConfigError: says what the library said.
    """
    try:
        yield
    except Exception as error:
        if not (text := refusal(error)):
            raise
        raise ConfigError(
            f"gs://: {text}. Check the bucket, this machine's permissions and its network, then "
            "run the same command again: what was saved is intact."
        ) from error


def require_bucket(path: Path) -> None:
    """Asks for the bucket of a run directory, which Orbax does, too.

    Raises:
      ConfigError: it does not exist, may not be looked at, or cannot be reached.
    """
    if not os.fspath(path).startswith("gs://"):
        return
    from google.api_core.exceptions import Forbidden, NotFound, Unauthorized
    from google.cloud.storage.retry import DEFAULT_RETRY

    name = str(path).split("/")[2]
    try:
        client().get_bucket(name, timeout=REACH, retry=DEFAULT_RETRY.with_timeout(REACH))
    except NotFound:
        raise ConfigError(f"{path}: there is no bucket gs://{name}; create it first") from None
    except (Forbidden, Unauthorized):
        raise ConfigError(
            f"{path}: no permission for gs://{name}; this machine's account needs to read the "
            "bucket (storage.buckets.get) and to read and write its objects"
        ) from None
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"{path}: cannot reach gs://{name} ({type(error).__name__}: {said}); check the network "
            "and the credentials (`gcloud auth application-default login`)"
        ) from error


def client() -> Any:
    """google-cloud-storage, for requests with preconditions, which gcsfs lacks."""
    return _client(os.getpid())


@functools.cache
def _client(pid: int) -> Any:
    del pid  # connections do not survive a fork
    prepare()
    from google.cloud import storage

    return storage.Client()
