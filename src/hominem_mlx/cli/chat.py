"""`hominem chat`: a plain conversation with the base and its adapter. Nothing is stored, nothing is learnt."""

import sys
from collections.abc import Callable, Iterator

import click

from hominem_mlx.cli.session import Session, shares

HELP = "/reset begins anew   /quit ends   /help shows this   Ctrl-C stops an answer"
Speak = Callable[[list[dict[str, str]]], Iterator[str]]


@click.command()
@click.option("--adapter", metavar="NAME", help="A version, a tag, or `none`; else the current adapter.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: always the likeliest."
)
@shares(json=False)
def chat(session: Session, adapter: str | None, max_tokens: int, temperature: float) -> None:
    """Talk with the base and its current adapter.

    In a terminal it asks; from a pipe it answers line by line. With inference.endpoint set, answers come from that
    server, and learning is not possible there.
    """
    speak, who = _speaker(session, adapter, max_tokens, temperature)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session.console.note(who)
    if is_terminal:
        session.console.note(HELP)
    _talk(_typed() if is_terminal else _piped(), speak, session.config.student.system, is_terminal)


def _speaker(session: Session, adapter: str | None, max_tokens: int, temperature: float) -> tuple[Speak, str]:
    """What answers, and one line on who that is."""
    inference = session.config.inference
    if inference.endpoint:
        from hominem_mlx.data.teacher import HttpGenerator

        remote = HttpGenerator(inference)
        return (
            lambda messages: remote.stream(messages, max_tokens=max_tokens, temperature=temperature),
            f"Talking with {inference.model} at {inference.endpoint}. Nothing is learnt there.",
        )
    from hominem_mlx.models import sampling

    found = session.adapter(adapter)
    lm = session.speaking(adapter)
    return (
        lambda messages: sampling.stream(lm, messages, max_tokens=max_tokens, temperature=temperature),
        f"Talking with {lm.name}{f' and {found.ref}' if found else ', without an adapter'}.",
    )


def _talk(lines: Iterator[str], speak: Speak, system: str | None, is_terminal: bool) -> None:
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            messages = list(beginning)
            click.echo("A new conversation.", err=True)
        elif text.startswith("/"):
            click.echo(HELP, err=True)
        else:
            messages.append({"role": "user", "content": text})
            answer = _say(speak(messages), can_stop=is_terminal)
            messages.append({"role": "assistant", "content": answer})


def _say(pieces: Iterator[str], *, can_stop: bool) -> str:
    """Print an answer as it comes. In a terminal Ctrl-C ends the answer, not the program."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not can_stop:
            raise
    click.echo()
    return said.strip()


def _typed() -> Iterator[str]:
    """Lines a person types; Ctrl-D ends. History is kept in memory only: what was said is nobody's business."""
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    while True:
        try:
            yield prompt.prompt("> ")
        except EOFError:
            return


def _piped() -> Iterator[str]:
    yield from sys.stdin
