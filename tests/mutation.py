"""Changed bytes, as a broken download or a hostile file has them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

Edit = tuple[int, int, int]

edits = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4)

every_run_alike = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mutate(data: bytes, edits: list[Edit]) -> bytes:
    """Set, insert, delete or double bytes."""
    out = bytearray(data)
    for kind, position, value in edits:
        at = position % (len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] = value
        elif kind == 1:
            out.insert(at, value)
        elif kind == 2:
            del out[at : at + value]
        else:
            out[at:at] = out[max(0, at - value) : at]
    return bytes(out)
