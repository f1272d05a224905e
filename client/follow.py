"""Watching a training job: polled once a second, drawn live on a terminal, a line for each evaluation elsewhere.

A server that is away does not end the view: jobs outlive it. Ctrl-C ends the view and never the job.
"""

import json
import sys
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from client.api import ApiClient, ApiError, Reply, clean
from client.commands import INTERRUPTED
from client.view import advise, note, raw, readable, say

if TYPE_CHECKING:
    from rich.text import Text

Points = list[tuple[int, float]]  # iteration, loss

POLL_SECONDS = 1.0
LONGEST_POLL = 10.0  # while the server is away
ENDED = ("succeeded", "failed", "stopped", "lost")
AWAY = "server away, the job goes on; looking for it again"
WIDTH, HEIGHT, BAR = 60, 10, 30  # of the plot and the bar, in characters
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a character's 4 rows of 2 dots


@dataclass
class Watched:
    """A job as it was last seen, with all of its losses so far."""

    job: Reply
    new: list[Reply] = field(default_factory=list)  # rows of metrics since the last look
    train: Points = field(default_factory=list)
    val: Points = field(default_factory=list)
    last_words: str = ""  # of its log, until there are losses: what it prepares
    away: bool = False

    def add(self, rows: list[Reply]) -> None:
        """Take rows of metrics that were not there before."""
        self.new = rows
        self.train += [(row["iter_num"], row["loss"]) for row in rows if row.get("loss") is not None]
        self.val += [(row["iter_num"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]


def watch(client: ApiClient, name: str) -> Iterator[Watched]:
    """Yield a job each second until it has ended, less often while the server is away."""
    watched = Watched(client.job(name))
    after, pause = None, POLL_SECONDS
    while True:
        try:
            watched.job = client.job(name)
            watched.add(client.metrics(name, after))
            watched.last_words = "" if watched.train or watched.val else client.log(name)["log"].strip()[-200:]
            watched.away, pause = False, POLL_SECONDS
        except ApiError as error:
            if not error.away:
                raise
            watched.add([])
            watched.away, pause = True, min(2 * pause, LONGEST_POLL)
        if watched.new:
            after = watched.new[-1]["iter_num"]
        yield watched
        if watched.job["state"] in ENDED and not watched.away:
            return
        time.sleep(pause)


def by_column(points: Points, last: float, columns: int) -> dict[int, float]:
    """Return a curve's loss in each of `columns` from its first point to its last, on the lines between its points."""
    found = {round(at / last * (columns - 1)): loss for at, loss in points}
    for x in range(min(found) + 1, max(found)):
        at = x / (columns - 1) * last
        right = min(max(1, bisect(points, at, key=lambda point: point[0])), len(points) - 1)
        (at0, loss0), (at1, loss1) = points[right - 1], points[right]
        if x not in found:
            found[x] = loss0 + (loss1 - loss0) * (at - at0) / max(at1 - at0, 1e-9)
    return found


def plot(train: Points, val: Points) -> list[str]:
    """Draw the training losses as a line of braille dots and each validation loss as an `o`, the range at the left."""
    points = train + val
    if not points:
        return []
    high, low = max(loss for _, loss in points), min(loss for _, loss in points)
    last = max(1, *(at for at, _ in points))
    cells = [[0x2800] * WIDTH for _ in range(HEIGHT)]
    dots, marks = ([(round(at / last * (2 * WIDTH - 1)), loss) for at, loss in series] for series in (train, val))
    dots += by_column(train, last, 2 * WIDTH).items() if train else []
    for series, mark in ((dots, None), (marks, ord("o"))):
        for x, loss in series:
            y = round((high - loss) / max(high - low, 1e-9) * (4 * HEIGHT - 1))
            cells[y // 4][x // 2] = mark or cells[y // 4][x // 2] | BRAILLE[y % 4][x % 2]
    label = {0: f"{high:.3f}", HEIGHT - 1: f"{low:.3f}"}
    lines = [f"{label.get(row, ''):>8} {''.join(map(chr, line))}" for row, line in enumerate(cells)]
    legend = f"dots: train{' ' * 5}o: val".center(WIDTH - 1 - len(str(last)))
    return [*lines, f"{'':8} 0{legend}{last}"]


def standing(job: Reply) -> str:
    """Return the job's name, state and place: in the queue, or among its iterations."""
    if job.get("queue_position") is not None:
        reason = f" ({job['queue_reason']})" if job.get("queue_reason") else ""
        return f"{job['name']} {job['state']}  place {job['queue_position']} in the queue{reason}"
    state = "stopping" if job.get("stopping") else job["state"]
    return f"{job['name']} {state}  iteration {job.get('iter_num') or 0} of {readable(job.get('max_iters'))}"


def figures(job: Reply) -> str:
    """Return the job's losses, speed and time left, as far as they are known."""
    parts = {"loss": "loss {:.4f}", "val_loss": "val {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
    parts |= {"mfu": "{:.0%} of peak"}
    known = [label.format(job[key]) for key, label in parts.items() if job.get(key) is not None]
    if job["state"] == "running" and job.get("eta_seconds") is not None:
        known.append(f"{timedelta(seconds=round(job['eta_seconds']))} left")
    return "  ".join(known)


def picture(watched: Watched) -> "Text":
    """Return what the terminal shows: bar, figures, plot, and the latest sample."""
    from rich.text import Text

    job = watched.job
    full = min(BAR, round(BAR * (job.get("iter_num") or 0) / (job.get("max_iters") or 1)))
    bar = Text("━" * full, style="green").append("━" * (BAR - full), style="bright_black")
    words = watched.last_words.splitlines()[-1:] or [figures(job)]
    lines = [AWAY if watched.away else words[0], *plot(watched.train, watched.val)]
    sample = job.get("sample")
    if sample is not None:
        lines += ["", *f"{sample['prompt']}{sample['text']}".splitlines()[:6]]
    rest = clean("\n".join(lines))
    return Text(overflow="ellipsis", no_wrap=True).append(bar).append(clean(f"  {standing(job)}\n")).append(rest)


def draw(client: ApiClient, name: str) -> Reply:
    """Show a job on the terminal until it has ended, and return it."""
    from rich.live import Live

    with Live(refresh_per_second=4) as screen:
        for watched in watch(client, name):
            screen.update(picture(watched))
    return watched.job


def print_lines(client: ApiClient, name: str) -> Reply:
    """Print a line for each evaluation, or each row of metrics as JSON, until the job has ended; return it."""
    was_away, state = False, None
    for watched in watch(client, name):
        if watched.away != was_away:
            note(AWAY if watched.away else "the server is back")
        elif watched.job["state"] not in (state, *ENDED):
            note(standing(watched.job))
        was_away, state = watched.away, watched.job["state"]
        for row in watched.new:
            if raw():
                click.echo(json.dumps(row))
            elif row.get("val_loss") is not None:
                known = {"name": name, "state": "running", "max_iters": watched.job.get("max_iters")}
                seen = known | row | {"eta_seconds": row.get("seconds_left")}
                say(f"{standing(seen)}  {figures(seen)}")
    return watched.job


def follow(client: ApiClient, name: str) -> None:
    """Show a job until it ends. Exits with 1 unless it succeeded; Ctrl-C leaves it running."""
    try:
        job = (draw if sys.stdout.isatty() and not raw() else print_lines)(client, name)
    except KeyboardInterrupt:
        note(f"\nThe view has ended; the job {name} goes on.")
        advise(client, follow=f"jobs follow {name}", stop=f"jobs stop {name}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    if raw():
        click.echo(json.dumps(job))
    if job["state"] == "stopped" and not job.get("error"):
        note(standing(job))
        advise(client, resume=f"jobs resume {name}")
        raise click.exceptions.Exit(1)
    if job["state"] != "succeeded":
        note(f"Error: job {name} {job['state']}: {job.get('error') or 'it left no reason'}")
        steps = {"log": f"jobs log {name}"} | ({"resume": f"jobs resume {name}"} if job.get("has_checkpoint") else {})
        advise(client, **steps)
        raise click.exceptions.Exit(1)
    best = None if job.get("best_val_loss") is None else f"best val {job['best_val_loss']:.4f}"
    note("  ".join(filter(None, (standing(job), best, job.get("note")))))
    advise(client, load=f"load --model_path out/{name}/ckpt.pt")
