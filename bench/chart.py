"""Step charts over time, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 900, 190, 60, 20, 40, 50


@dataclass(frozen=True)
class Series:
    """Values that hold from a moment, in seconds, to the next."""

    name: str
    colour: str
    values: Sequence[tuple[float, float]]
    dashes: str = ""


@dataclass(frozen=True)
class Panel:
    """Series with one scale from 0 to `most`."""

    most: float
    series: Sequence[Series]


def chart(panels: Sequence[Panel], end: float) -> str:
    """The panels one below the other, from 0 to `end` seconds."""
    end = end or 1.0
    body = [part for i, panel in enumerate(panels) for part in _panel(panel, TOP + i * (HEIGHT + GAP), end)]
    bottom = TOP + len(panels) * (HEIGHT + GAP) - GAP
    for mark in range(0, int(end) + 1, 30):
        body.append(f'<text x="{_x(mark, end):.1f}" y="{bottom + 18}" text-anchor="middle">{mark} s</text>')
    style = "text{font:12px sans-serif}.box{fill:none;stroke:#bbb}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30}" width="{WIDTH}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _x(at: float, end: float) -> float:
    return LEFT + at / end * (WIDTH - LEFT - RIGHT)


def _panel(panel: Panel, top: int, end: float) -> list[str]:
    parts = [f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT}" class="box"/>']
    for share in (0, 0.5, 1):
        y = top + HEIGHT * (1 - share)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{share * panel.most:g}</text>')
    for i, series in enumerate(panel.series):
        parts.append(f'<text x="{LEFT + 8 + 150 * i}" y="{top - 8}" fill="{series.colour}">{series.name}</text>')
        parts.append(_line(series, top, panel.most, end))
    return parts


def _line(series: Series, top: int, most: float, end: float) -> str:
    points: list[str] = []
    before: float | None = None
    for at, value in series.values:
        y = top + HEIGHT * (1 - value / most)
        if before is not None:
            points.append(f"{_x(at, end):.1f},{before:.1f}")
        points.append(f"{_x(at, end):.1f},{y:.1f}")
        before = y
    dash = f' stroke-dasharray="{series.dashes}"' if series.dashes else ""
    return f'<polyline fill="none" stroke="{series.colour}" stroke-width="1.6"{dash} points="{" ".join(points)}"/>'
