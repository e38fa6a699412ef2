"""Pictures: what stands in them, that they are readable, and that the same values give the same bytes."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gguf3n import plots
from gguf3n.errors import OutputError, UsageError
from gguf3n.formats.whole_file import WholeFile
from gguf3n.inspection.network import kind, place, short_name
from gguf3n.plots import (
    KINDS,
    FileMark,
    LayerError,
    Magnitude,
    error_svg,
    write_statistics_plot,
    write_tradeoff_plot,
)
from workshop import checkpoints

SVG = "{http://www.w3.org/2000/svg}"


def network(size: str = "e2b") -> list[Magnitude]:
    """The tensors of a full model, with magnitudes drawn at random."""
    shapes = checkpoints.read_inventory(checkpoints.INVENTORIES / f"gemma-3n-{size}.json")
    rng = np.random.default_rng(0)
    names = sorted(shapes, key=lambda name: place(name).rank)
    return [
        Magnitude(
            short_name(name),
            place(name).section.value,
            place(name).numbers,
            kind(name, shapes[name]).value,
            float(10 ** rng.uniform(-2, 1.5)),
        )
        for name in names
    ]


def errors() -> list[LayerError]:
    rng = np.random.default_rng(1)
    kinds = {"attn_q": 0.07, "attn_v": 0.02, "ffn_down": 0.02, "inp_gate": 0.07, "laurel_l": 2e-4, "other": 0.01}
    made = [LayerError(kind, bid, value * rng.uniform(0.9, 1.1)) for kind, value in kinds.items() for bid in range(30)]
    return [*made, LayerError("token_embd", None, 0.02), LayerError("attn_norm", 0, 0.0)]


def root(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text("utf-8"))


def group(tree: ElementTree.Element, gid: str) -> ElementTree.Element | None:
    return next((element for element in tree.iter(f"{SVG}g") if element.get("id") == gid), None)


def marks(tree: ElementTree.Element, gid: str) -> list[ElementTree.Element]:
    """The marks of one series."""
    series = group(tree, gid)
    return [] if series is None else list(series.iter(f"{SVG}use"))


def texts(tree: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in tree.iter(f"{SVG}text")]


def test_every_tensor_has_its_mark_and_convolutions_are_green_crosses(tmp_path: Path) -> None:
    points = network()
    write_statistics_plot(tmp_path / "x.svg", points, title="model")
    tree = root(tmp_path / "x.svg")
    for name in KINDS:
        assert len(marks(tree, name.replace(" ", "-"))) == sum(point.kind == name for point in points)
    crosses = marks(tree, "convolution")
    assert len(crosses) == 296
    series = group(tree, "convolution")
    assert series is not None
    (shape,) = [path for path in series.iter(f"{SVG}path") if path.get("id")]
    assert len(re.findall("M", shape.get("d", ""))) == 2  # two strokes
    assert all(plots.GREEN in (cross.get("style") or "") for cross in crosses)
    assert {"vision", "audio", "text", "model"} <= set(texts(tree))


def test_marks_stand_at_their_values(tmp_path: Path) -> None:
    """Heights in the picture are linear in the logarithm."""
    values = [0.001, 0.5, 20.0, 300.0]
    points = [Magnitude(f"a{i}", "text", (i,), "matrix", value) for i, value in enumerate(values)]
    write_statistics_plot(tmp_path / "x.svg", points, title="x")
    found = marks(root(tmp_path / "x.svg"), "matrix")
    xs, ys = ([float(mark.get(axis, "nan")) for mark in found] for axis in ("x", "y"))
    slope, start = np.polyfit(np.log10(values), ys, 1)
    assert slope < 0 and np.allclose(np.log10(values) * slope + start, ys, atol=0.01)
    assert np.allclose(np.diff(xs, 2), 0, atol=0.01) and xs == sorted(xs)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_same_values_same_bytes(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        write_statistics_plot(path, network(), errors(), title="x")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert error_svg(errors()) == error_svg(errors())


def test_a_png_is_1200_pixels_wide(tmp_path: Path) -> None:
    write_statistics_plot(tmp_path / "x.PNG", network(), title="x")
    header = (tmp_path / "x.PNG").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") == 1200


def test_the_largest_are_numbered_and_named(tmp_path: Path) -> None:
    points = network()
    write_statistics_plot(tmp_path / "x.svg", points, title="x")
    shown = " ".join(texts(root(tmp_path / "x.svg")))
    convolutions = sorted((p for p in points if p.kind == "convolution"), key=lambda p: -p.value)
    others = sorted((p for p in points if p.kind != "convolution"), key=lambda p: -p.value)
    for number, point in enumerate((*convolutions[:3], *others[:3]), 1):
        assert f"{number}  {plots._cut(point.name)}  {point.value:.3g}" in shown
    assert convolutions[3].name not in shown


@pytest.mark.parametrize("size", ["e2b", "e4b"])
@pytest.mark.parametrize("with_errors", [False, True])
def test_no_text_stands_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, with_errors: bool
) -> None:
    """Every text of the picture, the largest tensors being neighbours with the longest names."""
    points = network(size)
    longest = sorted((p for p in points if p.kind == "convolution"), key=lambda p: -len(p.name))[0].name
    at = next(i for i, point in enumerate(points) if point.name == longest)
    for i in range(at - 3, at + 4):
        points[i] = Magnitude(points[i].name, points[i].section, points[i].numbers, points[i].kind, 98.0)
    figures = []
    make = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda n: figures.append(make(n)) or figures[-1])
    write_statistics_plot(tmp_path / "x.png", points, errors() if with_errors else (), title="x")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    labels = [figure._suptitle]
    for axes in figure.axes:
        labels += [*axes.texts, axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()]
        labels += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in labels if text.get_text()]
    frame = figure.bbox
    for i, (name, box) in enumerate(boxes):
        if frame.y0 <= box.y0 and box.y1 <= frame.y1:  # ticks beyond the axis are not drawn
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, name
        for other, other_box in boxes[:i]:
            assert not box.overlaps(other_box), (name, other)


def test_the_end_of_float16_is_drawn_where_it_is_near(tmp_path: Path) -> None:
    write_statistics_plot(tmp_path / "low.svg", network(), title="x")
    write_statistics_plot(tmp_path / "high.svg", [*network(), Magnitude("a", "text", (), "matrix", 1e4)], title="x")
    label = "float16's largest, 65,504"
    assert label not in texts(root(tmp_path / "low.svg")) and label in texts(root(tmp_path / "high.svg"))


def test_errors_by_kind(tmp_path: Path) -> None:
    made = [*errors(), LayerError("attn_q", 3, 1.4, flagged=True), LayerError("attn_k", None, 0.5, flagged=True)]
    made += [LayerError("attn_q", 4, math.nan), LayerError("attn_q", 5, math.inf)]
    write_statistics_plot(tmp_path / "x.svg", network(), made, title="x")
    tree = root(tmp_path / "x.svg")
    assert len(marks(tree, "kind-attn_v")) == 30
    assert len(marks(tree, "kind-attn_q")) == 31
    assert len(marks(tree, "kind-token_embd")) == 1
    assert group(tree, "kind-attn_norm") is None
    assert len(marks(tree, "flagged")) == 2
    assert "layer; not shown: 1 without any error, 2 whose error is not finite" in texts(tree)
    assert {"attn_q", "laurel_l", "something is wrong", "relative RMS error"} <= set(texts(tree))


@pytest.mark.parametrize("made", [[], [LayerError("attn_norm", 0, 0.0)], [LayerError("token_embd", None, 0.1)]])
def test_few_errors_or_none(made: list[LayerError]) -> None:
    ElementTree.fromstring(error_svg(made))


@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_few_tensors(tmp_path: Path, n: int) -> None:
    write_statistics_plot(tmp_path / "x.svg", network()[:n], title="x")
    assert sum(len(marks(root(tmp_path / "x.svg"), name.replace(" ", "-"))) for name in KINDS) == n


def test_tensors_of_zeros_are_counted_not_drawn(tmp_path: Path) -> None:
    points = [*network()[:10], Magnitude("a", "text", (), "matrix", 0.0)]
    write_statistics_plot(tmp_path / "x.svg", points, title="x")
    assert "tensors in network order, by block or layer; not shown: 1 all zero" in texts(root(tmp_path / "x.svg"))


HOSTILE = "$x^2$ </text><script>a</script>\x1b漢"


def test_names_are_only_text(tmp_path: Path) -> None:
    write_statistics_plot(
        tmp_path / "x.svg", [Magnitude(HOSTILE, "text", (), "matrix", 1)], [LayerError(HOSTILE, 0, 1)], title=HOSTILE
    )
    for tree in (root(tmp_path / "x.svg"), ElementTree.fromstring(error_svg([LayerError(HOSTILE, 0, 1.0)]))):
        assert not list(tree.iter(f"{SVG}script"))
        assert any(text.startswith("$x^2$ </text><script>") for text in texts(tree))


def test_the_inline_picture_takes_the_colours_of_its_page() -> None:
    svg = error_svg(errors())
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "currentColor" in svg and plots.INK not in svg and "#ffffff" not in svg
    assert "<script" not in svg and not re.search(r'(?:href|src)="(?!#)', svg)


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        write_statistics_plot(tmp_path / "x.jpg", network(), title="x")
    (tmp_path / "x.svg").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write_statistics_plot(tmp_path / "x.svg", network(), title="x")
    assert (tmp_path / "x.svg").read_text() == "mine"
    write_statistics_plot(tmp_path / "x.svg", network(), title="x", force=True)
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    with pytest.raises(OutputError):
        write_statistics_plot(tmp_path / "missing" / "x.svg", network(), title="x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for draw in (lambda: write_statistics_plot(tmp_path / "y.svg", network(), title="x"), lambda: error_svg(errors())):
        with pytest.raises(UsageError, match=r"gguf3n\[plot\]"):
            draw()


def test_pyplot_and_its_windows_stay_away() -> None:
    code = (
        "import sys, gguf3n.plots as p; assert 'matplotlib' not in sys.modules; "
        "p.error_svg([p.LayerError('a', 0, 1.0)]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = WholeFile.write

    def run_full(whole: WholeFile, data: bytes) -> None:
        write(whole, data[:100])
        raise OutputError("the disk is full")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(WholeFile, "write", run_full)
    with pytest.raises(OutputError, match="full"):
        write_statistics_plot(tmp_path / "out" / "x.svg", network()[:5], title="x")
    assert not list((tmp_path / "out").iterdir())


def files(n: int, scale: float) -> list[FileMark]:
    return [FileMark(f"Q{number}_K<&>", 3_000_000_000 + number * 10**8, scale * 0.5**number) for number in range(n)]


def test_sizes_against_divergence(tmp_path: Path) -> None:
    """Every series and the chosen file are there; the same values give the same bytes again."""
    series = {"tuned": files(9, 0.1), "our mixtures": files(5, 0.3), "llama.cpp's mixtures": files(5, 0.3)}
    path = tmp_path / "curve.svg"
    write_tradeoff_plot(path, series, FileMark("mine", 3_100_000_000, 0.05), title="a model")
    tree = root(path)
    for label in ("tuned", "our-mixtures", "llama.cpp's-mixtures", "chosen"):
        assert group(tree, label) is not None, label
    text = " ".join("".join(element.itertext()) for element in tree.iter(f"{SVG}text"))
    assert "size of the file, GB" in text and "our mixtures" in text and "mine" in text
    first = path.read_bytes()
    write_tradeoff_plot(path, series, FileMark("mine", 3_100_000_000, 0.05), title="a model", force=True)
    assert path.read_bytes() == first
    with pytest.raises(OutputError, match="exists already"):
        write_tradeoff_plot(path, series, title="a model")


def test_files_that_lose_nothing_are_not_drawn(tmp_path: Path) -> None:
    """A logarithm has no zero."""
    write_tradeoff_plot(tmp_path / "c.png", {"tuned": [FileMark("F32", 10**6, 0.0)]}, title="none")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
