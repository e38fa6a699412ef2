"""The loopback Hub that publications are sent to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.hub_uploads import UploadHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A Hub, and a client in this process that knows no other."""
    from huggingface_hub import constants

    server = UploadHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url())
    template = server.url() + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_tests")
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()
