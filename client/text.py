"""Text as it comes: the continuation of a prompt, and a conversation.

Ctrl-C ends either. A conversation is kept here, for the server keeps none: each request says all of it again.
"""

import sys
from collections.abc import Iterator
from typing import Any

import click

from client.api import ApiClient, ApiError, Reply
from client.view import note, print_reply, raw, say


def print_end(reply: Reply) -> None:
    """Print how long a text became and why it ended."""
    usage = reply.get("usage") or {}
    note(f"[{usage.get('completion_tokens', '?')} tokens, finish_reason {reply.get('finish_reason')}]")


def stream(client: ApiClient, body: Reply) -> None:
    """Print the prompt, then the text as it comes; the notes about it go to stderr."""
    end: Reply = {}
    try:
        for number, event in enumerate(client.generate_stream(body | {"stream": True})):
            say(body["prompt"] if number == 0 else "", nl=False)
            say(event.get("text", ""), nl=False)
            end = event
    except KeyboardInterrupt:
        say()  # what comes next begins a line
        raise
    say()
    print_end(end)


def answer(client: ApiClient, body: Reply) -> str:
    """Print the assistant's next message as it comes, or the reply as JSON, and return the message."""
    if raw():
        reply = client.chat(body)
        print_reply(reply)
        return str(reply["choices"][0]["message"]["content"])
    text = ""
    for event in client.chat_stream(body | {"stream": True}):
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            say(piece, nl=False)
            text += piece
    say()
    return text


def typed() -> Iterator[str]:
    """Yield the lines of standard input that say something, asked for by `> ` where somebody types them."""
    while True:
        if sys.stdin.isatty():
            say("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise click.UsageError("standard input is not text in this terminal's encoding") from None
        if not line:
            return
        if line.strip():
            yield line.strip()


def converse(client: ApiClient, said: str | None, system: str | None, options: dict[str, Any]) -> None:
    """Have one message answered, or one after the other until standard input ends.

    A message that is refused after others, as when the context is full, is an error that leaves room to go on.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    try:
        for line in typed() if said is None else [said]:
            messages.append({"role": "user", "content": line})
            try:
                text = answer(client, options | {"messages": messages})
            except ApiError as error:
                if error.away or len(messages) <= len(opening) + 1:
                    raise
                note(f"Error: {error.message}\nThe next message begins a new conversation.")
                messages = list(opening)
            else:
                messages.append({"role": "assistant", "content": text})
    except KeyboardInterrupt:
        say()  # what comes next begins a line
        raise
