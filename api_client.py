"""The command-line client: click commands over one `ApiClient`, which speaks HTTP to a running server.

    python api_client.py status | list | load | unload | generate | chat | train | jobs | datasets | upload | export

Text goes to stdout, notes and errors to stderr; `--json` prints the raw reply. Exit codes: 0 done, 1 the server
refused or failed, 2 wrong usage, 3 server not reachable, 130 stopped by Ctrl-C. `client/` holds the HTTP calls, the
tables of options and the views; nothing of the server is imported, so that help and mistakes are answered at once.
"""

import sys

if __name__ == "__main__":  # Ctrl-C while no command is there yet to answer it
    sys.excepthook = lambda kind, *more: sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *more)

try:
    import json
    from pathlib import Path, PurePosixPath
    from typing import Any

    import click

    from client.api import ApiClient, Reply
    from client.commands import INTERRUPTED, command, global_options, run_to_end
    from client.compare import compare, save_picture
    from client.follow import follow, standing
    from client.options import SAMPLING, TRAINING, check_name, check_names, given, options, parse_settings, read_prompt
    from client.text import converse, print_end, stream
    from client.view import advise, megabytes, note, print_dry_run, print_reply, raw, say
except ModuleNotFoundError as error:  # the first mistake of many: a Python without the project's packages
    sys.exit(f"{error.name} is not installed for this Python; after `make setup` use .venv/bin/python api_client.py")


@click.group(
    context_settings={
        "token_normalize_func": lambda word: word.replace("-", "_"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    }
)
@global_options
def cli() -> None:
    """Load, generate and train with a language-model server.

    The server is started by `python api_server.py` or `make run`. Options may be written with dashes, too.
    """


# ---- models and text


@command(cli, "status")
def status(client: ApiClient) -> None:
    """Show the server, its model, its queue and its jobs."""
    print_reply(client.status())


@command(cli, "list")
def list_models(client: ApiClient) -> None:
    """List the models that can be loaded."""
    reply = client.models()
    if raw():
        return print_reply(reply)
    say(f"pretrained: {', '.join(reply['pretrained_models'])}")
    rows = [model["config"] | model for model in reply["trained_models"]]
    print_reply({"trained_models": rows}, "trained_models", "name path dataset model_type iter_num best_val_loss")


@command(cli, "sizes")
def sizes(client: ApiClient) -> None:
    """Show what each model takes: parameters, bytes on disk, and in memory when it serves."""
    reply = client.sizes()
    if raw():
        return print_reply(reply)
    rows = [model | {"disk": megabytes(model["size_bytes"])} for model in reply["data"]]
    rows = [row | {"memory": megabytes(row["memory_bytes"])} for row in rows]
    print_reply({"models": rows}, "models", "id kind loaded parameters disk memory")


@command(cli, "load", form="(--model_type NAME | --model_path PATH) [OPTIONS]")
@click.option("--model_type", help="Pretrained or bundled name, such as gpt2.")
@click.option("--model_path", help="Checkpoint or folder, such as out/my_model/ckpt.pt.")
def load(client: ApiClient, **which: str | None) -> None:
    """Load a model: exactly one of --model_type and --model_path."""
    if len(given(which)) != 1:
        raise click.UsageError("give exactly one of --model_type and --model_path; `list` shows what there is")
    note("loading ...")
    reply = client.load_model(given(which))
    print_reply(reply)
    chats = reply["model"].get("chat")
    advise(client, **({"chat": "chat"} if chats else {"generate": 'generate --prompt "Once upon a time"'}))


@command(cli, "unload")
def unload(client: ApiClient) -> None:
    """Unload the model and give its memory back."""
    print_reply(client.unload_model())
    advise(client, load="load --model_type tiny-shakespeare")


@command(cli, "generate", form="--prompt TEXT [OPTIONS]")
@click.option("--prompt", required=True, help="Text to continue; - reads standard input as it is.")
@click.option("--max_tokens", type=int, help="New tokens at most.")
@options(SAMPLING)
@click.option("--stop", multiple=True, help="End before this text. May be given several times.")
@click.option("--no_stream", is_flag=True, help="Print the text when it is complete.")
def generate(client: ApiClient, prompt: str, max_tokens: int | None, no_stream: bool, **sampling: Any) -> None:
    """Generate text, shown as it comes. Ctrl-C stops it. The server has the defaults."""
    body = given({"prompt": read_prompt(prompt), "max_new_tokens": max_tokens, **sampling})
    if not (no_stream or raw()) and body.get("num_samples", 1) == 1:
        return stream(client, body)
    reply = client.generate(body)
    if raw():
        return print_reply(reply)
    for sample in reply.get("samples") or [reply]:
        say(sample["generated_text"])
    print_end(reply)


@command(cli, "chat")
@click.option("--message", help="Say this and no more; else messages are read from standard input.")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max_tokens", type=int, help="New tokens of an answer at most.")
@options({name: row for name, row in SAMPLING.items() if name != "num_samples"})
def chat(client: ApiClient, message: str | None, system: str | None, **sampling: Any) -> None:
    """Talk with a model that was trained on chats; Ctrl-D or Ctrl-C ends it."""
    converse(client, message, system, given(sampling))


# ---- training


@command(cli, "train", form="--dataset NAME --output_dir out/NAME [OPTIONS]")
@click.option("--dataset", required=True, help="Dataset, such as stdlib or shakespeare; `datasets` lists them.")
@click.option("--output_dir", required=True, help="Folder of the run: out/<name>.")
@options(TRAINING)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; the value as JSON.")
@click.option("--priority", type=int, help="Place among the jobs that wait: higher goes first; default 0.")
@click.option("--follow", "live", is_flag=True, help="Watch the job until it ends.")
@click.option("--dry_run", is_flag=True, help="Start nothing: try three iterations and say what it would be.")
def train(client: ApiClient, settings: tuple[str, ...], live: bool, dry_run: bool, **config: Any) -> None:
    """Train a model in a job of the server.

    Once started, the job needs neither this terminal nor the server. What is left out comes from the preset or,
    for a model to fine-tune, from settings that suit it.
    """
    body, other = given(config), parse_settings(settings)
    if twice := sorted(body.keys() & other.keys()):
        raise click.UsageError(f"{twice[0]} is given twice: as an option and by --set")
    if dry_run:
        return print_dry_run(client.dry_run(body | other | {"dry_run": True}))
    reply = client.train(body | other)
    name = PurePosixPath(reply["config_path"]).parent.name
    print_reply(reply) if raw() else say(f"{reply['message']}: job {name}, settings in {reply['config_path']}")
    if live:
        return follow(client, name)
    if reply["process_id"] is None and "job" in reply:
        note(standing(reply["job"]))
    advise(client, follow=f"jobs follow {name}", load=f"load --model_path out/{name}/ckpt.pt")


@cli.group("jobs", invoke_without_command=True, subcommand_metavar="[show NAME | stop NAME | ...]")
@global_options
@click.pass_context
def jobs(context: click.Context) -> None:
    """List the training jobs, or do something with one of them."""
    if context.invoked_subcommand is None:
        context.invoke(list_jobs)


@command(jobs, "list")
def list_jobs(client: ApiClient) -> None:
    """List the training jobs."""
    print_reply(
        client.jobs(), "jobs", "name state queue_position iter_num max_iters loss val_loss tokens_per_second error"
    )


name_argument = click.argument("name", callback=check_name)


@command(jobs, "show")
@name_argument
def show(client: ApiClient, name: str) -> None:
    """Show all that is known about a job."""
    print_reply(client.job(name))


@command(jobs, "follow")
@name_argument
def follow_job(client: ApiClient, name: str) -> None:
    """Watch a job: progress, losses as a plot, speed, time left. Ctrl-C leaves the job running."""
    follow(client, name)


@command(jobs, "compare")
@click.argument("names", nargs=-1, required=True, callback=check_names)
def compare_jobs(client: ApiClient, names: tuple[str, ...]) -> None:
    """Compare jobs: validation losses in one plot, what they came to, and the settings that differ."""
    compare(client, names)


@command(jobs, "plot")
@name_argument
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; else NAME.svg.")
@click.option(
    "--compare", "others", multiple=True, callback=check_names, help="Another job. May be given several times."
)
def save_plot(client: ApiClient, name: str, output: Path | None, others: tuple[str, ...]) -> None:
    """Save the losses of a job as a picture, by the file's ending: .svg for browsers and documents, or .png."""
    target = Path(f"{name}.svg") if output is None else output
    if target.suffix.lower() not in (".svg", ".png"):
        raise click.UsageError(f"--output is {str(target)!r}; it must end in .svg or .png")
    save_picture(client, name, others, target)


@command(jobs, "samples")
@name_argument
@click.option("--last", type=click.IntRange(min=1), help="Only so many, the newest.")
def samples(client: ApiClient, name: str, last: int | None) -> None:
    """Show what a job's model wrote at each evaluation, from the same prompt and the same random numbers."""
    rows = client.samples(name)[-(last or 0) :]
    if raw():
        return print_reply({"samples": rows})
    if not rows:
        note(f"job {name} has written no samples yet")
    for row in rows:
        say(f"--- iteration {row['iter_num']}\n{row['prompt']}{row['text']}")


@command(jobs, "log")
@name_argument
@click.option("--follow", "live", is_flag=True, help="Go on until the job ends.")
def log(client: ApiClient, name: str, live: bool) -> None:
    """Show the last lines that a job has printed."""
    if not live:
        reply = client.log(name)
        return print_reply(reply) if raw() else say(reply["log"].removesuffix("\n"))
    try:
        for event in client.log_events(name):
            click.echo(json.dumps(event)) if raw() else say(event.get("text", ""), nl=False)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None


def print_standing(job: Reply) -> None:
    print_reply(job) if raw() else say(standing(job))


@command(jobs, "stop")
@name_argument
def stop(client: ApiClient, name: str) -> None:
    """Stop a job after it has saved a checkpoint."""
    job = client.stop(name)
    print_standing(job)
    if job["state"] != "succeeded":
        advise(client, resume=f"jobs resume {name}")


@command(jobs, "resume")
@name_argument
@click.option("--max_iters", type=int, help="Go on to this iteration; else to the one it was started for.")
@click.option("--iter_num", type=int, help="Go back to the checkpoint that keep_every kept of this iteration.")
def resume(client: ApiClient, name: str, **how: int | None) -> None:
    """Go on with a job that has ended, from its last checkpoint or one that was kept."""
    print_standing(client.resume(name, given(how)))
    advise(client, follow=f"jobs follow {name}")


@command(jobs, "priority", ignore_unknown_options=True)  # so that -5 is a number
@name_argument
@click.argument("priority", type=int)
def prioritize(client: ApiClient, name: str, priority: int) -> None:
    """Move a waiting job in the queue: a higher PRIORITY goes first."""
    print_standing(client.prioritize(name, {"priority": priority}))


@command(jobs, "delete")
@name_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(client: ApiClient, name: str, yes: bool) -> None:
    """Delete a job with its checkpoints."""
    if not yes:
        client.job(name)  # which refuses a name that is no job's
        click.confirm(f"Delete the job {name} with its checkpoints?", abort=True, err=True)
    reply = client.delete_job(name)
    print_reply(reply) if raw() else say(f"{name} deleted; its folder is in out/.trash")


# ---- data in, models out


@cli.group("datasets", invoke_without_command=True)
@global_options
@click.pass_context
def datasets(context: click.Context) -> None:
    """List the datasets to train on, or delete one."""
    if context.invoked_subcommand is None:
        context.invoke(list_datasets)


@command(datasets, "list")
def list_datasets(client: ApiClient) -> None:
    """List the datasets to train on."""
    print_reply(client.datasets(), "datasets", "name bytes documents tokens prepared source error")


@command(datasets, "delete")
@name_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_dataset(client: ApiClient, name: str, yes: bool) -> None:
    """Delete a dataset with its prepared tokens."""
    if not yes:
        click.confirm(f"Delete the dataset {name}?", abort=True, err=True)
    print_reply(client.delete_dataset(name))


@command(cli, "upload")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Name of the dataset; else the file's name without its ending.")
@click.option("--encoding", help="Encoding of FILE, such as latin-1; else it must be UTF-8.")
def upload(client: ApiClient, file: Path, name: str | None, encoding: str | None) -> None:
    """Upload a .txt or .jsonl FILE as a dataset to train on."""
    name = file.stem if name is None else name
    print_reply(client.upload(file, name, encoding))
    advise(client, train=f"train --dataset {name} --output_dir out/{name} --model_type nano --follow")


@command(cli, "export")
@click.argument("name", callback=check_name)
def export(client: ApiClient, name: str) -> None:
    """Export the trained model NAME for transformers."""
    print_reply(client.export({"model": name, "format": "hf"}))


def main() -> None:
    """Run the command line; a terminal that lacks a character shows `?` for it."""
    for out in (sys.stdout, sys.stderr):
        out.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(run_to_end(cli, "api_client.py"))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python; after `make setup` use .venv/bin/python")


if __name__ == "__main__":
    main()
