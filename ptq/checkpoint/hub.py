"""A finished checkpoint on the Hugging Face hub.

The token is found as huggingface_hub finds it (``hf auth login``, HF_TOKEN); ptq neither takes nor
keeps one. What is not complete, or not what its sums say, is not uploaded. The files go up in one
commit: nobody sees half of them.
"""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ptq.checkpoint.checksums import SUMS, differences, read_sums
from ptq.checkpoint.reader import Checkpoint


def check_push(repository: str, api: HfApi | None = None) -> None:
    """Whether an upload can succeed, as far as that can be told before hours of work.

    Raises:
        ValueError: ``repository`` is no name of one, or nobody is logged in.
        OSError: the hub does not answer, or does not know the token.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {repository}: {_line(error)}") from error
    if repository.count("/") != 1:
        raise ValueError(f"--push-to-hub {repository}: give OWNER/NAME")
    if get_token() is None:
        raise ValueError(
            f"--push-to-hub {repository}: nobody is logged in to the hub; run hf auth login, or "
            "set HF_TOKEN"
        )
    try:
        (api or HfApi()).whoami()
    except (HfHubHTTPError, OSError) as error:
        raise OSError(f"--push-to-hub {repository}: {_line(error)}") from error


def push(
    checkpoint: Path, repository: str, *, private: bool = False, api: HfApi | None = None
) -> str:
    """Upload a checkpoint as a model, which is made if it is not there; return its address.

    Only files that the sums list go up, and the sums.

    Raises:
        FileNotFoundError: there is no finished checkpoint.
        ValueError: it is not what it should be: nothing is uploaded.
        OSError: the hub refuses; the checkpoint stays where it is.
    """
    Checkpoint(checkpoint)  # neither an unfinished one nor another kind of model
    if problems := list(differences(checkpoint)):
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        raise ValueError(f"nothing is uploaded: {problems[0]}{more} (ptq verify {checkpoint})")
    api = api or HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=str(checkpoint),
            allow_patterns=[*sorted(read_sums(checkpoint)), SUMS],
            commit_message="Upload a checkpoint of ptq",
        )
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"{checkpoint} is complete and was not uploaded to {repository}: {_line(error)}; try "
            f"again with ptq push {checkpoint} {repository}"
        ) from error
    return str(done.commit_url)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
