"""Curves of a training, the use of a codebook and values of cells, as pictures.

One style: a panel for each quantity, training and validation in two colours that also colour-blind people tell apart,
on light or on dark. What is drawn are numbers by name; where they come from and what a model is, is not known here.
Drawing draws no random numbers and leaves matplotlib's global state alone; it is imported when something is drawn.
"""

import contextlib
import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvae.codebook import Usage


class Curve(NamedTuple):
    """Values over updates, both `(N,)`; a value may be NaN."""

    updates: np.ndarray
    values: np.ndarray


class Line(NamedTuple):
    """Values y over x with the ends of their intervals, all `(N,)`."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity by their labels; a share is shown in percent."""

    title: str
    curves: dict[str, Curve]
    scale: Literal["linear", "log", "share"] = "linear"


class _Colours(NamedTuple):
    paper: str
    ink: str
    grid: str
    lines: tuple[str, ...]  # of Okabe and Ito, which differ for every kind of colour blindness


_LIGHT = _Colours("#ffffff", "#3a3d45", "#e3e5ea", ("#0072b2", "#d55e00", "#009e73"))
_DARK = _Colours("#16181d", "#c3c7d1", "#2f333c", ("#56b4e9", "#e69f00", "#2fc79b"))
_MANY = (*_LIGHT.lines, "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")  # where three do not suffice

# the columns of each panel with the label of each, in the order of interest; other columns get panels of their own
_PANELS: dict[str, dict[str, str]] = {
    "loss": {"train/loss": "training", "train/nll": "training, reconstruction", "val/loss": "validation"},
    "image loss, nats per token": {"train/image_loss": "training", "val/image_loss": "validation"},
    "text loss, nats per token": {"train/text_loss": "training", "val/text_loss": "validation"},
    "words after their picture, nats per token": {"train/caption_loss": "training", "val/caption_loss": "validation"},
    "pictures before their words, nats per token": {
        "train/picture_loss": "training",
        "val/picture_loss": "validation",
    },
    "image tokens guessed right": {"train/image_accuracy": "training", "val/image_accuracy": "validation"},
    "PSNR of reconstructions, dB": {"val/psnr": "validation"},
    "share of codes in use": {"codebook/used": "validation"},
    "perplexity of the codes": {"codebook/perplexity": "validation"},
    "loss of hard over relaxed codes": {"val/relaxed_gap": "validation"},
    "KL, nats per token": {"train/kl": "training", "val/kl": "validation"},
    "ln K - entropy of the mean code": {"train/usage_gap": "training"},
    "norm of the gradient": {"train/gradient_norm": "training"},
    "scale of the loss": {"train/loss_scale": "training"},
    "scales of the gradients": {"train/block_scale_smallest": "smallest", "train/block_scale_largest": "largest"},
    "learning rate": {"train/learning_rate": "training"},
    "temperature": {"train/temperature": "training"},
    "weight of the KL": {"train/kl_weight": "training"},
}
_SCALES = {
    "norm of the gradient": "log",
    "scale of the loss": "log",
    "scales of the gradients": "log",
    "share of codes in use": "share",
    "image tokens guessed right": "share",
}
_COLOUR = {"training": 0, "validation": 1, "training, reconstruction": 2}
_POINTS = 400  # of a curve at the most; a longer one is thinned


def read(text: str) -> dict[str, Curve]:
    """The columns of a metrics.csv by name; what is no number, and a row without a `step`, is left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.suppress(csv.Error):  # a damaged line ends what can be read
        for row in csv.DictReader(io.StringIO(text.replace("\0", ""), newline="")):
            step = _number(row.get("step"))
            for name, value in row.items():
                if math.isfinite(step) and name not in (None, "step") and isinstance(value, str) and value:
                    found.setdefault(name, []).append((step, _number(value)))
    return {name: Curve(*np.array(points).T) for name, points in found.items()}


def _number(text: str | None) -> float:
    """NaN for what is no number, or none that a picture could show."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e30 else math.nan


def panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """Curves of one quantity together; those that never moved from zero, such as a weight not used, are left out."""
    shown = {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any() and curve.values.any()}
    known = [
        Panel(
            title,
            {label: shown[name] for name, label in columns.items() if name in shown},
            _SCALES.get(title, "linear"),
        )
        for title, columns in _PANELS.items()
    ]
    named = {name for columns in _PANELS.values() for name in columns}
    others = [Panel(name[:40], {name: curve}) for name, curve in shown.items() if name not in named]
    return [panel for panel in known + others if panel.curves]


def best(curves: Mapping[str, Curve]) -> int | None:
    """The update of the lowest validation loss, if there was a validation."""
    curve = curves.get("val/loss")
    if curve is None or not np.isfinite(curve.values).any():
        return None
    return int(curve.updates[np.nanargmin(np.where(np.isfinite(curve.values), curve.values, np.nan))])


def curves_picture(curves: Mapping[str, Curve]) -> Tensor:
    """All panels on one sheet, uint8 `(3, H, W)`."""
    shown, mark = panels(curves), best(curves)
    columns = min(3, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = _figure(columns, rows, _LIGHT)
    for place, panel in enumerate(shown, 1):
        _draw(figure.add_subplot(rows, columns, place), panel, mark, _LIGHT)
    said = "over updates" if shown else "no numbers yet"
    if mark is not None:
        said += f"; dotted: {mark:,}, the best validation"
    figure.text(0.995, 0.01 / rows, said, ha="right", va="bottom", fontsize=8, color=_LIGHT.ink)
    return _pixels(figure)


def panel_svg(panel: Panel, mark: int | None = None, dark: bool = False) -> bytes:
    """One panel as an SVG file that needs no fonts; `mark` is an update to point out, such as the best."""
    colours = _DARK if dark else _LIGHT
    figure = _figure(1, 1, colours, width=3.3, height=2.05)
    _draw(figure.add_subplot(), panel, mark, colours)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def usage_picture(counts: Tensor) -> Tensor:
    """How often each code was chosen, uint8 `(3, H, W)`: the most used first, beside the line of even use.

    Args:
        counts: `(K,)`, not negative.
    """
    seen, ordered = Usage(counts), np.sort(counts.double().numpy())[::-1]
    total, used = ordered.sum(), int((ordered > 0).sum())
    figure = _figure(1, 1, _LIGHT, width=6.4, height=2.75, below=0.45)
    axes = figure.add_subplot()
    title = f"{used:,} of {len(ordered):,} codes in use ({seen.used:.1%}), perplexity {seen.perplexity:,.0f}"
    if total:
        share = ordered / total
        edges = np.arange(used + 1) + 0.5
        floor = 0.7 * min(share[used - 1], 1 / len(ordered))
        axes.stairs(share[:used], edges, baseline=floor, fill=True, color=_LIGHT.lines[0], linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(floor, 2 * max(share[0], 1 / len(ordered)))
        axes.axhline(1 / len(ordered), color=_LIGHT.lines[1], linewidth=1.2)
        axes.annotate("even use", (1, 1 / len(ordered)), (-3, 3), ("axes fraction", "data"), "offset points",
                      ha="right", fontsize=8, color=_LIGHT.lines[1])  # fmt: skip
    axes.set_xlim(0.5, len(ordered) + 0.5)
    axes.set_xlabel("codes, the most used first", fontsize=8, color=_LIGHT.ink)
    axes.set_ylabel("share of the cells", fontsize=8, color=_LIGHT.ink)
    _dress(axes, title, _LIGHT)
    axes.tick_params(which="minor", length=0)
    return _pixels(figure)


def cell_map(values: Tensor, title: str, unit: str) -> Tensor:
    """A value >= 0 of each cell `(h, w)` as a colour, beside the scale of the colours: uint8 `(3, 360, 462)`."""
    from matplotlib.figure import Figure

    figure = Figure((4.2, 360 / 110), dpi=110, facecolor=_LIGHT.paper, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(values.double().cpu().numpy(), cmap="inferno", vmin=0, vmax=values.max().item() or 1)
    axes.set_xlabel("column", fontsize=8, color=_LIGHT.ink)
    axes.set_ylabel("row", fontsize=8, color=_LIGHT.ink)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    scale = figure.colorbar(shown)
    scale.set_label(unit, fontsize=8, color=_LIGHT.ink)
    scale.ax.tick_params(labelsize=8, colors=_LIGHT.ink, length=0)
    scale.outline.set_visible(False)
    _dress(axes, title, _LIGHT)
    axes.grid(False)
    return _pixels(figure)


def bars(values: Tensor, title: str, x: str, y: str) -> Tensor:
    """One bar for each of some values `(N,)`, in their order: uint8 `(3, 360, 462)`."""
    figure = _figure(1, 1, _LIGHT, width=4.2, height=360 / 110, below=0.45)
    axes = figure.add_subplot()
    axes.bar(np.arange(len(values)), values.double().cpu().numpy(), color=_LIGHT.lines[0])
    axes.set_xlabel(x, fontsize=8, color=_LIGHT.ink)
    axes.set_ylabel(y, fontsize=8, color=_LIGHT.ink)
    _dress(axes, title, _LIGHT)
    return _pixels(figure)


def lines(panels: Mapping[str, Mapping[str, Line]], x: str, strong: str = "", binary: bool = False) -> Tensor:
    """Lines with their intervals by label, a panel for each title, uint8 `(3, H, W)`.

    Args:
        x: what the values are over; `binary` spaces 1, 2, 4, ... evenly.
        strong: the label of the line that matters, and alone shows its interval; without it all do. "chance" and
            "ceiling" are drawn as bounds.
    """
    from matplotlib import ticker

    figure = _figure(len(panels), 1, _LIGHT, width=6.2, height=4.4, below=0.45)
    for place, (title, some) in enumerate(panels.items(), 1):
        axes, others = figure.add_subplot(1, len(panels), place), 0
        for label, line in some.items():
            style: dict[str, Any] = {"color": _LIGHT.ink, "linestyle": {"chance": ":", "ceiling": "--"}.get(label)}
            if style["linestyle"] is None:
                style = {"color": _MANY[others % len(_MANY)], "linestyle": ("-", "-.")[others // len(_MANY) % 2]}
                others += 1
            if label == strong or not strong:
                axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.16, linewidth=0)
            width = 2.6 if label == strong else 1.2
            axes.plot(line.x, line.y, marker="o", markersize=2.6, linewidth=width, label=label, **style)
        if binary:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        if all(0 <= line.low.min() and line.high.max() <= 1 for line in some.values()):
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
        axes.set_xlabel(x, fontsize=8, color=_LIGHT.ink)
        _dress(axes, title, _LIGHT)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=_LIGHT.ink, ncols=2)
    return _pixels(figure)


def _figure(
    columns: int, rows: int, colours: _Colours, width: float = 4.2, height: float = 2.6, below: float = 0.3
) -> Any:
    """An empty sheet for so many panels of this size, with this much room below each one, inches."""
    from matplotlib.figure import Figure  # without pyplot: no window, no list of open figures

    figure = Figure((columns * width, rows * height), dpi=110, facecolor=colours.paper)
    left, right, below, above = 0.55 / width, 0.12 / width, below / height, 0.3 / height
    figure.subplots_adjust(
        left / columns, below / rows, 1 - right / columns, 1 - above / rows,
        (left + right) / (1 - left - right), (below + above) / (1 - below - above),
    )  # fmt: skip
    return figure


def _dress(axes: Any, title: str, colours: _Colours) -> None:
    axes.set_title(title, fontsize=9.5, color=colours.ink, loc="left", parse_math=False)
    axes.set_facecolor(colours.paper)
    axes.grid(color=colours.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=colours.ink, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.grid)


def _draw(axes: Any, panel: Panel, mark: int | None, colours: _Colours) -> None:
    from matplotlib import ticker

    last = max(curve.updates.max() for curve in panel.curves.values())
    settled = []  # the values that decide the scale
    for place, (label, curve) in enumerate(panel.curves.items()):
        updates, values = _thinned(curve)
        if panel.scale == "log":
            values = np.where(values > 0, values, np.nan)
        colour = colours.lines[_COLOUR.get(label, place) % len(colours.lines)]
        dots = "o" if len(values) <= 40 else ""
        axes.plot(updates, values, dots + "-", color=colour, linewidth=1.3, markersize=2.6, label=label)
        # what comes in the first twentieth of the time, such as the first loss, may leave the frame
        settled.append(values[np.isfinite(values) & (updates > 0.05 * last)])
    _dress(axes, panel.title, colours)
    values = np.concatenate(settled)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    form = "{x:.4g}"
    if panel.scale == "share":
        form = ticker.FuncFormatter(lambda share, _: f"{100 * share:.4g} %")
    if panel.scale == "log" and len(values):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        # a curve that hardly moves shall look so
        room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high))) or 1.0
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(form)
    axes.set_xlim(0, 1.02 * last or 1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 12k
    if mark is not None:
        axes.axvline(mark, color=colours.ink, linewidth=0.8, linestyle=":")
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=colours.ink)


def _thinned(curve: Curve) -> Curve:
    """At most so many points as can be seen, each the mean of its neighbours; a part without numbers is NaN."""
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    size = -(-len(values) // _POINTS)
    if size == 1:
        return Curve(curve.updates, values)
    starts = np.arange(0, len(values), size)
    there = np.add.reduceat(np.isfinite(values).astype(float), starts)
    sums = np.add.reduceat(np.nan_to_num(values), starts)
    means = np.divide(sums, there, out=np.full(len(starts), np.nan), where=there > 0)
    return Curve(np.maximum.reduceat(curve.updates, starts), means)


def _pixels(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)
