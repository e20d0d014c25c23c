"""A figure of a table: a panel a task, a dot with its interval a configuration, the best constant
answer as a dashed line.

Drawn without pyplot and without a display. The same dots give the same bytes of SVG: the salt of
its ids is fixed and no date is written.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct to the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
ROW, WIDTH = 0.22, 9.0  # inches


@dataclass(frozen=True)
class Dot:
    """A configuration's value with its interval. `group` decides the colour; `weak` dots, of cells
    trained too briefly, are hollow.
    """

    name: str
    group: str
    value: float
    low: float
    high: float
    weak: bool


@dataclass(frozen=True)
class Panel:
    """One task: the axis' label, the constant answer's value where there is one, and the dots from
    top to bottom.
    """

    title: str
    axis: str
    constant: float | None
    dots: tuple[Dot, ...]


def as_written(text: str) -> str:
    """A name as matplotlib shows it as it is: `$...$` would be read as mathematics."""
    return text.replace("$", r"\$")


def draw(panels: Sequence[Panel], caption: str) -> "Figure":
    """The figure: panels below each other, with heights by their dots. Without panels it is the
    caption alone.
    """
    from matplotlib.figure import Figure

    heights = [len(panel.dots) + 3 for panel in panels]
    figure = Figure(figsize=(WIDTH, ROW * (sum(heights) + 3)), layout="constrained")
    figure.suptitle(as_written(caption), fontsize=9, x=0.01, ha="left")
    groups = list(dict.fromkeys(dot.group for panel in panels for dot in panel.dots))
    colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
    if not panels:
        return figure
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[
        :, 0
    ]
    for axis, panel in zip(axes, panels, strict=True):
        for row, dot in enumerate(panel.dots):
            colour = colours[dot.group]
            axis.hlines(row, dot.low, dot.high, color=colour, linewidth=1.2)
            axis.plot(
                dot.value,
                row,
                "o",
                color=colour,
                markersize=4.5,
                markerfacecolor="white" if dot.weak else colour,
            )
        if panel.constant is not None:
            axis.axvline(panel.constant, color="0.4", linestyle="--", linewidth=0.9)
        axis.set_yticks(
            range(len(panel.dots)), [as_written(dot.name) for dot in panel.dots], fontsize=7
        )
        axis.set_ylim(len(panel.dots) - 0.4, -0.6)
        axis.set_title(as_written(panel.title), fontsize=8, loc="left")
        axis.set_xlabel(panel.axis, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def to_svg(figure: "Figure") -> str:
    """The figure as SVG, its letters as paths, so that it looks the same without our fonts."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "finrepro", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: "Figure") -> bytes:
    """The figure as a PNG file of 150 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
