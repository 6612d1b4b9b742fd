"""Model folders on the Hugging Face hub: `hf://owner/name` in place of a folder's path, and pushing a folder there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from utils.errors import UserError, reading

HUB = "hf://"
"""Starts the address of a folder on the hub."""
NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"


def is_on_hub(path: str | Path) -> bool:
    """Return whether a folder's path is an address on the hub."""
    return str(path).startswith("hf:/")  # a Path holds one slash


def address_of(path: str | Path) -> str:
    """Return the address on the hub as it is written, hf://owner/name, also of a Path; empty for a local folder."""
    return re.sub("^hf:/+", HUB, str(path)) if is_on_hub(path) else ""


def local_folder(path: str | Path) -> Path:
    """Return a folder's path, or where a folder from the hub lies after its download.

    Files are downloaded once and kept in huggingface_hub's cache. Without a connection, the cache is used.

    Parameters
    ----------
    path : a folder, or `hf://owner/name`, or `hf://owner/name@revision` with a branch, tag or commit

    Raises
    ------
    UserError
        If the address is malformed, or the folder does not exist, is private, or cannot be reached.
    """
    address = address_of(path)
    if not address:
        return Path(path)
    found = re.fullmatch(rf"{HUB}({NAME})(?:@([^@\s]+))?", address, flags=re.ASCII)
    if not found:
        raise UserError(f"{address}: is not an address on the hub; give hf://owner/name or hf://owner/name@revision")
    from huggingface_hub import snapshot_download  # late: local folders do not wait for it

    with _hub_errors(address):
        return Path(snapshot_download(found[1], revision=found[2]))


def push_folder(folder: Path, files: list[str], repo: str, private: bool, message: str) -> str:
    """Upload files of a folder to a repository on the hub, which is made if it does not exist.

    Parameters
    ----------
    folder, files : the folder, and the names of the files in it to upload
    repo : owner/name
    private : whether a new repository is private
    message : of the commit

    Returns
    -------
    The address of the model's page

    Raises
    ------
    UserError
        If the name is malformed, nobody is logged in, the hub refuses, or it cannot be reached.
    """
    if not re.fullmatch(NAME, repo, flags=re.ASCII):
        raise UserError(f"--repo {repo}: is not a repository's name; give owner/name")
    from huggingface_hub import HfApi

    with _hub_errors(f"--repo {repo}"):
        hub = HfApi()
        page = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=message)
    return str(page)


def front_matter(pipeline: str, tags: list[str], license: str, **more: str) -> str:
    """Return the lines that open a model card and that the hub reads.

    Parameters
    ----------
    pipeline : the hub's word for what the model does; empty for none
    tags : words by which it is found
    license : the hub's name of a licence; `unknown` where none has been chosen
    more : further fields, such as license_name
    """
    fields = {"license": license, **more, "library_name": "scmomer"}
    fields |= {"pipeline_tag": pipeline} if pipeline else {}
    return f"---\n{yaml.safe_dump(fields | {'tags': tags}, sort_keys=False)}---\n\n"


def without_front_matter(card: str) -> str:
    """Return a model card without the lines for the hub."""
    return re.sub(r"\A---\n.*?\n---\n+", "", card, count=1, flags=re.DOTALL)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn the hub's errors in the block into one sentence about `what`, an address or a flag."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with `hf auth login`"
    with reading(what, f"{constants.ENDPOINT} cannot be reached", "connect to the internet, or use a local folder"):
        try:
            yield
        except GatedRepoError as error:
            raise UserError(f"{what}: its owner must grant you access; ask on its page, then {log_in}") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"{what}: does not exist on {constants.ENDPOINT}, or is private; check the name, or {log_in}"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(f"{what}: has no such revision; choose one that its page lists") from error
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{what}: {constants.ENDPOINT} cannot be reached and no complete copy is in the cache; connect to the "
                "internet, or copy the folder here by other means and give its path"
            ) from error
        except LocalTokenNotFoundError as error:
            raise UserError(f"{what}: needs a login to the hub; {log_in}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            remedy = f"{log_in} with an account that may do this" if status in (401, 403) else "try again later"
            raise UserError(f"{what}: {constants.ENDPOINT} has refused (status {status}); {remedy}") from error
