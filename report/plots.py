"""Pictures as SVG inside of the page: one drawing for light, dark and print.

matplotlib draws with stand-in colours, which become the page's CSS variables; its text stays text in the
page's font; nothing in the output depends on when or where it was drawn. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gristmill.report.choose import Style
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# CSS variable -> stand-in. The series are Okabe and Ito's, made lighter for dark pages in page.css.
COLOURS = {
    name: f"#0102{i:02x}"
    for i, name in enumerate(
        ("ink", "muted", "grid", "paper", "blue", "sky", "orange", "green", "red", "purple", "shade"), 16
    )
}
_NAMES = {value: name for name, value in COLOURS.items()}
FONT = 12.0  # user units; a wide picture is shown at about one CSS pixel per unit
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gristmill",
    "svg.image_inline": True,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib and is wide: the page's font needs less room
    "path.simplify": False,
}


def require_matplotlib() -> None:
    """Raises GristmillError where pictures cannot be drawn: call it before a long measurement."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise GristmillError(
            f"the report's pictures need matplotlib ({error}): pip install 'gristmill[report]'"
        ) from error


@dataclass
class Drawing:
    """A figure that is being drawn. width, height: user units; tips: gid of an artist -> hover text."""

    name: str
    width: float
    height: float
    narrow: bool
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    def axes(self, **where: Any) -> Axes:
        """Axes in the page's style; where: of Figure.add_subplot."""
        axes = self.figure.add_subplot(**where)
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=COLOURS["muted"], labelcolor=COLOURS["ink"], labelsize=FONT - 1)
        axes.grid(True, which="major", color=COLOURS["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(COLOURS["muted"])
        return axes

    def bare(self, where: Any) -> Axes:
        """Axes without lines: for cells. where: of a grid."""
        axes = self.figure.add_subplot(where)
        axes.set_facecolor("none")
        axes.tick_params(length=0, labelcolor=COLOURS["ink"], labelsize=FONT - 1)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def label(self, axes: Axes, x: str, y: str) -> None:
        """Names of the axes, y's above the left end so that it reads level."""
        axes.set_xlabel(x, color=COLOURS["ink"], fontsize=FONT)
        axes.set_title(y, color=COLOURS["ink"], fontsize=FONT, loc="left")

    def fit(self, text: str, besides: float = 0.0) -> str:
        """`text`, cut where it is longer than the picture is wide. besides: units that are taken."""
        most = max(8, int((self.width - besides) / (0.6 * FONT)))
        return text if len(text) <= most else f"{text[: most - 1]}…"

    def tip(self, artist: Artist, text: str) -> None:
        """Shows `text` where the pointer rests on `artist`; small screens have no pointer."""
        if not self.narrow:
            gid = f"tip{len(self.tips)}"
            artist.set_gid(gid)
            artist.set_in_layout(False)  # one box less for the layout to measure
            self.tips[gid] = text

    def spread(self, inches: float) -> None:
        """More room above and below each axes."""
        engine: Any = self.figure.get_layout_engine()
        engine.set(h_pad=inches)

    def settle(self) -> None:
        """Lays the figure out for good: what is added from here on changes no sizes."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def legend(self, axes: Axes, columns: int | None = None) -> None:
        """Below the figure, in as many columns as the width gives."""
        handles, labels = axes.get_legend_handles_labels()
        self.legend_of(handles, labels, columns)

    def legend_of(self, handles: Sequence[Any], labels: Sequence[str], columns: int | None = None) -> None:
        if not labels:
            return
        labels = [self.fit(label, 60) for label in labels]
        per_label = 44 + FONT * 0.6 * max(len(label) for label in labels)
        columns = columns or max(1, min(len(labels), int(self.width // per_label)))
        self.figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=FONT - 1,
            labelcolor=COLOURS["ink"],
            handlelength=2.2,
            columnspacing=1.4,
        )


def draw(
    name: str,
    size: tuple[float, float],
    narrow: bool,
    title: str,
    text: str,
    paint: Callable[[Drawing], None],
) -> str:
    """The SVG of what `paint` draws. name: prefix of its ids; text: said to who cannot see it."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = _SETTINGS  # their names are a type of matplotlib's own
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font writes it

        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        drawing = Drawing(name, *size, narrow, figure)
        paint(drawing)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return _for_the_page(out.getvalue(), drawing, title, text)


def _for_the_page(svg: str, drawing: Drawing, title: str, text: str) -> str:
    """matplotlib's file as an element of the page: own ids, CSS colours, hover texts, an alternative."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)
    for child in list(root):  # a style in there would hold for the whole page: page.css says it for pictures
        if child.tag == f"{{{SVG}}}metadata" or child.find(f"{{{SVG}}}style") is not None:
            root.remove(child)
    used = set(re.findall(r"#([\w-]+)", svg))
    for element in list(root.iter()):
        tip = drawing.tips.get(element.get("id", ""))
        _own_names(element, drawing.name, used)
        _restyle(element)
        if tip:
            note = ET.Element(f"{{{SVG}}}title")
            note.text = tip
            element.insert(0, note)
            element.set("class", "tip")
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{drawing.name}-title {drawing.name}-desc")
    for i, (tag, content) in enumerate((("title", title), ("desc", text))):
        element = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{drawing.name}-{tag}"})
        element.text = content
        root.insert(i, element)
    return ET.tostring(root, encoding="unicode")


def _own_names(element: ET.Element, prefix: str, used: set[str]) -> None:
    """ids of one picture differ from those of the others; those that nothing uses go."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            if value in used:
                element.set(key, f"{prefix}-{value}")
            else:
                del element.attrib[key]
        elif key == f"{{{XLINK}}}href" and value.startswith("#"):
            element.set(key, f"#{prefix}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))


def _restyle(element: ET.Element) -> None:
    """Stand-in colours to CSS variables, fonts to the page's, coordinates to hundredths; no texts."""
    if style := element.get("style"):
        style = re.sub(r"#0102[0-9a-f]{2}", lambda m: f"var(--{_NAMES[m[0]]})", style)
        element.set("style", re.sub(r"font: ([\d.]+)px [^;]*|font-family: [^;]*;? ?", _font_size, style))
    for key in ("d", "transform", "x", "y", "width", "height"):
        if value := element.get(key):
            short = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(key, " ".join(short.split()))
    element.tail = None
    if len(element):
        element.text = None


def _font_size(found: re.Match[str]) -> str:
    """Of the shorthand `font` its size, of `font-family` nothing."""
    return f"font-size: {found[1]}px" if found[1] else ""


def marker_style(style: Style, hollow: bool = False) -> dict[str, Any]:
    """Keywords of a marker for Axes.plot."""
    colour = COLOURS[style.colour]
    face = COLOURS["paper"] if hollow else colour
    return {
        "marker": style.marker,
        "color": colour,
        "markerfacecolor": face,
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
        "markersize": 8,
    }


def line_style(style: Style) -> dict[str, Any]:
    return {"color": COLOURS[style.colour], "linestyle": style.dash, "linewidth": 1.8}
