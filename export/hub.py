"""The Hugging Face Hub: a bundle becomes a model repository with a card, and a repository a bundle."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from prgkit.errors import HubError, PrgkitError, one_line, some
from prgkit.export.bundle.archive import bundle_files
from prgkit.export.bundle.artifact_cache import alone_in, building, is_bundle, require_elsewhere
from prgkit.export.bundle.bundle import open_bundle, read_evaluation
from prgkit.export.bundle.checksums import require_unchanged
from prgkit.export.bundle.manifest import ENGINE, FILE, PARTS, SCHEMA, read_manifest
from prgkit.export.model_card import model_card, published
from prgkit.storage.atomic import fingerprint

CARD = "README.md"
OF_THE_HUB = {".gitattributes"}  # what the Hub puts into a repository itself
NO_TOKEN = "hf auth login, or set HF_TOKEN to a token that may write; https://huggingface.co/settings/tokens makes one"
WITHOUT_ENGINES = "ask its publisher for one without; on a device prgkit export --trt builds them"


class PushOptions(NamedTuple):
    """How a bundle is published."""

    private: bool = False  # a repository that is made; one that exists must be so already
    with_images: bool = False  # the golden and the evaluation images, with their labels
    license: str = "unknown"
    revision: str | None = None  # a branch, made where there is none


def push(folder: Path, repo: str, options: PushOptions) -> str:
    """Publish a bundle as the model repository OWNER/NAME, and return its address; nothing private travels unasked.

    One commit brings models, manifest and card, and removes what an earlier push left there and this one lacks.

    Raises:
        ExportError: the bundle is damaged.
        HubError: there is no token, the repository holds something else, or the Hub cannot be reached or refuses.
    """
    bundle = open_bundle(folder)
    evaluation = read_evaluation(folder)
    for part in PARTS if options.with_images else ():
        require_unchanged(folder, part)
    manifest = published(bundle.manifest, repo.rpartition("/")[2], with_images=options.with_images)
    content = {"schema": SCHEMA, **manifest.to_json()}
    sealed = json.dumps({**content, "digest": fingerprint(content)}, indent=2, ensure_ascii=False) + "\n"
    card = model_card(manifest, repo, options.license, evaluation)
    files: dict[str, Path | bytes] = {FILE: sealed.encode(), CARD: card.encode()}
    files |= {path.relative_to(folder).as_posix(): path for path in bundle_files(folder, manifest)}
    with talking_to_the_hub(repo):
        if huggingface_hub.get_token() is None:
            raise HubError("there is no token to write to the Hub with", fix=NO_TOKEN)
        api = HfApi()
        require_place(api, repo, private=options.private)
        url = api.create_repo(repo, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        stale = set(api.list_repo_files(repo, revision=options.revision)) - files.keys() - OF_THE_HUB
        api.create_commit(
            repo,
            [
                *(CommitOperationDelete(name) for name in sorted(stale)),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
            ],
            commit_message=f"prgkit {manifest.prgkit}: {manifest.student.model}, {len(manifest.classes)} classes",
            revision=options.revision,
        )
    return str(url)


def require_place(api: HfApi, repo: str, *, private: bool) -> None:
    """Refuse a repository that holds something else than a bundle, or that others can read where none may.

    Raises:
        HubError: it is such a one.
    """
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    names = {file.rfilename for file in info.siblings or ()} - OF_THE_HUB - {CARD}
    if names and not (FILE in names and is_bundle_there(api, repo)):
        raise HubError(
            f"this repository holds something that is not a prgkit bundle: {some(sorted(names))}",
            where=repo,
            fix="push to another name",
        )
    if private and not info.private:
        raise HubError(
            "this repository is public", where=repo, fix="make it private on the Hub first, or leave --private"
        )


def is_bundle_there(api: HfApi, repo: str) -> bool:
    """Tell whether a repository's manifest is one of a bundle's, of whatever version."""
    with tempfile.TemporaryDirectory() as folder:
        api.hf_hub_download(repo, FILE, local_dir=folder)
        return is_bundle(Path(folder))


def pull(repo: str, folder: Path, *, revision: str | None = None, note: Callable[[str], None]) -> Path:
    """Bring the bundle of the model repository OWNER/NAME into ``folder``, and return that; every digest is compared.

    A bundle that is there already is replaced when all of the new one is here; what no export made of it stays.

    Raises:
        ExportError: what came is damaged, something else is in ``folder``, or the user stands in it.
        HubError: there is no such repository, it is no bundle, or the Hub cannot be reached or refuses.
    """
    # Where the repository is OWNER/, that is this one, too.
    require_elsewhere(folder, "pull", fix="write OWNER/NAME, or name another folder: --out FOLDER")
    api = HfApi()
    with alone_in(folder), building(folder, "pulled", note=note) as new:
        with talking_to_the_hub(repo):
            try:
                api.hf_hub_download(repo, FILE, revision=revision, local_dir=new)
            except RemoteEntryNotFoundError as error:
                raise HubError(f"this repository is no prgkit bundle: it has no {FILE}", where=repo) from error
        manifest = read_manifest(new)
        if any(artifact.format == ENGINE for artifact in manifest.artifacts):
            raise HubError("this bundle holds engines, which are executable code", where=repo, fix=WITHOUT_ENGINES)
        note(f"{repo}: {sum(artifact.bytes for artifact in manifest.artifacts) / 2**20:,.1f} MiB of models")
        files = [artifact.file for artifact in manifest.artifacts]
        wanted = [CARD, FILE, *files, *(f"{file}/*" for file in files), *manifest.checksums]
        with talking_to_the_hub(repo):
            api.snapshot_download(repo, revision=revision, local_dir=new, allow_patterns=wanted)
        shutil.rmtree(new / ".cache", ignore_errors=True)
        open_bundle(new)
        for part in PARTS:
            require_unchanged(new, part)
    return folder


@contextmanager
def talking_to_the_hub(repo: str) -> Iterator[None]:
    """Say what went wrong on the Hub, or on the way to it."""
    try:
        yield
    except PrgkitError:
        raise
    except RepositoryNotFoundError as error:
        fix = "look at its name; of a private one, the token has to be of somebody who may read it"
        raise HubError("there is no such model repository, or it is not for this token", where=repo, fix=fix) from error
    except RevisionNotFoundError as error:
        raise HubError("the repository has no such revision", where=repo, fix="name a branch, tag or commit") from error
    except HFValidationError as error:
        raise HubError(one_line(error), where=repo, fix="write OWNER/NAME") from error
    except HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        fix = NO_TOKEN if refused else "try again; https://status.huggingface.co says whether the Hub is up"
        raise HubError(f"the Hub refuses: {one_line(error)[:300]}", where=repo, fix=fix) from error
    except (OSError, HTTPError) as error:
        fix = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise HubError(f"the Hub cannot be reached: {one_line(error)[:200]}", where=repo, fix=fix) from error
