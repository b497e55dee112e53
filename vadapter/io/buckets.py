"""The libraries that access buckets, and their errors.

gcsfs reads and writes objects; google-cloud-storage, which it depends on, makes the requests with
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

from vadapter.errors import ConfigError, one_line

REACH = 30.0  # seconds for a bucket to answer
_LIBRARIES = {"aiohttp", "gcsfs", "google", "requests"}


@functools.cache
def prepare() -> None:
    """Configure the libraries, once. Raises ConfigError if they are not installed."""
    if not importlib.util.find_spec("gcsfs"):
        raise ConfigError("gs:// paths need gcsfs: pip install 'vadapter[gs]'")
    import fsspec.config

    # etils would otherwise use TensorFlow where it is installed.
    os.environ.setdefault("EPATH_USE_TF", "0")
    # It queries the kind of each bucket from another service; only zonal buckets need it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "fsspec"):  # they also log, with tracebacks, what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("gcs", "gs"):  # other hosts write too, so listings go stale
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def filesystem() -> Any:
    """Return the gcsfs file system of this process."""
    prepare()
    import fsspec

    return fsspec.filesystem("gcs")


def refusal(error: BaseException) -> str:
    """Return the error of one of these libraries as a line; "" if it comes from elsewhere."""
    if not prepare.cache_info().currsize:
        return ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
            return one_line(error, 240)
        trace = trace.tb_next
    return ""


def out_of_reach(error: BaseException) -> bool:
    """Return whether a bucket did not answer, as opposed to not having an object."""
    if re.match(r"(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED)", str(error)):
        return True  # from TensorStore
    return bool(refusal(error)) and not isinstance(error, FileNotFoundError)


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """Turn errors of the libraries into a ConfigError with their message."""
    try:
        yield
    except Exception as error:
        if not (text := refusal(error)):
            raise
        raise ConfigError(
            f"gs://: {text}. Check the bucket, this machine's permissions and its network, then "
            "run the same command again: everything saved is intact."
        ) from error


def require_bucket(path: Path) -> None:
    """Refuse a run directory whose bucket cannot be used, as Orbax would later.

    Raises:
      ConfigError: the bucket does not exist, is not accessible, or does not answer.
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
        raise ConfigError(
            f"{path}: cannot reach gs://{name} ({one_line(error, 160)}); check the network and the "
            "credentials (`gcloud auth application-default login`)"
        ) from error


def client() -> Any:
    """Return a google-cloud-storage client, for requests with preconditions, which gcsfs lacks."""
    return _client(os.getpid())


@functools.cache
def _client(pid: int) -> Any:
    del pid  # connections do not survive a fork
    prepare()
    from google.cloud import storage

    return storage.Client()
