"""The errors that refmerge raises on purpose: one clear line each, and the exit status of the command line.

Every message says what is wrong, in which file or tensor, and what would allow it.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_TOLD = 20  # problems of one error


class RefmergeError(Exception):
    """Base class; `status` is the command line's exit status. problems: what an error of several says of each."""

    status = 1
    problems: Sequence[str] = ()


class UsageError(RefmergeError):
    """A call or an option that cannot be: unknown method, parameter, backend, or a mixture of array libraries."""

    status = 2


class RecipeError(UsageError):
    """A recipe that cannot be read or does not say what to do; names line and column where they are known."""


class InputError(RefmergeError):
    """A checkpoint that is malformed, incomplete, or does not fit the others."""

    status = 3


class ResourceError(RefmergeError):
    """Not enough disk or memory."""

    status = 5


def together(errors: Sequence[RefmergeError]) -> RefmergeError:
    """One error for all: itself where it is the only one, else a line for each, as an error of the first one's kind."""
    if len(errors) == 1:
        return errors[0]
    lines = list(dict.fromkeys(line for e in errors for line in e.problems or [str(e)]))
    more = [f"and {len(lines) - MAX_TOLD} more"] if len(lines) > MAX_TOLD else []
    several = type(errors[0])("\n  ".join([f"{len(lines)} problems", *lines[:MAX_TOLD], *more] if lines[1:] else lines))
    several.problems = lines
    return several
