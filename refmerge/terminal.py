"""Words for people, on a terminal."""

from __future__ import annotations

import click

__all__ = ["say"]


def say(text: str, *, err: bool = False) -> None:
    """Print for people. Names come out of files that nobody has vetted: what could steer a terminal is escaped."""
    click.echo("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), err=err)
