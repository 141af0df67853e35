"""The picture of the dashboard in docs/screens: what a real Prometheus answers to the queries of its panels: `sudo ./dev panels`.

The host and its traffic are those of the other pictures; Prometheus is Debian's, unpacked and not installed (tests/borrowed.py). It reads
the daemon for two minutes, and is then asked each panel's query, as Grafana would ask it. Grafana itself is not in Debian: the answers are
drawn here, in the dashboard's layout. Nothing is drawn that Prometheus did not answer.
"""

from __future__ import annotations

import html
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.borrowed import borrowed
from tests.lab import Lab, Space, wait_for, within

from .screens import CONFIG, DIRECTORY, Traffic, run, wired

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "contrib/grafana/xdpmond.json"
SECONDS = 120
RATE_INTERVAL = "15s"
URL = "http://127.0.0.1:9090"

METRICS = """
[metrics]
enable = true
refresh = "1s"
"""
PROMETHEUS = """
global: {scrape_interval: 2s}
scrape_configs:
  - job_name: xdpmond
    static_configs: [{targets: ["127.0.0.1:9958"], labels: {instance: web}}]
"""

Series = tuple[str, list[tuple[float, float]]]


# What is asked


class Prometheus:
    def __init__(self, lab: Lab, space: Space):
        self._space = space
        config = lab.write("prometheus.yml", PROMETHEUS)
        command = [str(borrowed("prometheus") / "usr/bin/prometheus"), f"--config.file={config}", "--log.level=warn",
                   f"--storage.tsdb.path={lab.directory / 'prometheus'}", "--web.listen-address=127.0.0.1:9090"]  # fmt: skip
        lab.spawn(space.inside(command), lab.directory / "prometheus.log")

    def ask(self, path: str, **query: object) -> Any:
        def get() -> bytes:
            with urllib.request.urlopen(f"{URL}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
                return bytes(answer.read())

        return json.loads(within(self._space.path, get))["data"]["result"]

    def answers(self, query: str) -> bool:
        try:
            return bool(self.ask("query", query=query))
        except OSError:
            return False

    def series(self, target: dict[str, Any], start: float, end: float) -> list[Series]:
        """What a panel's query is answered: at one moment, or over the time."""
        expression = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$job", ".*").replace("$instance", ".*")
        if target.get("instant"):
            found = self.ask("query", query=expression, time=end)
            return [(legend(target, of["metric"]), [(end, float(of["value"][1]))]) for of in found]
        found = self.ask("query_range", query=expression, start=start, end=end, step=2)
        return [(legend(target, of["metric"]), [(at, float(value)) for at, value in of["values"]]) for of in found]


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    text = target["legendFormat"]
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return " ".join(text.split())


# What is drawn

WIDTH, ROW, GAP = 1200, 30, 6
BACKGROUND, PANEL, INK, FAINT = "#111217", "#181b1f", "#ccccdc", "#3a3e46"
COLOURS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffee52", "#ff7383", "#96d98d"]
UNITS = {"pps": " p/s", "bps": " b/s", "bytes": " B", "cps": " /s", "s": " s", "short": "", "percentunit": ""}


def figure(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{UNITS[unit].strip()}"
    return f"{value:.3g}{UNITS[unit]}"


class Drawing:
    def __init__(self, height: int, title: str):
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
            f"<title>{html.escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="{BACKGROUND}"/>',
            f'<g font-family="Inter,Helvetica,Arial,sans-serif" font-size="11" fill="{INK}">',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> None:
        faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{fill}"{faint}/>')

    def text(self, x: float, y: float, text: str, *, size: int = 11, fill: str = "", anchor: str = "", bold: bool = False) -> None:
        look = f' font-size="{size}"' * (size != 11) + f' fill="{fill}"' * bool(fill) + f' text-anchor="{anchor}"' * bool(anchor)
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}"{look}{" font-weight=" + chr(34) + "600" + chr(34) if bold else ""}>{html.escape(text)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, down_to: Sequence[tuple[float, float]] = ()) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if down_to:
            area = " ".join(f"{x:.1f},{y:.1f}" for x, y in reversed(down_to))
            self._parts.append(f'<polygon points="{path} {area}" fill="{colour}" fill-opacity="0.25"/>')
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')

    def done(self) -> str:
        return "\n".join([*self._parts, "</g>", "</svg>", ""])


def draw(dashboard: dict[str, Any], answers: dict[int, list[Series]], start: float, end: float) -> str:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) * ROW + GAP
    drawing = Drawing(height, "The dashboard's panels, as a real Prometheus answers them")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * WIDTH / 24 + GAP, place["y"] * ROW + GAP
        width, tall = place["w"] * WIDTH / 24 - GAP, place["h"] * ROW - GAP
        if panel["type"] == "row":
            drawing.text(x, y + 16, panel["title"], size=13, bold=True)
            continue
        drawing.box(x, y, width, tall, PANEL)
        drawing.text(x + 8, y + 16, panel["title"], size=12, bold=True)
        kind = {"stat": _stat, "bargauge": _bars, "table": _table, "timeseries": _lines}[panel["type"]]
        kind(drawing, panel, answers[panel["id"]], (x + 8, y + 26, width - 16, tall - 34), (start, end))
    return drawing.done()


Place = tuple[float, float, float, float]


def _unit(panel: dict[str, Any]) -> str:
    return str(panel["fieldConfig"]["defaults"]["unit"])


def _stat(drawing: Drawing, panel: dict[str, Any], series: list[Series], place: Place, _: tuple[float, float]) -> None:
    x, y, width, tall = place
    name, [(_, value)] = series[0]
    shown = name if panel["options"]["textMode"] == "name" else figure(value, _unit(panel))
    colour = INK
    for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", []):
        if step["value"] is None or value >= step["value"]:
            colour = {"green": COLOURS[0], "red": COLOURS[4]}[step["color"]]
    drawing.text(x + width / 2, y + tall / 2 + 10, shown, size=28, fill=colour, anchor="middle")


def _bars(drawing: Drawing, panel: dict[str, Any], series: list[Series], place: Place, _: tuple[float, float]) -> None:
    x, y, width, tall = place
    most, high = max(values[-1][1] for _, values in series) or 1, tall / len(series)
    for index, (name, values) in enumerate(series):
        top, value = y + index * high, values[-1][1]
        drawing.text(x, top + high / 2 + 4, name)
        drawing.box(x + width * 0.4, top + 3, max(width * 0.45 * value / most, 1), high - 6, COLOURS[0])
        drawing.text(x + width, top + high / 2 + 4, figure(value, _unit(panel)), anchor="end")


def _table(drawing: Drawing, panel: dict[str, Any], series: list[Series], place: Place, _: tuple[float, float]) -> None:
    x, y, _width, _tall = place
    for index, (name, _values) in enumerate(series):
        drawing.text(x, y + 16 + index * 16, name)


def _lines(drawing: Drawing, panel: dict[str, Any], series: list[Series], place: Place, time_: tuple[float, float]) -> None:
    x, y, width, tall = place
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    # What is nothing all the time is named in a legend by Grafana; here there is room for those that are something.
    series = sorted((of for of in series if any(value for _, value in of[1])), key=lambda of: -of[1][-1][1])[:8] or series[:1]
    columns = 2 if len(series) > 2 else 1
    legend_rows = math.ceil(len(series) / columns)
    left, bottom = 58, tall - 15 * legend_rows - 8
    below: dict[float, float] = {}
    drawn: list[tuple[str, list[tuple[float, float]], list[tuple[float, float]], float]] = []
    for name, values in series:
        base = [(at, below.get(at, 0.0)) for at, _ in values] if stacked else []
        if stacked:
            values = [(at, value + below.get(at, 0.0)) for at, value in values]
            below.update(values)
        drawn.append((name, values, base, values[-1][1] - (base[-1][1] if base else 0)))
    most = nice(max((value for _, values, _, _ in drawn for _, value in values), default=1))

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return x + left + (width - left) * (point[0] - time_[0]) / (time_[1] - time_[0]), y + bottom - (bottom - 6) * point[1] / most

    for part in range(5):
        line = at((time_[0], most * part / 4))[1]
        drawing.line([(x + left, line), (x + width, line)], FAINT)
        drawing.text(x + left - 6, line + 4, figure(most * part / 4, _unit(panel)), anchor="end")
    for index, (name, values, base, latest) in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        points = [at(point) for point in values]
        drawing.line(points, colour, down_to=[at(point) for point in base])
        column, row = index % columns, index // columns
        across, down = x + column * width / columns, y + bottom + 16 + row * 15
        drawing.box(across, down - 7, 12, 4, colour)
        drawing.text(across + 18, down, name)
        drawing.text(across + width / columns - 12, down, figure(latest, _unit(panel)), anchor="end")


def nice(most: float) -> float:
    """A round number that is no smaller."""
    if most <= 0:
        return 1
    unit = 10 ** math.floor(math.log10(most))
    return next(factor * unit for factor in (1, 2, 4, 5, 8, 10) if factor * unit >= most * 0.999)


def _tabled(panel: dict[str, Any], prometheus: Prometheus, end: float) -> Iterator[Series]:
    """The rows of a table: what their labels say."""
    for target in panel["targets"]:
        expression = target["expr"].replace("$job", ".*").replace("$instance", ".*")
        for of in prometheus.ask("query", query=expression, time=end):
            labels = {name: value for name, value in of["metric"].items() if name not in ("job", "instance", "__name__", "layer")}
            yield from ((f"{name}: {value}", []) for name, value in labels.items())


def take(lab: Lab) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    host, net = wired(lab)
    with Traffic(net, host):
        lab.daemon(host, CONFIG + METRICS)
        prometheus = Prometheus(lab, host)
        start = time.time()
        wait_for(lambda: prometheus.answers("xdpmond_window_seconds"), "the first window", 60)
        lab.ctl("deny", "198.51.100.77", "--reason", "guesses passwords")
        lab.ctl("reload")
        wait_for(lambda: time.time() - start > SECONDS, f"{SECONDS} seconds of figures", SECONDS + 60)
        end = time.time() - 4
        start = end - SECONDS + 20
        answers = {}
        for panel in dashboard["panels"]:
            if panel["type"] == "table":
                answers[panel["id"]] = list(_tabled(panel, prometheus, end))
            elif panel["type"] != "row":
                answers[panel["id"]] = [series for target in panel["targets"] for series in prometheus.series(target, start, end)]
                if not answers[panel["id"]]:
                    raise AssertionError(f"the panel {panel['title']!r} has no answer")
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / "panels.svg").write_text(draw(dashboard, answers, start, end))
    print("docs/screens/panels.svg  the panels of contrib/grafana/xdpmond.json")


if __name__ == "__main__":
    sys.exit(run("panels", take))
