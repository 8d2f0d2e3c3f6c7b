"""Draws docs/dashboard.svg: what a Prometheus finds for each panel of the dashboard, of a server with traffic.

Grafana is not needed: each panel's queries are evaluated through Prometheus (Debian's package has `prometheus`), and
their series drawn where the dashboard has the panel. Two tenants ask a tiny model, by turns much and little, with one
adapter more than the memory holds. Ends with an error that names the panels that have no data.
"""

import argparse
import asyncio
import hashlib
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from random import Random

import httpx

from repository import ROOT
from server_process import SMALL, free_port, process
from tiny import save_adapter, save_tiny_base

DASHBOARD = ROOT / "deploy" / "chart" / "dashboards" / "swaplora.json"
PICTURE = ROOT / "docs" / "dashboard.svg"
TENANTS = {"acme": ("sql", "json", "intent"), "beta": ("legal",)}
NAMES = [name for names in TENANTS.values() for name in names]
COLUMN, LINE = 50, 24  # pixels of the dashboard's grid, which has 24 columns
TITLE, LEGEND = 22, 14  # pixels
COLOURS = ("#3274d9", "#d9822b", "#2ca05a", "#c4343f", "#8f5bc4", "#7a6a58", "#d16ba5", "#5f6b7a", "#a8a52d", "#2aa6b5")
RATE = "8s"  # in the place of Grafana's interval

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """Of the dashboard: where it stands, and by legend what its queries found, seconds since the beginning and values.

    The title of a row of panels has no queries.
    """

    title: str
    unit: str
    place: dict[str, int]
    series: Series | None


@contextmanager
def prometheus(program: str, target: str, key: str, folder: Path) -> Iterator[httpx.Client]:
    """One that scrapes the server every second."""
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "swaplora",
                "authorization": {"credentials": key},
                "static_configs": [{"targets": [target]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with free_port() as port:
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series"]
        flags.append(f"--web.listen-address=127.0.0.1:{port}")
        scraper = subprocess.Popen([program, *flags], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                while not _is_ready(client):
                    time.sleep(0.2)
                yield client
        finally:
            scraper.terminate()
            scraper.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def write_keys(path: Path) -> dict[str, str]:
    """By tenant; the administrator's is that of ""."""
    keys = {"": "sk-admin"} | {tenant: f"sk-{tenant}" for tenant in TENANTS}
    stored = [
        {"id": tenant or "admin", "scopes": ["generate", "adapters:read", "adapters:write", "admin"]}
        | ({"tenant": tenant} if tenant else {})
        | {"sha256": hashlib.sha256(key.encode()).hexdigest()}
        for tenant, key in keys.items()
    ]
    path.write_text(json.dumps({"keys": stored}))
    path.chmod(0o600)
    return keys


def upload(client: httpx.Client, made: dict[str, Path], keys: dict[str, str]) -> None:
    for tenant, name in ((tenant, name) for tenant, names in TENANTS.items() for name in names):
        files = {
            part: (made[name] / f"adapter_{file}").read_bytes()
            for part, file in (("config", "config.json"), ("weights", "model.safetensors"))
        }
        headers = {"Authorization": f"Bearer {keys[tenant]}"}
        client.put(f"/v1/adapters/{name}", files=files, headers=headers).raise_for_status()


async def traffic(url: str, keys: dict[str, str], seconds: float) -> None:
    """Each adapter, and the base, is asked by turns with many at once and with few; some prompts begin alike."""
    end, rng = time.monotonic() + seconds, Random(0)

    async def ask(client: httpx.AsyncClient, tenant: str, name: str, number: int) -> None:
        while (left := end - time.monotonic()) > 0:
            if math.sin(left / 8 + number) < -0.2 and number % 3:
                await asyncio.sleep(1)
                continue
            prompt = [5] * 32 + rng.choices(range(5, 200), k=rng.randrange(4, 90))
            body = {"model": name, "prompt": prompt, "max_tokens": rng.randrange(4, 60), "stream": True}
            headers = {"Authorization": f"Bearer {keys[tenant]}"}
            async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                await answer.aread()

    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client, asyncio.TaskGroup() as askers:
        for number in range(24):
            for tenant, names in TENANTS.items():
                for name in (*names, "base"):
                    if number < 4 or name == "sql":
                        askers.create_task(ask(client, tenant, name, number))


def evaluate(client: httpx.Client, start: float, stop: float) -> list[Panel]:
    """Every panel of the dashboard."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        series: Series = {}
        for target in panel.get("targets", ()):
            series |= query(client, target["expr"], target["legendFormat"], start, stop)
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        found.append(Panel(panel["title"], unit, panel["gridPos"], series if "targets" in panel else None))
    return found


def query(client: httpx.Client, expression: str, legend: str, start: float, stop: float) -> Series:
    expression = expression.replace("$__rate_interval", RATE).replace("$instance", ".*")
    asked = {"query": expression, "start": str(start), "end": str(stop), "step": "1"}
    answer = client.get("/api/v1/query_range", params=asked).raise_for_status().json()
    found: Series = {}
    for one in answer["data"]["result"]:
        label = legend
        for name, value in one["metric"].items():
            label = label.replace("{{" + name + "}}", value.partition(":")[0])
        points = [(at - start, float(value)) for at, value in one["values"] if math.isfinite(float(value))]
        if points:
            found[label] = points
    return found


def draw(panels: Sequence[Panel], seconds: float) -> str:
    """An SVG."""
    width, height = 24 * COLUMN, max(panel.place["y"] + panel.place["h"] for panel in panels) * LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for panel in panels:
        drawn = draw_panel(panel, panel.series, seconds) if panel.series else draw_title(panel)
        place = f"translate({panel.place['x'] * COLUMN} {panel.place['y'] * LINE})"
        parts.append(f'<g transform="{place}">{drawn}</g>')
    return "\n".join([*parts, "</svg>", ""])


def draw_title(panel: Panel) -> str:
    return f'<text x="12" y="17" font-size="14" font-weight="bold">{escape(panel.title)}</text>'


def draw_panel(panel: Panel, series: Series, seconds: float) -> str:
    width, height = panel.place["w"] * COLUMN, panel.place["h"] * LINE
    left, right, top, bottom = 60, width - 12, TITLE + 6, height - 3 * LEGEND - 8
    most = max((value for points in series.values() for _, value in points), default=0) or 1.0
    parts = [
        f'<rect x="4" y="4" width="{width - 8}" height="{height - 8}" fill="none" stroke="#ccc"/>',
        f'<text x="12" y="{TITLE - 2}" font-size="12" font-weight="bold">{escape(panel.title)}</text>',
    ]
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        parts.append(f'<path d="M{left} {y:.0f}H{right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{words(share * most, panel.unit)}</text>')
    x_of_legend, y_of_legend = 12, bottom + LEGEND + 2
    for number, (label, points) in enumerate(sorted(series.items())):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(
            f"{left + at / seconds * (right - left):.0f},{bottom - value / most * (bottom - top):.0f}"
            for at, value in points
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        length = 14 + 5.6 * len(label)
        if x_of_legend + length > width - 8:
            x_of_legend, y_of_legend = 12, y_of_legend + LEGEND
        parts.append(f'<text x="{x_of_legend:.0f}" y="{y_of_legend}" fill="{colour}">{escape(label)}</text>')
        x_of_legend += round(length)
    return "".join(parts)


def words(value: float, unit: str) -> str:
    """A value of the axis."""
    match unit:
        case "percentunit":
            return f"{value:.0%}"
        case "bytes":
            return f"{value / 2**20:.3g} MiB" if value >= 2**20 else f"{value / 2**10:.3g} KiB"
        case "s":
            return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
        case "reqps":
            return f"{value:.3g}/s"
        case _:
            return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="prometheus", help="the program")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_tiny_base(folder / "base")
        made = {name: save_adapter(folder / name, base, seed=seed) for seed, name in enumerate(NAMES)}
        room = sum((made[name] / "adapter_model.safetensors").stat().st_size for name in NAMES[1:])
        keys = write_keys(folder / "keys.json")
        flags = [*SMALL, "--served-model-name", "base", "--key-file", str(folder / "keys.json")]
        flags += ["--max-num-seqs", "16", "--max-wait-seconds", "600", "--adapter-memory-bytes", str(room)]
        with (
            process(base, folder / "data", *flags) as (_server, server),
            prometheus(arguments.prometheus, server.base_url.netloc.decode(), keys[""], folder) as scraper,
        ):
            time.sleep(3)  # some scrapes, so that a rate is there from the beginning
            start = time.time()
            upload(server, made, keys)
            asyncio.run(traffic(str(server.base_url), keys, arguments.seconds))
            stop = time.time()
            panels = evaluate(scraper, start, stop)
    empty = [panel.title for panel in panels if panel.series == {}]
    if empty:
        raise SystemExit(f"no data for {', '.join(empty)}")
    PICTURE.write_text(draw(panels, stop - start))


if __name__ == "__main__":
    main()
