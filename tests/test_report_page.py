"""The HTML report: what is on the page, that nothing outside it is needed, and what it does with odd data."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.passes import Status, Transform
from mq_ao.quantizer.report import Decision
from mq_ao.report import (
    NodeQuality,
    PageData,
    RangeRow,
    Size,
    VarianceProfile,
    plots,
)
from mq_ao.report.page import render, write

ROLES = ("in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj")
SECTIONS = ("rewrites", "variances", "ranges", "quality", "decisions", "sizes", "blocks", "recipe")
VOID = {"meta", "input", "br", "img"}


class Page(HTMLParser):
    """Reads a page, checks that tags nest, and keeps visible text, attributes and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_data(layers: int, width: int) -> PageData:
    """A page with every section, of lognormal channels and two outlier channels in out_proj's input."""
    generator = torch.Generator().manual_seed(0)

    def channels(count: int) -> torch.Tensor:
        return torch.exp(torch.randn(count, generator=generator))

    profiles = [
        VarianceProfile(where, channels(count), channels(count).sqrt(), torch.ones(count))
        for where, count in [
            ("residual stream", width),
            *((f"layers.{i}.mixer: dt", width // 16) for i in range(layers)),
        ]
    ]
    ranges, nodes, decisions = [], [], []
    for layer in range(layers):
        for role in ROLES:
            maxima = channels(2 * width)
            if role == "out_proj":
                maxima[:2] *= 100
            module = f"layers.{layer}.mixer.{role}"
            ranges.append(RangeRow(role, module, -1.5, 2.5, maxima, 1.25))
            nodes.append(NodeQuality(f"{role}_{layer}", module, role, 40.0 - layer, f"(2, s77, {2 * width})"))
            known = Role(role) if role != "scan" else None
            decisions.append(Decision(f"{role}_{layer}", module, known, known is not None, f"detail of {role}"))
    transforms = [Transform("rotate", "R1", "residual stream", Status.APPLIED, "KLT x Hadamard")]
    transforms += [Transform("smooth", "S2", f"layers.{i}.mixer", Status.APPLIED, f"scale {i}") for i in range(layers)]
    transforms += [Transform("rotate_dt", "R5", "layers.0.mixer", Status.LEFT_OUT, "no Hadamard order for 7")]
    return PageData(
        title="a model",
        recipe="mambaquant-w8a8",
        recipe_text="recipe mambaquant-w8a8\npasses: smooth, rotate",
        batches=32,
        tokens=16384,
        versions={"torch": "2.13.0"},
        blocks="\n".join(f"block {i}" for i in range(layers)),
        transforms=tuple(transforms),
        decisions=tuple(decisions),
        sizes=(Size("in_proj", 4_000_000, 1_010_000), Size("head", 8_000_000, 2_020_000)),
        variances=tuple(profiles),
        ranges=tuple(ranges),
        nodes=tuple(nodes),
    )


@pytest.fixture(scope="module")
def data() -> PageData:
    return page_data(7, 384)


@pytest.fixture(scope="module")
def page(data: PageData) -> Page:
    return Page(render(data))


def test_every_section_is_there_and_none_is_empty(page: Page) -> None:
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == list(SECTIONS)
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == [f"#{section}" for section in SECTIONS]
    assert [attributes for _, attributes in page.tags if attributes.get("class") == "none"] == []


def test_headline_figures(page: Page) -> None:
    head = page.text[: page.text.index("Rewrites of the float graph")]
    for text in ("mambaquant-w8a8", "32, tokens: 16,384", "35 of 42", "7 left in float", "3.0 MB", "12.0 MB in float"):
        assert text in head
    assert "8 of 9" in head  # rewrites applied: R1 and S2 in seven layers, not R5
    assert "34.0 dB" in head  # the last layer's


def test_same_data_gives_the_same_page_whatever_the_settings_of_matplotlib(data: PageData, page: Page) -> None:
    with matplotlib.rc_context({"image.origin": "lower", "image.cmap": "gray", "axes.formatter.limits": (0, 0)}):
        assert render(data) == render(page_data(7, 384))
        assert Page(render(data)).tags == page.tags


def test_nothing_outside_the_page_is_used(data: PageData, page: Page) -> None:
    assert re.search(r"https?://", render(data)) is None
    for _, attributes in page.tags:
        assert "src" not in attributes
        target = attributes.get("href") or "#"
        assert target.startswith(("#", "data:image/png;base64,"))
    assert page.all("link") == []


def test_names_are_escaped_wherever_they_appear() -> None:
    evil = "<b>&\"'</script>"
    channels = torch.tensor([1.0, 2.0])
    text = render(
        PageData(
            title=evil,
            recipe=evil,
            recipe_text=evil,
            batches=1,
            tokens=1,
            versions={evil: evil},
            blocks=evil,
            transforms=(Transform(evil, evil, evil, Status.LEFT_OUT, evil),),
            decisions=(Decision(evil, evil, None, False, evil), Decision(evil, evil, Role.HEAD, True, evil)),
            sizes=(Size(evil, 4, 1),),
            variances=(VarianceProfile(evil, channels),),
            ranges=(RangeRow(evil, evil, 0, 1, channels),),
            nodes=(NodeQuality(evil, evil, evil, 3.0, evil),),
        )
    )
    assert "<b>&" not in text
    page = Page(text)
    assert len(page.all("script")) == 1
    # Once in each of the 17 places above that are text, at least.
    assert page.text.count(evil) >= 17
    assert any(
        attributes.get("aria-label", "") and evil in str(attributes["aria-label"]) for attributes in page.all("svg")
    )


def test_empty_parts_become_sentences() -> None:
    page = Page(render(PageData(title="t", recipe="rtn", recipe_text="recipe rtn", batches=1, tokens=8)))
    sentences = [tag for tag, attributes in page.tags if attributes.get("class") == "none"]
    assert sentences == ["p"] * 8  # seven sections and the versions
    assert page.all("svg") == []
    assert page.all("table") == []


def test_every_reason_appears(page: Page) -> None:
    reasons = tuple(f"because of reason number {i}." for i in range(60))
    decisions = tuple(Decision(f"n{i}", f"m.{i % 7}", None, False, reason) for i, reason in enumerate(reasons))
    transforms = tuple(Transform("p", "S2", f"m.{i}", Status.LEFT_OUT, f"transform {r}") for i, r in enumerate(reasons))
    text = Page(render(PageData("t", "r", "r", 1, 1, transforms=transforms, decisions=decisions))).text
    for reason in reasons:
        assert f"transform {reason}" in text
        assert text.count(reason) == 3  # the rewrite's, the node's by reason, and in the list of all nodes
    assert "no Hadamard order for 7" in page.text
    assert "scale 6" in page.text  # details that differ from place to place are in the folded list


def test_a_24_layer_model_fits_in_a_megabyte_and_a_half() -> None:
    # The bound asked for is 3 MB; heat maps are pictures of at most 256 columns and curves have at most 256 points.
    assert len(render(page_data(24, 1536)).encode()) < 1_500_000


def test_variance_ratios_are_those_of_the_channels() -> None:
    before = torch.tensor([0.5, 4.0, 1.0, 0.0625])
    profile = VarianceProfile("there", before, before.sqrt(), torch.tensor([1.0, 1.004, 1.002, 1.0]))
    (plot,) = plots.variance_plots([profile])
    assert dict(plot.ratios) == {"before": "64", "hadamard": "8", "rotated": "1.0040"}
    dead = VarianceProfile("dead", torch.tensor([0.0, 0.0, 1.0]))
    assert plots.variance_plots([dead])[0].ratios == (("before", "inf (2 dead)"),)


def test_curves_are_sorted_and_share_one_axis() -> None:
    steep = VarianceProfile("steep", torch.logspace(-3, 3, 1000), None, torch.ones(1000))
    flat = VarianceProfile("flat", torch.ones(4))
    first, second = plots.variance_plots([steep, flat])
    assert first.y_ticks == second.y_ticks
    points = [tuple(map(float, point.split(","))) for point in first.curves[0].points.split()]
    assert len(points) == plots.MAX_COLUMNS
    assert points[0][0] == 0
    assert points[-1][0] == 100
    assert points == sorted(points)  # from left to right, and never rising: y counts downwards
    assert [y for _, y in points] == sorted(y for _, y in points)
    (one,) = [tick.at for tick in first.y_ticks if tick.label == "1"]
    for curve in (first.curves[1], second.curves[0]):
        assert {float(point.split(",")[1]) for point in curve.points.split()} == {round(one, 2)}


def test_an_outlier_channel_is_a_bright_pixel() -> None:
    maxima = [torch.ones(1000) for _ in range(3)]
    maxima[1][700] = 50.0
    rows = [RangeRow("out_proj", f"layers.{i}.out_proj", -1, 1, values) for i, values in enumerate(maxima)]
    (heat_map,) = plots.heat_maps(rows)
    image = imread(io.BytesIO(base64.b64decode(heat_map.image.partition(",")[2])))
    assert image.shape == (3, plots.MAX_COLUMNS, 4)
    bright = np.argwhere(image[..., 0] > 0.5)  # viridis is red only at its upper end
    # 1000 channels in 256 columns: the first 232 columns hold four channels, the others three.
    assert bright.tolist() == [[1, 700 // 4]]
    assert [row.peak for row in heat_map.rows] == ["1x", "50x", "1x"]
    assert [row.label for row in heat_map.rows] == ["0", "1", "2"]
    assert heat_map.pattern == "layers.*.out_proj"


def test_rows_are_named_by_what_tells_them_apart() -> None:
    modules = ["layers.0.mixer.fwd.x_proj", "layers.0.mixer.bwd.x_proj", "layers.1.mixer.fwd.x_proj"]
    (heat_map,) = plots.heat_maps([RangeRow("x_proj", module, 0, 1, torch.ones(4)) for module in modules])
    assert [row.label for row in heat_map.rows] == ["0.fwd", "0.bwd", "1.fwd"]
    assert heat_map.pattern == "layers.*.mixer.*.x_proj"


def test_heat_maps_take_dead_few_and_unequal_channels() -> None:
    sizes = (5, 300, 1)
    rows = [RangeRow("scan", f"m{i}", 0, 0, torch.zeros(size)) for i, size in enumerate(sizes)]
    (heat_map,) = plots.heat_maps(rows)
    assert heat_map.channels == "1 or 5 or 300"
    assert [row.peak for row in heat_map.rows] == ["-"] * 3
    Page(render(PageData("t", "r", "r", 1, 1, ranges=tuple(rows))))


def test_quality_plot_places_nodes_by_order_and_ratio(data: PageData) -> None:
    plot = plots.quality_plot(data.nodes)
    assert plot is not None
    assert [role.role for role in plot.roles] == list(ROLES)
    in_proj = plot.roles[0].marks
    assert [mark.x for mark in in_proj] == pytest.approx([100 * (6 * layer + 0.5) / 42 for layer in range(7)])
    assert [mark.y for mark in in_proj] == sorted(mark.y for mark in in_proj)  # worse is lower
    assert [tick.label for tick in plot.x_ticks] == [str(layer) for layer in range(7)]
    assert len(plots.quality_plot(page_data(24, 32).nodes).x_ticks) == 8  # type: ignore[union-attr]


def test_nodes_without_a_finite_ratio_are_listed_not_plotted() -> None:
    values = {"exact": math.inf, "undefined": math.nan, "bad": -3.0}
    nodes = tuple(NodeQuality(name, "m", "scan", value, "(1,)") for name, value in values.items())
    plot = plots.quality_plot(nodes)
    assert plot is not None
    assert [mark.description for mark in plot.roles[0].marks] == ["bad (m), scan: -3.0 dB"]
    text = Page(render(PageData("t", "r", "r", 1, 1, nodes=nodes))).text
    assert "2 of 3 nodes" in text
    table = text[text.index("The worst 3") :]
    assert table.index("undefined") < table.index("bad") < table.index("exact")
    assert plots.quality_plot(nodes[:2]) is None


def test_plots_have_names_and_parse_as_xml(data: PageData) -> None:
    drawings = re.findall(r'<div class="plot.*?</svg></div>', render(data), re.DOTALL)
    # Residual stream and seven layers; a map and its scale for each of six roles; the quality plot.
    assert len(drawings) == 8 + 2 * 6 + 1
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)[0]
        assert svg.get("role") == "img"
        assert svg.get("aria-label")


@pytest.mark.parametrize(
    "values", [torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, math.nan]), torch.tensor([-1.0, 1.0])]
)
def test_bad_channels_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(MqAoError, match="variances of there"):
        VarianceProfile("there", values)
    with pytest.raises(MqAoError, match="channel maxima of m"):
        RangeRow("scan", "m", 0, 1, values)


def test_profiles_of_different_lengths_are_refused() -> None:
    with pytest.raises(MqAoError, match="3 channels before and 4 after"):
        VarianceProfile("there", torch.ones(3), None, torch.ones(4))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (12.345, "12.3"), (1336.2, "1336"), (-0.25, "-0.25"), (3.59e6, "3.59e6"), (1e-9, "1e-9")],
)
def test_numbers(value: float, text: str) -> None:
    assert plots.number(value) == text


def test_write(data: PageData, tmp_path: Path) -> None:
    write(data, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(data)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(MqAoError, match=r"must end in \.html"):
        write(data, tmp_path / "report.txt")
    with pytest.raises(MqAoError, match="does not exist"):
        write(data, tmp_path / "missing" / "report.html")
