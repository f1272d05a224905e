"""What people see of a reply: lines of text and tables. Notes go to stderr, everything else to stdout.

Whatever a server says passes `clean` on its way to the terminal. rich is imported only where a table is drawn.
"""

import json
import os
import sys
import time
from typing import Any

import click

from client.api import DEFAULT_URL, ApiClient, Reply, clean


def say(text: str = "", nl: bool = True, err: bool = False) -> None:
    """Print text with its control characters made visible."""
    click.echo(clean(text), nl=nl, err=err)


def note(text: str) -> None:
    """Print a line that is not part of the answer."""
    say(text, err=True)


def raw() -> bool:
    """Say whether the running command was given --json."""
    return "json" in click.get_current_context().meta


def readable(value: Any) -> str:
    """Write a value of a reply for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {readable(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value > 1e9:  # a time: counts are integers
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def megabytes(nbytes: int | None) -> str:
    """Write a number of bytes for people."""
    return "-" if nbytes is None else f"{nbytes / 1e6:,.1f} MB"


def flat(reply: Reply, before: str = "") -> Reply:
    """Return a reply without objects inside and without what is empty: {"model": {"id": 1}} is {"model id": 1}."""
    found: Reply = {}
    for key, value in reply.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key} ")
        elif value not in (None, []):
            found[f"{before}{key}"] = value
    return found


def print_fields(reply: Reply) -> None:
    """Print a line for each field that has a value."""
    shown = flat(reply)
    width = max(map(len, shown), default=0)
    for key, value in shown.items():
        say(f"{key:{width}}  {readable(value)}")


def print_table(rows: list[Reply], columns: str) -> None:
    """Print some fields of each row in columns: ruled on a terminal, plain and as wide as needed elsewhere."""
    keys = columns.split()
    lines = [[clean(readable(row.get(key))).replace("\n", " ") for key in keys] for row in rows]
    if sys.stdout.isatty():
        from rich import box, console, table, text

        grid = table.Table(*keys, box=box.SIMPLE_HEAD)
        for line in lines:
            grid.add_row(*map(text.Text, line))
        console.Console().print(grid)
        return
    widths = [max(map(len, column)) for column in zip(keys, *lines, strict=True)]
    for line in [keys, *lines]:
        say("  ".join(f"{item:{width}}" for item, width in zip(line, widths, strict=True)).rstrip())


def print_reply(reply: Reply, list_key: str | None = None, columns: str = "") -> None:
    """Print a reply: raw with --json, else the list under a key as a table, else its fields."""
    if raw():
        click.echo(json.dumps(reply))
    elif list_key is None:
        print_fields(reply)
    elif reply[list_key]:
        print_table(reply[list_key], columns)
    else:
        note(f"no {list_key.replace('_', ' ')} yet")


def print_dry_run(reply: Reply) -> None:
    """Print what a training would be, and each warning on a line of its own."""
    if raw():
        return print_reply(reply)
    found = reply["dry_run"]
    print_fields({key: value for key, value in found.items() if key != "warnings"})
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    note(reply["message"])


def advise(client: ApiClient, **steps: str) -> None:
    """Print what to do next: a purpose and a command line to copy, with the address where it is needed."""
    address = "" if client.url in (DEFAULT_URL, os.environ.get("LM_SERVER_URL")) else f" --url {client.url}"
    for purpose, words in steps.items():
        note(f"{purpose + ':':10}python api_client.py {words}{address}")
