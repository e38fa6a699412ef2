"""Commands on the Hub's own machines ("HF Jobs"), through huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence

from gguf3n.errors import HubError
from gguf3n.formats.hub import causes_of, found_in, status_of

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def submit_job(
    namespace: str, image: str, command: Sequence[str], *, flavor: str, timeout_seconds: int
) -> tuple[str, str]:
    """Start a command; gives its id and address. The token goes with it as a secret, HF_TOKEN.

    Raises: HubError.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise HubError("no token for the Hub, which a job needs to upload", fix=LOG_IN)
    try:
        job = HfApi(library_name="gguf3n").run_job(
            image=image,
            command=list(command),
            secrets={"HF_TOKEN": token},
            flavor=flavor,
            timeout=timeout_seconds,
            namespace=namespace,
        )
    except Exception as error:
        causes = causes_of(error)
        status = next((code for code in map(status_of, causes) if code is not None), None)
        fix = LOG_IN if status in (401, 403) else "see huggingface.co/settings/jobs; run the same command again"
        raise HubError(f"{namespace}: the Hub does not start the job", found=found_in(causes), fix=fix) from error
    return str(job.id), str(job.url)
