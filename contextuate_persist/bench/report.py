"""What was measured, as a table, as JSON and as curves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from contextuate_persist.bench.measure import Figure
from contextuate_persist.errors import ConfigurationError

Curves = Mapping[str, list[tuple[float, float]]]


def table(figures: Iterable[Figure]) -> str:
    """All figures by chapter, then the goals with their verdicts; one column for each backend."""
    figures = list(figures)
    backends = list(dict.fromkeys(figure.backend for figure in figures))
    lines: list[str] = []
    for chapter, group in groupby(
        sorted(figures, key=lambda figure: _order(figures, figure.chapter)),
        key=lambda figure: figure.chapter,
    ):
        lines += ["", f"{chapter:<60}" + "".join(f"{backend:>20}" for backend in backends)]
        named: dict[str, dict[str, Figure]] = {}
        for figure in group:
            named.setdefault(figure.name, {})[figure.backend] = figure
        for name, cells in named.items():
            values = "".join(f"{_cell(cells.get(backend)):>20}" for backend in backends)
            notes = "; ".join(dict.fromkeys(cell.note for cell in cells.values() if cell.note))
            lines.append(f"  {name:<58}{values}  {notes}".rstrip())
    lines += ["", "goals"]
    for figure in figures:
        if figure.goal:
            value = f"{figure.value:,.2f} {figure.unit}".rstrip()
            lines.append(
                f"  {figure.backend:<12}{figure.name:<58}{value:>14}  "
                f"{figure.goal!s:<10}{figure.verdict}"
            )
    return "\n".join(lines)


def server_line(backend: str, settings: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    return f"{backend}: " + ", ".join(f"{name} {value}" for name, value in settings.items())


def _order(figures: list[Figure], chapter: str) -> int:
    return list(dict.fromkeys(figure.chapter for figure in figures)).index(chapter)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    digits = 0 if abs(figure.value) >= 100 else 2 if abs(figure.value) >= 1 else 3
    return f"{figure.value:,.{digits}f} {figure.unit}".rstrip()


def write_json(
    path: Path,
    figures: Iterable[Figure],
    curves: Mapping[str, Curves],
    servers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Everything, for comparison with another run."""
    path.write_bytes(
        orjson.dumps(
            {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "servers": servers,
                "figures": [
                    {
                        "backend": figure.backend,
                        "chapter": figure.chapter,
                        "name": figure.name,
                        "value": figure.value,
                        "unit": figure.unit,
                        "goal": str(figure.goal) if figure.goal else None,
                        "verdict": figure.verdict or None,
                        "note": figure.note or None,
                    }
                    for figure in figures
                ],
                "curves": curves,
            },
            option=orjson.OPT_INDENT_2,
        )
    )


def draw(path: Path, curves: Mapping[str, Curves]) -> None:
    """The curves of all backends as one picture; needs matplotlib (the extra `bench`)."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError("--curves needs matplotlib: pip install matplotlib") from None
    mpl.use("agg")
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    figure, axes = plt.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), squeeze=False)
    for row, (backend, of_backend) in zip(axes, curves.items(), strict=True):
        for axis, unit in zip(row, ("events a second", "ms"), strict=True):
            for name, points in of_backend.items():
                if unit in name:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(title=backend, xlabel="events stored", ylabel=unit)
            axis.set_ylim(bottom=0)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path)
