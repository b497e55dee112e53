"""Where a checkpoint lies: a local folder, or a repository of a model hub pinned to one commit.

A hub id is `owner/name` or `owner/name@revision`, where a revision is a branch, a tag or a commit.
The commit it stood for is recorded, so that a run can be repeated after the branch has moved.
Only the top folder of a repository is fetched, and of it no file that would have to be unpickled.
Endpoint, cache, token and offline mode are those of `huggingface_hub`: HF_ENDPOINT, HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE.
"""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vadapter.errors import CheckpointError

ALLOW = ("*.json", "*.safetensors", "merges.txt")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_SUBFOLDERS = ("*/*",)  # other formats of the same weights, mostly
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_NO_LEAD = ("/", ".", "~")  # what a path starts with and a hub id does not


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A folder that holds a checkpoint.

    Attributes:
      path: the folder.
      repo_id: the hub id without its revision; "" for a local folder.
      revision: the commit that the folder holds; "" for a local folder.
    """

    path: Path
    repo_id: str = ""
    revision: str = ""


def resolve(spec: str, *, revision: str | None = None, allow: Sequence[str] = ALLOW) -> Snapshot:
    """The folder that `spec` names, downloaded if it is a hub id that is not in the cache.

    Args:
      spec: a local folder, taken as it is, or else a hub id, `owner/name` or `owner/name@revision`.
      revision: branch, tag or commit of a hub id; None takes that of `spec`, else "main".
      allow: patterns of the file names to download; pickled files are never among them.

    Returns:
      The `Snapshot`, with the commit that the revision stood for.

    Raises:
      CheckpointError: neither a folder nor a hub id; or no such repository or revision, no access,
        or no network and not in the cache. Says what to do about it.

    Source: `huggingface_hub.snapshot_download`.
    """
    folder = Path(spec).expanduser()
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
    return _download(repo_id, revision or tag or "main", allow)


def _download(repo_id: str, revision: str, allow: Sequence[str]) -> Snapshot:
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(allow),
            ignore_patterns=[*PICKLED, *_SUBFOLDERS],
        )
    except Exception as error:  # those of the hub, of its HTTP library, and of the file system
        message = _explain(error, repo_id, revision) or _unreachable(
            error, repo_id, revision, allow
        )
        raise CheckpointError(message) from error
    return Snapshot(Path(path), repo_id, Path(path).name)  # …/snapshots/<commit>


def repository(spec: str) -> tuple[str, str]:
    """(hub id, revision) of what `resolve` would look for in a hub; ("", "") of any other."""
    repo_id, _, revision = spec.partition("@")
    remote = _REPO_ID.fullmatch(repo_id) and not Path(spec).expanduser().is_dir()
    return (repo_id, revision) if remote else ("", "")


def upload(folder: Path, files: Sequence[str], repo_id: str, *, private: bool | None = None) -> str:
    """Puts files of a folder into a repository, in one commit; makes it if there is none.

    Args:
      files: their names; frozen parts of an earlier upload that are not among them are removed.
      repo_id: `owner/name`.
      private: of a new repository; None leaves it to the settings of its owner.

    Returns:
      The address of the repository.

    Raises:
      CheckpointError: no hub id, a file that is not there, or the hub refuses or does not answer.

    Source: `huggingface_hub.HfApi.upload_folder`.
    """
    import huggingface_hub

    if not _REPO_ID.fullmatch(repo_id):
        raise CheckpointError(f"{repo_id!r} is not a hub id, which reads owner/name")
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
        reason = f"{type(root).__name__}: {' '.join(str(root).split())}"
        raise CheckpointError(
            f"{folder} could not be pushed to {repo_id} ({reason}). A token that may write there "
            "belongs in the environment variable HF_TOKEN, or run `hf auth login`."
        ) from error
    return str(url)


def download_command(repo_id: str, revision: str, allow: Sequence[str] = ALLOW) -> str:
    """The shell command that fetches the same files into a folder of the repository's name."""
    command = ["hf", "download", repo_id, "--revision", revision]
    for pattern in allow:
        command += ["--include", pattern]
    for pattern in (*PICKLED, *_SUBFOLDERS):
        command += ["--exclude", pattern]
    return shlex.join([*command, "--local-dir", repo_id.split("/")[1]])


def _neither(spec: str, folder: Path) -> str:
    """What is wrong with something that is neither a folder nor a hub id."""
    if folder.is_file():
        return f"{spec!r} is a file: give the folder that holds it, {str(folder.parent)!r}."
    parent = folder.parent
    beside = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    if spec.startswith(_NO_LEAD) or spec.count("/") > 1:
        where = "" if parent.is_dir() else f"; {str(parent)!r} does not exist either"
        return f"There is no folder {spec!r}{where}{_close(folder.name, beside)}."
    return (
        f"{spec!r} is neither a folder{_close(spec, beside)} nor a hub id, which reads owner/name "
        "or owner/name@revision, as in 'openai-community/gpt2'."
    )


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    """The message for a clear answer of the hub; "" if it gave none."""
    from huggingface_hub import HfApi, constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repo_id}"
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    answer = next((e for e in _causes(error) if isinstance(e, errors.HfHubHTTPError)), None)
    status = getattr(getattr(answer, "response", None), "status_code", 0)
    refused = (
        "the account of the token in use has no access yet"
        if get_token()
        else "no token is in use here"
    )
    if isinstance(answer, errors.GatedRepoError):
        return (
            f"{repo_id} is gated, and {refused}. Accept its license at {page}, then set the "
            f"environment variable HF_TOKEN to a token of that account ({tokens})."
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        refs = _asked(lambda: _refs(HfApi(), repo_id))
        return f"{repo_id} has no revision {revision!r}{_close(revision, refs)}; see {page}/commits"
    # The hub gives away what is private to nobody: without a token both are "not allowed".
    hidden = status == 401 and not get_token()
    if hidden or isinstance(answer, errors.RepositoryNotFoundError):
        known = _asked(lambda: _models(HfApi(), repo_id))
        return (
            f"There is no folder {repo_id!r} here and no such repository at {constants.ENDPOINT}"
            f"{_close(repo_id, known)}. If it is private, set the environment variable HF_TOKEN to "
            f"a token that may read it ({tokens})."
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
        reason = "the environment variable HF_HUB_OFFLINE forbids to fetch it"
    partly = getattr(errors, "IncompleteSnapshotError", ())
    state = "only partly in the cache" if isinstance(error, partly) else "not in the cache"
    return (
        f"{repo_id} at revision {revision!r} is {state} ({constants.HF_HUB_CACHE}), and it cannot "
        f"be fetched from {constants.ENDPOINT} ({reason}).\nWhere there is a network, run\n"
        f"  {download_command(repo_id, revision, allow)}\n"
        "bring the folder here, and give its path in the place of the hub id."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
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


def _asked(question) -> list[str]:
    """The names that the hub answers with; none if it does not: they are only a hint."""
    try:
        return question()
    except Exception:
        return []


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
