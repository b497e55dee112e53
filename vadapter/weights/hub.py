"""Checkpoints by name: a local folder, one in this package, or a repository of a model hub.

`packaged:NAME` is a folder of `vadapter/weights/packaged`. A hub id is `owner/name` or
`owner/name@revision`, where a revision is a branch, a tag or a commit. The commit is recorded, so
that a run can be repeated after the branch has moved. Only the top folder of a repository is
downloaded, without files that would have to be unpickled. Endpoint, cache, token and offline mode
are those of `huggingface_hub`: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vadapter.config import nearest
from vadapter.errors import CheckpointError, one_line

PACKAGED = "packaged:"
PACKAGE = Path(__file__).parent / "packaged"
WEIGHTS = "*.safetensors"
ALLOW = ("*.json", WEIGHTS, "merges.txt")
# Pickled files, and subfolders: other formats of the same weights, mostly.
_EXCLUDED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*/*"]
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_NO_LEAD = ("/", ".", "~")  # first characters of paths, never of hub ids


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A folder that holds a checkpoint: a local one, or that of a commit of a repository."""

    path: Path
    repo_id: str = ""  # the hub id without its revision
    revision: str = ""  # the commit


def resolve(
    spec: str, *, revision: str | None = None, allow: Sequence[str] = ALLOW,
    shards: Callable[[Path], Sequence[str]] | None = None,
) -> Snapshot:  # fmt: skip
    """Return the folder that `spec` names, downloading a hub id that is not in the cache.

    Args:
      spec: a local folder; `packaged:NAME`; or a hub id, `owner/name` or `owner/name@revision`.
      revision: branch, tag or commit of a hub id; None takes that of `spec`, or "main".
      allow: patterns of the file names to download; pickled files are always excluded.
      shards: from the folder of all files but the weights to the weights files that are needed;
        no others are then downloaded. None, or where it returns none: all.

    Raises:
      CheckpointError: neither a folder nor a hub id; or no such repository or revision, no access,
        or no network and not in the cache. Says what to do.

    Source: `huggingface_hub.snapshot_download`.
    """
    packaged = spec.startswith(PACKAGED)
    folder = _packaged(spec) if packaged else Path(spec).expanduser()
    if spec and folder.is_dir():
        if revision:
            raise CheckpointError(
                f"{spec!r} is a local folder, which has no revision {revision!r}: leave the "
                "revision out, or give a hub id."
            )
        return Snapshot(folder)
    repo_id, _, tag = spec.partition("@")
    if not _REPO_ID.fullmatch(repo_id) or spec.endswith("@") or folder.is_file():
        raise CheckpointError(_neither(spec, folder))
    if tag and revision and tag != revision:
        raise CheckpointError(f"{spec!r} and revision={revision!r} contradict: give one of them.")
    revision = revision or tag or "main"
    if shards is not None:
        snapshot = _download(repo_id, revision, [x for x in allow if x != WEIGHTS])
        revision = snapshot.revision
        if files := shards(snapshot.path):
            allow = [*(x for x in allow if x != WEIGHTS), *files]
    return _download(repo_id, revision, allow)


def _packaged(spec: str) -> Path:
    """Return the folder of `packaged:NAME`; raise CheckpointError if the package has none."""
    folders = {path.parent for path in PACKAGE.rglob("config.json")}
    names = {folder.relative_to(PACKAGE).as_posix(): folder for folder in folders}
    if (name := spec.removeprefix(PACKAGED)) not in names:
        raise CheckpointError(f"{spec!r}: not in this package{nearest(name, names)}")
    return names[name]


def _download(repo_id: str, revision: str, allow: Sequence[str]) -> Snapshot:
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(allow), ignore_patterns=_EXCLUDED
        )
    except Exception as error:  # those of the hub, of its HTTP library, and of the file system
        message = _explain(error, repo_id, revision)
        message = message or _unreachable(error, repo_id, revision, allow)
        raise CheckpointError(message) from error
    return Snapshot(Path(path), repo_id, Path(path).name)  # …/snapshots/<commit>


def files(snapshot: Snapshot) -> list[str]:
    """Return the names of all files of a repository at its commit; [] where the hub is not asked.

    They are only a hint: offline, or without an answer, there are none.
    """
    query = lambda api, repo_id: api.list_repo_files(repo_id, revision=snapshot.revision)  # noqa: E731
    return _names_from(query, snapshot.repo_id)


def repository(spec: str) -> tuple[str, str]:
    """Return (hub id, revision) if `resolve` would use the hub for `spec`, otherwise ("", "")."""
    repo_id, _, revision = spec.partition("@")
    remote = _REPO_ID.fullmatch(repo_id) and not Path(spec).expanduser().is_dir()
    return (repo_id, revision) if remote else ("", "")


def upload(folder: Path, files: Sequence[str], repo_id: str, *, private: bool | None = None) -> str:
    """Upload files of a folder to a repository, creating it if necessary; return its URL.

    Other frozen components of an earlier upload are removed. `private` is the visibility of a new
    repository; None takes the default of its owner.

    Raises:
      CheckpointError: an invalid hub id, a missing file, or the upload fails.

    Source: `huggingface_hub.HfApi.upload_folder`.
    """
    import huggingface_hub

    if not _REPO_ID.fullmatch(repo_id):
        raise CheckpointError(f"{repo_id!r} is not a hub id (owner/name)")
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: export again")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files),
            delete_patterns=["frozen-*.safetensors"], commit_message="Adapter of vadapter",
        )  # fmt: skip
    except Exception as error:  # those of the hub, of its HTTP library, and of the file system
        root = list(_causes(error))[-1]
        raise CheckpointError(
            f"{folder} could not be pushed to {repo_id} ({one_line(root, None)}). Set HF_TOKEN to "
            "a token with write access, or run `hf auth login`."
        ) from error
    return str(url)


def download_command(repo_id: str, revision: str, allow: Sequence[str] = ALLOW) -> str:
    """Return the shell command that downloads the files to a folder named after the repository."""
    command = ["hf", "download", repo_id, "--revision", revision]
    for pattern in allow:
        command += ["--include", pattern]
    for pattern in _EXCLUDED:
        command += ["--exclude", pattern]
    return shlex.join([*command, "--local-dir", repo_id.split("/")[1]])


def _neither(spec: str, folder: Path) -> str:
    """Return the message for something that is neither a folder nor a hub id."""
    if folder.is_file():
        return f"{spec!r} is a file: give the folder that holds it, {str(folder.parent)!r}."
    parent = folder.parent
    beside = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    if spec.startswith(_NO_LEAD) or spec.count("/") > 1:
        missing = "" if parent.is_dir() else f"; {str(parent)!r} does not exist either"
        return f"There is no folder {spec!r}{missing}{_close(folder.name, beside)}"
    return (
        f"{spec!r} is neither an existing folder nor a hub id (owner/name or owner/name@revision, "
        f"such as 'openai-community/gpt2'){_close(spec, beside)}"
    )


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    """Return the message for an error that the hub explains; "" for others."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repo_id}"
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    answer = next((e for e in _causes(error) if isinstance(e, errors.HfHubHTTPError)), None)
    status = getattr(getattr(answer, "response", None), "status_code", 0)
    no_access = "the account of the token in use has no access yet"
    refused = no_access if get_token() else "no token is in use here"
    if isinstance(answer, errors.GatedRepoError):
        return (
            f"{repo_id} is gated, and {refused}. Accept its license at {page}, then set the "
            f"environment variable HF_TOKEN to a token of that account ({tokens})."
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        refs = _names_from(_refs, repo_id)
        return f"{repo_id} has no revision {revision!r}{_close(revision, refs)} See {page}/commits"
    # Without a token the hub answers alike for missing and for private repositories.
    hidden = status == 401 and not get_token()
    if hidden or isinstance(answer, errors.RepositoryNotFoundError):
        models = _names_from(_models, repo_id)
        return (
            f"There is no folder {repo_id!r} here and no such repository at {constants.ENDPOINT}"
            f"{_close(repo_id, models)} If it is private, set the environment variable HF_TOKEN "
            f"to a token that may read it ({tokens})."
        )
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} refuses {repo_id} (HTTP {status}), and {refused}. Set the "
            f"environment variable HF_TOKEN to a valid token that may read it ({tokens})."
        )
    return ""


def _unreachable(error: Exception, repo_id: str, revision: str, allow: Sequence[str]) -> str:
    from huggingface_hub import constants, errors

    root = list(_causes(error))[-1]
    reason = f"{type(root).__name__}: {str(root).strip().splitlines()[0] if str(root) else ''}"
    if constants.HF_HUB_OFFLINE:
        reason = "the environment variable HF_HUB_OFFLINE forbids downloading it"
    partly = getattr(errors, "IncompleteSnapshotError", ())
    state = "only partly in the cache" if isinstance(error, partly) else "not in the cache"
    return (
        f"{repo_id} at revision {revision!r} is {state} ({constants.HF_HUB_CACHE}), and it cannot "
        f"be downloaded from {constants.ENDPOINT} ({reason}).\nOn a machine with internet access, "
        f"run\n  {download_command(repo_id, revision, allow)}\n"
        "then copy the folder to this machine and use its path instead of the hub id."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _models(api, repo_id: str) -> list[str]:
    owner, name = repo_id.split("/")
    of_owner = [model.id for model in api.list_models(author=owner, limit=200)]
    return of_owner or [model.id for model in api.list_models(search=name, limit=20)]


def _refs(api, repo_id: str) -> list[str]:
    refs = api.list_repo_refs(repo_id)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _names_from(query, repo_id: str) -> list[str]:
    """Return the names that the hub lists; none if it fails, as they are only a hint."""
    from huggingface_hub import HfApi

    try:
        return query(HfApi(), repo_id)
    except Exception:
        return []


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
