"""A figure of charts side by side, with lines and points. finrepro.reporting.dots writes it as SVG
and PNG.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finrepro.reporting.dots import COLOURS, WIDTH, as_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 2.4  # inches a row of charts


@dataclass(frozen=True)
class Curve:
    """A line through the points (x, y) in this order, or with `dots` the points alone; `labels`
    are drawn beside them. Without a name it is in no legend.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...] = ()
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One pair of axes and their labels. `x_scale` is matplotlib's (`linear`, `log`); `y_range`
    fixes the axis where charts are compared.
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    x_scale: str = "linear"
    y_range: tuple[float, float] | None = None


def draw_charts(charts: Sequence[Chart], caption: str, columns: int = 3) -> "Figure":
    """The figure, charts in rows of `columns`. Curves are coloured by their order in the chart;
    charts of the same curves share one legend.
    """
    from matplotlib.figure import Figure

    across = max(1, min(columns, len(charts)))
    rows = -(-len(charts) // across) if charts else 1
    height = HEIGHT * rows + (0.8 if across > 1 else 1.6)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(as_written(caption), fontsize=9, x=0.01, ha="left")
    alike = len({tuple(curve.name for curve in chart.curves) for chart in charts}) == 1
    for position, chart in enumerate(charts):
        axis = figure.add_subplot(rows, across, position + 1)
        lines = sum(not curve.dots for curve in chart.curves)
        for index, curve in enumerate(chart.curves):
            style = {"marker": "o", "linestyle": "none"} if curve.dots else {"linewidth": 1.3}
            # Points have the colour of the line that they are on.
            colour = COLOURS[(index % lines if lines else index) % len(COLOURS)]
            axis.plot(
                curve.x,
                curve.y,
                label=as_written(curve.name) or "_",
                color=colour,
                markersize=3.5,
                **style,
            )
            for name, x, y in zip(curve.labels, curve.x, curve.y, strict=False):
                axis.annotate(
                    as_written(name), (x, y), xytext=(3, 4), textcoords="offset points", fontsize=6
                )
        axis.set_xscale(chart.x_scale)
        if chart.y_range:
            axis.set_ylim(*chart.y_range)
        axis.set_title(as_written(chart.title), fontsize=8, loc="left")
        axis.set_xlabel(chart.x, fontsize=7)
        axis.set_ylabel(chart.y, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if position == 0 or not alike:
            axis.legend(fontsize=6, frameon=False)
    return figure
