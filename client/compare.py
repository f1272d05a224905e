"""Training jobs beside each other: validation losses in one plot, what they came to, and the settings that differ."""

import json
from pathlib import Path
from statistics import median

import click

from client.api import ApiClient, ApiError, Reply
from client.follow import HEIGHT, WIDTH, Points, by_column
from client.view import note, print_reply, print_table, raw, say

MARKS = "abcdef"  # the letter of each job, in the plot and in the tables
SEVERAL = "*"  # where curves meet
NO_SETTINGS = ("output_dir", "overwrite")  # which say where a run is, not what it does


def val_losses(rows: list[Reply], column: str = "val_loss") -> Points:
    """Return iteration and validation loss; what an untrained model scores only counts while there is nothing else."""
    found = [(row["iter_num"], row[column]) for row in rows if row.get(column) is not None]
    return [point for point in found if point[0] > 0] or found


def tokens_differ(runs: list[list[Reply]]) -> bool:
    """Say whether a token holds more text in one run than in another: then only losses per byte compare."""
    evaluated = [
        next((row for row in rows if row.get("val_bits_per_byte") and row.get("val_loss")), None) for rows in runs
    ]
    sizes = [row["val_loss"] / row["val_bits_per_byte"] for row in evaluated if row is not None]
    return bool(sizes) and max(sizes) > 1.001 * min(sizes)


def plot(curves: list[Points]) -> list[str]:
    """Draw each curve in its own letter, the range of the losses at the left and that of the iterations below."""
    points = [point for curve in curves for point in curve]
    if not points:
        return []
    high, low, last = max(y for _, y in points), min(y for _, y in points), max(1, *(at for at, _ in points))
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, curve in zip(MARKS, curves, strict=False):
        for x, loss in (by_column(curve, last, WIDTH) if curve else {}).items():
            row = cells[round((high - loss) / max(high - low, 1e-9) * (HEIGHT - 1))]
            row[x] = mark if row[x] == " " else SEVERAL
    label = {0: f"{high:.3f}", HEIGHT - 1: f"{low:.3f}"}
    lines = [f"{label.get(row, ''):>8} {''.join(line).rstrip()}" for row, line in enumerate(cells)]
    return [*lines, f"{'':8} 0{'iteration'.center(WIDTH - 1 - len(str(last)))}{last}"]


def figures(mark: str, job: Reply, rows: list[Reply]) -> Reply:
    """Return what a job came to: its last and best losses, and its median speed."""
    losses, speeds = val_losses(rows), [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    best = min(losses, key=lambda point: point[1], default=(None, None))
    bits = min((loss for _, loss in val_losses(rows, "val_bits_per_byte")), default=None)
    known = {key: job.get(key) for key in ("name", "state", "iter_num", "loss")}
    last = losses[-1][1] if losses else None
    reached = {"val_loss": last, "best_val_loss": best[1], "best_at": best[0], "best_bits_per_byte": bits}
    return {"mark": mark} | known | reached | {"tokens_per_second": median(speeds) if speeds else None}


def differences(configs: list[Reply]) -> list[Reply]:
    """Return a row for each setting that is not the same in all configurations, by letter."""
    keys = sorted({key for config in configs for key in config if key not in NO_SETTINGS})
    values = {key: [config.get(key) for config in configs] for key in keys}
    differ = {key: each for key, each in values.items() if any(value != each[0] for value in each)}
    return [{"setting": key} | dict(zip(MARKS, each, strict=False)) for key, each in differ.items()]


def compare(client: ApiClient, names: tuple[str, ...]) -> None:
    """Print the plot and the tables for some jobs, or all of it as one JSON object."""
    if not 2 <= len(set(names)) == len(names) <= len(MARKS):
        raise click.UsageError(f"give 2 to {len(MARKS)} different jobs; `jobs` lists them")
    jobs, runs = [client.job(name) for name in names], [client.metrics(name) for name in names]
    column = "val_bits_per_byte" if tokens_differ(runs) else "val_loss"
    table = [figures(*each) for each in zip(MARKS, jobs, runs, strict=False)]
    settings = differences([job.get("config") or {} for job in jobs])
    if raw():
        click.echo(json.dumps({"jobs": table, "settings": settings}))
        return
    lines = plot([val_losses(rows, column) for rows in runs])
    if lines:
        unit = "bits per byte" if column == "val_bits_per_byte" else "nats per token"
        say("\n".join([f"validation loss, {unit}", *lines, ""]))
    else:
        note("none of these jobs has been evaluated yet")
    print_table(table, " ".join(table[0]))
    say()
    if settings:
        print_table(settings, " ".join(["setting", *MARKS[: len(names)]]))
    else:
        note("their settings are the same")


def save_picture(client: ApiClient, name: str, others: tuple[str, ...], path: Path) -> None:
    """Write the picture of a job's losses, and of others beside it, into a file: PNG by its ending, else SVG."""
    content = client.picture(name, others, "png" if path.suffix.lower() == ".png" else "svg")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ApiError(f"{path} could not be written: {error.strerror}") from None
    print_reply({"path": str(path), "bytes": len(content)})
