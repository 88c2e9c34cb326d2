"""The errors that refmerge raises on purpose: one clear line each, and the exit status of the command line.

Every message says what is wrong, in which file or tensor, and what would allow it.
"""

from __future__ import annotations


class RefmergeError(Exception):
    """Base class; `status` is the command line's exit status."""

    status = 1


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
