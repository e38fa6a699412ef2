"""The date of what is made, so that it can be made again with the same bytes."""

from __future__ import annotations

import os
from datetime import datetime, timezone

from gguf3n.errors import UsageError

VARIABLE = "SOURCE_DATE_EPOCH"


def source_date() -> datetime | None:
    """What SOURCE_DATE_EPOCH says; None where it is not set, and then nothing has a date.

    Source: reproducible-builds.org/specs/source-date-epoch.

    Raises: UsageError for what is no number of seconds.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        if not text.isascii() or not text.isdigit():
            raise ValueError
        return datetime.fromtimestamp(int(text), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{VARIABLE} is no date", expected="seconds since 1970, as `git log -1 --format=%ct` prints", found=text
        ) from error
