r"""Charts as SVG that stands in a page by itself: lines, stacked bars and a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 318
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 48, 42
COLOURS = ("#3465a4", "#cc5500", "#4e9a06", "#75507b", "#a40000", "#06989a")
Points = Sequence[tuple[float, float]]


def lines(title: str, x_label: str, curves: Mapping[str, Points]) -> str:
    r"""Curves over a common axis, with a legend. A curve of one point is a dot."""
    points = [p for curve in curves.values() for p in curve]
    low_x, high_x = _range([x for x, _ in points])
    low_y, high_y = _range([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM)

    body = [_text(WIDTH / 2, 16, title, "title", "middle"), _text(WIDTH / 2, HEIGHT - 6, x_label, "label", "middle")]
    for tick in _ticks(low_y, high_y):
        y = place(low_x, tick)[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(_LEFT - 6, y + 4, f"{tick:.4g}", "label", "end"))
    for tick in _ticks(low_x, high_x):
        if tick == int(tick):
            body.append(_text(place(tick, low_y)[0], HEIGHT - _BOTTOM + 16, f"{tick:.0f}", "label", "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in curve))
        said = f'class="curve" data-name="{escape(name)}" data-points="{len(curve)}"'
        body.append(f'<polyline {said} points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(curve) == 1:
            x, y = place(*curve[0])
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        across = (WIDTH - _LEFT - _RIGHT) / len(curves)
        body.append(_text(_LEFT + across * number, 36, name, "legend", "start", colour))
    return _svg(title, HEIGHT, body)


def stacked_bars(title: str, unit: str, rows: Sequence[str], pieces: Mapping[str, Sequence[float]]) -> str:
    r"""A bar for each row, made of one piece for each name."""
    height = _TOP + 26 * len(rows) + 34
    totals = [sum(piece[i] for piece in pieces.values()) for i in range(len(rows))]
    scale = (WIDTH - _LEFT - 90) / max([*totals, 1e-12])
    body = [_text(WIDTH / 2, 16, title, "title", "middle")]
    for i, row in enumerate(rows):
        x, y = float(_LEFT), _TOP + 26 * i
        body.append(_text(_LEFT - 6, y + 15, row, "label", "end"))
        for number, (name, values) in enumerate(pieces.items()):
            wide, colour = values[i] * scale, COLOURS[number % len(COLOURS)]
            said = f'class="bar" data-name="{escape(name)}" data-row="{i}"'
            told = f"<title>{escape(row)}, {escape(name)}: {values[i]:.3f} {escape(unit)}</title>"
            body.append(f'<rect {said} x="{x:.1f}" y="{y}" width="{wide:.1f}" height="20" fill="{colour}">{told}</rect>')
            x += wide
        body.append(_text(x + 6, y + 15, f"{totals[i]:.2f} {unit}", "label", "start"))
    for number, name in enumerate(pieces):
        body.append(_text(_LEFT + 120 * number, height - 12, name, "legend", "start", COLOURS[number % len(COLOURS)]))
    return _svg(title, height, body)


def matrix(title: str, row_label: str, column_label: str, values: Sequence[Sequence[float]]) -> str:
    r"""A square of cells, the darker the larger."""
    cells = len(values)
    side = min(48.0, (WIDTH - 2 * _LEFT) / max(1, cells))
    height = int(_TOP + 30 + side * cells + 26)
    largest = max((v for row in values for v in row), default=0) or 1
    body = [_text(WIDTH / 2, 16, title, "title", "middle"), _text(_LEFT, _TOP + 8, f"{row_label} ↓  {column_label} →", "label", "start")]
    for i, row in enumerate(values):
        body.append(_text(_LEFT - 8, _TOP + 34 + side * (i + 0.5), str(i), "label", "end"))
        body.append(_text(_LEFT + side * (i + 0.5), _TOP + 24, str(i), "label", "middle"))
        for j, value in enumerate(row):
            x, y, share = _LEFT + side * j, _TOP + 30 + side * i, value / largest
            told = f"<title>{escape(row_label)} {i}, {escape(column_label)} {j}: {value:,.0f}</title>"
            said = f'class="cell" data-row="{i}" data-column="{j}" data-value="{value:.0f}"'
            body.append(
                f'<rect {said} x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
                f'fill="{COLOURS[0]}" fill-opacity="{0.05 + 0.85 * share:.3f}">{told}</rect>'
            )
            if side >= 36:
                body.append(_text(x + side / 2, y + side / 2 + 4, f"{value:,.0f}", "number", "middle"))
    return _svg(title, height, body)


def _svg(title: str, height: int, body: Sequence[str]) -> str:
    inner = "\n".join(body)
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n{inner}\n</svg>'


def _text(x: float, y: float, text: str, kind: str, anchor: str, colour: str = "#333") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    r"""Round numbers within a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= wanted)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
