"""How the client's commands are made: global options wherever on the line they stand, and a client for each call.

The commands themselves are in api_client.py. Nothing is sent here.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from client.api import DEFAULT_URL, ApiClient, ApiError

INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C


def remember(context: click.Context, option: click.Parameter, value: object) -> None:
    """Keep a global option wherever on the line it stands; the last one counts."""
    if value is not None:
        context.meta[str(option.name)] = value


def global_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every command takes."""
    add = functools.partial(click.option, callback=remember, expose_value=False)
    command = add("--json", is_flag=True, default=None, help="Print the raw reply.")(command)
    command = add("--api_key", help="API key; else LM_SERVER_API_KEY.")(command)
    return add("--url", help=f"Server; else LM_SERVER_URL, else {DEFAULT_URL}.")(command)


def connect() -> ApiClient:
    """Return the client that the options or the environment ask for."""
    meta = click.get_current_context().meta
    url = meta.get("url") or os.environ.get("LM_SERVER_URL") or DEFAULT_URL
    return ApiClient(url, meta.get("api_key") or os.environ.get("LM_SERVER_API_KEY") or None)


def run_to_end(group: click.Group, program: str) -> int:
    """Run the command line as click does, and return its exit code: after Ctrl-C the shells' one, wherever it was.

    click says Abort both of Ctrl-C, at a question or while it parses, and of what it has 1 for: no, and Ctrl-D.
    """
    try:
        return group.main(prog_name=program, standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        interrupted = isinstance(error.__context__, KeyboardInterrupt)
        click.echo("stopped" if interrupted else "Aborted!", err=True)
        return INTERRUPTED if interrupted else 1


def command(group: click.Group, name: str, form: str = "[OPTIONS]", **settings: Any) -> Callable[..., Any]:
    """Register a function as a command that gets a client and takes the global options after its name, too.

    `form` is how its options are written, for its usage, which wrong ones are answered with, too. `settings` are
    those of click's contexts.
    """

    def register(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            client = connect()
            try:
                function(client, **values)
            except KeyboardInterrupt:
                click.echo("stopped", err=True)
                raise click.exceptions.Exit(INTERRUPTED) from None
            except (AttributeError, KeyError, TypeError) as error:
                what = f"the answer of {client.url} has another shape than expected ({error!r})"
                raise ApiError(f"{what}; is the server of this client's version?") from error

        made: click.Command = group.command(name, context_settings=settings, options_metavar=form)(global_options(run))
        return made

    return register
