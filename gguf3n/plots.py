"""Pictures: the maximum magnitude over the network, the error a layer, and files' sizes against what they lose.

matplotlib is imported when a picture is made, and only its Figure, never pyplot: no window, no state that a caller
shares. The same values give the same bytes. Colours are of the palette of Okabe and Ito, which people tell apart
whatever their eyes, and no meaning hangs on a colour alone.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import UsageError
from gguf3n.formats.half import F16_MAX
from gguf3n.formats.whole_file import check_output, write_whole

SUFFIXES = (".png", ".svg")

INK, FAINT = "#1f2328", "#8c959f"
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"

KINDS: dict[str, tuple[str, str, str, int, float]] = {
    "convolution": ("convolutions", GREEN, "x", 30, 1.4),
    "matrix": ("matrices", BLUE, "o", 14, 0.0),
    "norm or scale": ("norms and scales", ORANGE, "o", 6, 0.0),
}
"""Kind of tensor -> legend, colour, marker, size, width of its line."""

FAMILIES: tuple[tuple[str, str], ...] = (
    ("attn_", BLUE),
    ("ffn_", VERMILION),
    ("inp_gate", GREEN),
    ("proj", GREEN),
    ("laurel_", PURPLE),
    ("altup_", PURPLE),
)
"""Beginning of a kind's name -> colour of its line. Kinds of one family differ in marker and dashes."""

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))

N_LABELLED = 3
"""Of the convolutions, and of all other tensors: the largest get a number, and their names stand below."""

NAME_LENGTH, TITLE_LENGTH = 38, 90

WIDTH, PANEL_HEIGHT, DPI = 12.0, 6.2, 100
TICK_STRIDES = (1, 2, 5, 10, 20, 50)
TICK_PIXELS = 36
CHARACTER_PIXELS = 10
"""Of a label at an axis, rather more than it has."""
LABEL_OFFSETS = ((0, 9), (9, 0), (-9, 0), (9, 9), (-9, 9), (0, 18), (0, -9), (14, 14), (-14, 14), (0, 27))
"""Where a number may stand beside its mark, in points, the first that is free."""


GIB = 1 << 30

LEAST_SHOWN = 1e-4
"""Share of the largest error: below it is the rounding of 16-bit tensors, which would take the space of all others."""


@dataclass(frozen=True)
class Magnitude:
    """The maximum magnitude of a tensor. `kind` is one of KINDS; `numbers` are those of its layer or block."""

    name: str
    section: str
    numbers: tuple[int, ...]
    kind: str
    value: float


@dataclass(frozen=True)
class LayerError:
    """The relative RMS error of a tensor. `bid` is None outside the layers; `flagged`: something is wrong with it."""

    kind: str
    bid: int | None
    error: float
    flagged: bool = False


@dataclass(frozen=True)
class FileMark:
    """A file's size against how far it is from its source. Units: bytes; nats a token."""

    name: str
    n_bytes: int
    divergence: float


def check_plot(path: Path, *, force: bool) -> None:
    """Refuse a picture that can't be made, before any work is done.

    Raises: UsageError for another suffix, or without matplotlib; OutputError for a path that can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: no such kind of picture", expected=f"a name ending in {' or '.join(SUFFIXES)}")
    check_matplotlib()
    check_output(path, force=force)


def check_matplotlib() -> None:
    """Raises: UsageError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib, which is not installed", fix="pip install 'gguf3n[plot]'")


def write_statistics_plot(
    path: Path,
    magnitudes: Sequence[Magnitude],
    errors: Sequence[LayerError] = (),
    *,
    title: str,
    force: bool = False,
) -> None:
    """The magnitudes over the network, and below them the errors where there are some.

    Args:
        path: ends in .png or .svg.
        magnitudes: in network order.

    Raises: as `check_plot`.
    """
    check_plot(path, force=force)
    with _style():
        figure = _figure(2 if errors else 1)
        figure.suptitle(_cut(_shown(title), TITLE_LENGTH), fontweight="bold")
        panels = figure.subplots(2 if errors else 1, squeeze=False)[:, 0]
        numbers = _draw_magnitudes(panels[0], magnitudes)
        if errors:
            _draw_errors(panels[1], errors)
        figure.draw_without_rendering()  # what follows depends on the size of the panels
        _draw_sections(panels[0], magnitudes)
        _place_numbers(panels[0], numbers)
        data = _rendered(figure, path.suffix.lower()[1:])
    write_whole(path, data, force=force)


@dataclass(frozen=True)
class SizePoint:
    """A file of a repository: its size in bytes, and how far its next tokens are from the original's, in nats."""

    name: str
    n_bytes: int
    divergence: float
    is_recommended: bool = False


def size_svg(points: Sequence[SizePoint]) -> str:
    """Size against divergence of the files of a repository, as a page of its own that lies on white.

    Raises: UsageError without matplotlib.
    """
    check_matplotlib()
    with _style():
        figure = _figure(1)
        axes = figure.subplots()
        shown = sorted((p for p in points if 0 < p.divergence < math.inf), key=lambda p: (p.n_bytes, p.name))
        axes.set_yscale("log")
        for gid, wanted, colour, marker, label in (
            ("files", False, BLUE, "o", "files"),
            ("recommended", True, VERMILION, "D", "recommended"),
        ):
            some = [point for point in shown if point.is_recommended is wanted]
            if some:
                xs, ys = [point.n_bytes / GIB for point in some], [point.divergence for point in some]
                axes.scatter(xs, ys, s=48, c=colour, marker=marker, label=label, zorder=3).set_gid(gid)
        _scale(axes, [point.divergence for point in shown])
        axes.margins(x=0.12)
        axes.set_ylabel("mean KL divergence, nats")
        n_hidden = len(points) - len(shown)
        axes.set_xlabel("size, GiB" + (f"; not shown: {n_hidden} of no or no finite divergence" if n_hidden else ""))
        names = [_label(axes, _cut(_shown(point.name)), (point.n_bytes / GIB, point.divergence)) for point in shown]
        _legend(axes, below=True)
        figure.draw_without_rendering()
        _place_numbers(axes, names)
        return _rendered(figure, "svg").decode()


def error_svg(errors: Sequence[LayerError]) -> str:
    """The errors a layer as an SVG element for a page: it takes the page's text colour and has no background.

    Raises: UsageError without matplotlib.
    """
    check_matplotlib()
    with _style():
        figure = _figure(1)
        _draw_errors(figure.subplots(), errors)
        for part in (figure, *figure.axes):
            part.patch.set_visible(False)
        text = _rendered(figure, "svg").decode()
    return text[text.index("<svg") :].replace(INK, "currentColor").strip()


SERIES = ((BLUE, "o", "-"), (GREEN, "s", "none"), (VERMILION, "D", "none"))
"""Colour, marker and line of the first, second and third series of files."""


def write_tradeoff_plot(
    path: Path,
    series: Mapping[str, Sequence[FileMark]],
    chosen: FileMark | None = None,
    *,
    title: str,
    force: bool = False,
) -> None:
    """The divergence of files over their sizes.

    Args:
        path: ends in .png or .svg.
        series: by their labels: first one that is drawn as a line, then up to two whose marks have names.
        chosen: one of the files, to be marked.

    Raises: as `check_plot`.
    """
    check_plot(path, force=force)
    with _style():
        figure = _figure(1)
        figure.suptitle(_cut(_shown(title), TITLE_LENGTH), fontweight="bold")
        axes = figure.subplots()
        names = _draw_tradeoff(axes, series, chosen)
        figure.draw_without_rendering()
        _place_numbers(axes, names, hide=True)
        data = _rendered(figure, path.suffix.lower()[1:])
    write_whole(path, data, force=force)


def _draw_tradeoff(axes: Any, series: Mapping[str, Sequence[FileMark]], chosen: FileMark | None) -> list[Any]:
    """Returns the names of files, to be placed once the size of the panel is known."""
    sizes = [mark.n_bytes for marks in series.values() for mark in marks]
    unit, name = (1e9, "GB") if max(sizes, default=0) >= 1e9 else (1e6, "MB")
    axes.set_yscale("log")
    names: list[tuple[str, tuple[float, float]]] = []
    heights: list[float] = []
    for (label, marks), (colour, marker, line) in zip(series.items(), SERIES, strict=False):
        points = {(mark.n_bytes / unit, mark.divergence): mark.name for mark in marks if mark.divergence > 0}
        heights += [height for _, height in points]
        (drawn,) = axes.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4.5,
            linestyle=line, linewidth=1.2, label=label,
        )  # fmt: skip
        drawn.set_gid(label.replace(" ", "-"))
        if line == "none":
            names += [(name, at) for at, name in points.items()]
    if chosen is not None and chosen.divergence > 0:
        ring = axes.scatter(
            [chosen.n_bytes / unit], [chosen.divergence], s=120, facecolors="none", edgecolors=INK, linewidths=1.6,
            label=_shown(chosen.name), zorder=4,
        )  # fmt: skip
        ring.set_gid("chosen")
    _scale(axes, heights)
    axes.set_ylabel("expected KL divergence, nats a token")
    axes.set_xlabel(f"size of the file, {name}")
    _legend(axes, below=False)
    return [_number(axes, _cut(_shown(text)), at, size=8) for text, at in names]


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings while a picture is made. Why: names of tensors are text, not formulas."""
    import matplotlib

    settings = {
        "svg.hashsalt": "gguf3n",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
        ),
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(n_panels: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, n_panels * PANEL_HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rendered(figure: Any, form: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    figure.savefig(out, format=form, dpi=DPI if form == "png" else 72, metadata=metadata)
    return out.getvalue()


def _shown(name: str) -> str:
    """What the font has. Why: a file may call its tensors anything, and a missing glyph is a warning."""
    return "".join(c if c.isprintable() else "?" for c in name).encode("ascii", "backslashreplace").decode()


def _cut(name: str, length: int = NAME_LENGTH) -> str:
    """Without its middle where it is long. Why: what differs is at both ends."""
    return name if len(name) <= length else f"{name[: length // 2 - 3]}...{name[-length // 2 :]}"


def _draw_magnitudes(axes: Any, magnitudes: Sequence[Magnitude]) -> list[Any]:
    """Returns the numbers of the largest, to be placed once the size of the panel is known."""
    shown = [(x, point) for x, point in enumerate(magnitudes) if point.value > 0]
    axes.set_yscale("log")
    for kind, (label, colour, marker, size, line) in KINDS.items():
        points = [(x, point.value) for x, point in shown if point.kind == kind]
        if points:
            xs, ys = zip(*points, strict=True)
            marks = axes.scatter(
                xs, ys, s=size, c=colour, marker=marker, linewidths=line, label=f"{label} ({len(points)})"
            )
            marks.set_gid(kind.replace(" ", "-"))
            marks.set_zorder(3 if kind == "convolution" else 2)
    axes.set_xlim(-0.01 * len(magnitudes) - 1, 1.01 * len(magnitudes))
    _scale(axes, [point.value for _, point in shown])
    if axes.get_ylim()[1] > F16_MAX / 10:
        axes.set_ylim(top=max(axes.get_ylim()[1], 2 * F16_MAX))
        axes.axhline(F16_MAX, color=VERMILION, linestyle="--", linewidth=1.2, label="float16's largest, 65,504")
    axes.set_ylabel("maximum magnitude")
    n_zero = len(magnitudes) - len(shown)
    note = f"; not shown: {n_zero} all zero" if n_zero else ""
    axes.set_xlabel(f"tensors in network order, by block or layer{note}")
    return _number_largest(axes, shown)


def _number_largest(axes: Any, shown: Sequence[tuple[int, Magnitude]]) -> list[Any]:
    """Number the largest tensors, and list their names below, at the left of the legend."""
    largest: list[tuple[int, Magnitude]] = []
    for convolutions in (True, False):
        group = [item for item in shown if (item[1].kind == "convolution") is convolutions]
        largest += sorted(group, key=lambda item: -item[1].value)[:N_LABELLED]
    names = [f"{i}  {_cut(_shown(point.name))}  {point.value:.3g}" for i, (_, point) in enumerate(largest, 1)]
    columns = ["\n".join(names[i : i + N_LABELLED]) for i in range(0, len(names), N_LABELLED)]
    for left, text in zip((0.0, 0.37), columns, strict=False):
        axes.text(left, -0.135, text, transform=axes.transAxes, va="top", fontsize=10, linespacing=1.4)
    _legend(axes, below=True)
    return [_number(axes, str(i), (x, point.value)) for i, (x, point) in enumerate(largest, 1)]


def _draw_sections(axes: Any, magnitudes: Sequence[Magnitude]) -> None:
    """A band, a name and the numbers of layers for each section."""
    if not magnitudes:
        return
    pixels = axes.get_window_extent().width / max(len(magnitudes), 1)
    starts = [i for i, point in enumerate(magnitudes) if i == 0 or point.section != magnitudes[i - 1].section]
    ticks: dict[int, str] = {}
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(magnitudes)], strict=True)):
        if number % 2:
            axes.axvspan(start - 0.5, end - 0.5, color=FAINT, alpha=0.12, linewidth=0)
        section = magnitudes[start].section
        axes.text(
            (start + end - 1) / 2, 1.01, section, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
            fontweight="bold",
        )  # fmt: skip
        ticks |= _numbered(magnitudes, start, end, pixels)
    kept: list[int] = []
    for x in ticks:
        if not kept or (x - kept[-1]) * pixels >= _room(ticks[x]):
            kept.append(x)
    axes.set_xticks(kept, [ticks[x] for x in kept])


def _numbered(magnitudes: Sequence[Magnitude], start: int, end: int, pixels: float) -> dict[int, str]:
    """Position -> number of the layers of one section that have room for it."""
    firsts: dict[tuple[int, ...], int] = {}
    for x in range(start, end):
        if magnitudes[x].numbers:
            firsts.setdefault(magnitudes[x].numbers, x)
    for stride in TICK_STRIDES:
        chosen = {x: ".".join(map(str, numbers)) for numbers, x in firsts.items() if numbers[-1] % stride == 0}
        positions = list(chosen)
        spaces = sorted((b - a) * pixels for a, b in itertools.pairwise(positions))
        if not spaces or spaces[len(spaces) // 2] >= max(map(_room, chosen.values())):
            break
    return chosen


def _room(label: str) -> int:
    """Pixels from the label before it, so that a reader sees two."""
    return max(TICK_PIXELS, CHARACTER_PIXELS * (len(label) + 1))


def _draw_errors(axes: Any, errors: Sequence[LayerError]) -> None:
    finite = [error for error in errors if 0 < error.error < math.inf]
    floor = LEAST_SHOWN * max((error.error for error in finite), default=0.0)
    usable = [error for error in finite if error.flagged or error.error >= floor]
    kinds: dict[str, list[LayerError]] = {}
    for error in usable:
        kinds.setdefault(error.kind, []).append(error)
    axes.set_yscale("log")
    used: dict[str, int] = {}
    outside = -max((error.bid for error in usable if error.bid is not None), default=0) / 20 - 1
    for kind, points in sorted(kinds.items(), key=lambda item: (item[1][0].bid is None, *_family(item[0]), item[0])):
        colour = _family(kind)[1] if points[0].bid is not None else FAINT
        number = used[colour] = used.get(colour, -1) + 1
        points = sorted(points, key=lambda error: -1 if error.bid is None else error.bid)
        (line,) = axes.plot(
            [outside if error.bid is None else error.bid for error in points],
            [error.error for error in points],
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5 if points[0].bid is not None else 7,
            linestyle=DASHES[number % len(DASHES)] if points[0].bid is not None else "none",
            linewidth=1.0,
            label=_cut(_shown(kind)),
        )
        line.set_gid(f"kind-{_shown(kind)}")
    flagged = [error for error in usable if error.flagged]
    if flagged:
        xs = [outside if error.bid is None else error.bid for error in flagged]
        rings = axes.scatter(
            xs, [error.error for error in flagged], s=110, facecolors="none", edgecolors=INK, linewidths=1.4,
            label="something is wrong", zorder=4,
        )  # fmt: skip
        rings.set_gid("flagged")
    _scale(axes, [error.error for error in usable])
    bids = sorted({error.bid for error in usable if error.bid is not None})
    stride = next((n for n in TICK_STRIDES if len(bids) / n <= 20), TICK_STRIDES[-1])
    ticks = {float(bid): str(bid) for bid in bids if bid % stride == 0}
    if any(error.bid is None for error in usable):
        ticks = {outside: "no\nlayer", **ticks}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_ylabel("relative RMS error")
    n_exact = sum(error.error == 0 for error in errors)
    hidden = [
        (n_exact, "without any error"),
        (len(finite) - len(usable), f"below {floor:.1g}"),
        (len(errors) - len(finite) - n_exact, "whose error is not finite"),
    ]
    notes = [f"{n} {what}" for n, what in hidden if n]
    axes.set_xlabel("layer" + (f"; not shown: {', '.join(notes)}" if notes else ""))
    _legend(axes, below=False)


def _family(kind: str) -> tuple[int, str]:
    """Place and colour of a kind."""
    found = (i for i, (prefix, _) in enumerate(FAMILIES) if kind.startswith(prefix))
    index = next(found, len(FAMILIES))
    return index, FAMILIES[index][1] if index < len(FAMILIES) else FAINT


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of plain numbers, with room for all values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values, default=0.1), max(values, default=1.0)
    axes.set_ylim(low / 1.6, high * 1.6)
    decades = math.log10(high / low * 2.56)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: Any, *, below: bool) -> None:
    """Outside the axes: below them in a row, or at their right in a column."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if below:
        place = {"loc": "upper right", "bbox_to_anchor": (1, -0.135), "ncols": 1}
    else:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    legend = axes.legend(frameon=False, borderaxespad=0, handlelength=3, **place)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([36])


def _number(axes: Any, text: str, at: tuple[float, float], size: int = 10) -> Any:
    """A number or a name beside a mark, with a halo."""
    from matplotlib.patheffects import withStroke

    return _label(axes, text, at, size, path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _label(axes: Any, text: str, at: tuple[float, float], size: int = 10, **style: Any) -> Any:
    """A text beside a mark, for `_place_numbers` to move."""
    return axes.annotate(
        text, at, xytext=LABEL_OFFSETS[0], textcoords="offset points", va="center", ha="center", fontsize=size,
        fontweight="bold", zorder=5, annotation_clip=False, **style,
    )  # fmt: skip


def _place_numbers(axes: Any, numbers: Sequence[Any], *, hide: bool = False) -> None:
    """Move each number to the first of LABEL_OFFSETS where it is clear of the others and their marks.

    Args:
        hide: those that are clear nowhere.
    """
    renderer = axes.figure.canvas.get_renderer()
    marks = axes.transData.transform([number.xy for number in numbers]) if numbers else []
    taken: list[Any] = []
    for number in numbers:
        for offset in LABEL_OFFSETS:
            number.set_position(offset)
            box = number.get_window_extent(renderer).padded(1)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*mark) for mark in marks):
                break
        else:
            if hide:
                number.set_visible(False)
                continue
        taken.append(box)
