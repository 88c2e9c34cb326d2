"""What searches have in common that score one merge after another."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.errors import UsageError

__all__ = ["Log", "Score", "check_command", "judged", "number", "scored"]

Score = Callable[[Mapping[str, Any]], float] | str | Sequence[str]


def number(value: Any, who: str) -> float:
    """A score as a float, which may be NaN. UsageError for what is no number."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"{who}: a score is a number, not {type(value).__name__}")


def judged(score: Score, candidate: Any, who: str) -> float:
    """What a function says of a model, or a command of the checkpoint's path."""
    return number(score(candidate), who) if callable(score) else _printed(score, candidate.path, who)


def _printed(command: str | Sequence[str], path: Path, who: str) -> float:
    """The score that a command prints of a checkpoint as its last line."""
    argv = [*(shlex.split(command) if isinstance(command, str) else command), str(path)]
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    except OSError as e:
        raise UsageError(f"{who}: {argv[0]} cannot be run: {e.strerror or e}") from None
    lines = done.stdout.split("\n") if done.stdout else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if done.returncode:
        raise UsageError(f"{who}: {argv[0]} ended with status {done.returncode}; a score ends with 0")
    try:
        return float(last)
    except ValueError:
        raise UsageError(f"{who}: a score is a number, not {last!r}") from None


def check_command(score: Score, models: Sequence[Any], out: Any, who: str) -> None:
    """UsageError where a command has no checkpoints to score."""
    in_memory = any(isinstance(m, Mapping) and not isinstance(m, Checkpoint) for m in models)
    if not callable(score) and (out is None or in_memory):
        raise UsageError(f"{who}: a command scores checkpoints: give models as paths, and out")


def scored(merged: Callable[[Path | None], Any], score: Callable[[Any], float], out: str | Path | None) -> float:
    """The score of what `merged` makes: in memory, or, where the result is to be written, of a checkpoint beside its place.

    merged: a function of a path, or of None, that gives tensors or the open checkpoint there.
    """
    if out is None:
        return score(merged(None))
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.trial-", dir=target.parent) as folder:
        with merged(Path(folder) / target.name) as candidate:
            return score(candidate)


class Log:
    """A file of lines of JSON: what is searched, then each trial, under the name `key`, and its score. A search that finds
    its log takes the scores from there, and goes on where they end. Without a path nothing is kept."""

    def __init__(self, path: str | Path | None, about: Mapping[str, Any], key: str, who: str) -> None:
        self.path, self.key, self.who = None if path is None else Path(path), key, who
        self.known: list[dict[str, Any]] = []
        about = json.loads(json.dumps(about))
        if self.path is None:
            return
        if not self.path.exists():
            self.path.write_text(json.dumps(about) + "\n", encoding="utf-8")
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # a line without an end was being written when a search was stopped
        if not whole or _parsed(whole[0]) != about:
            raise UsageError(f"{who}: {str(self.path)!r} is the log of another search: remove it or name another")
        self.known = [json.loads(line) for line in whole[1:]]
        if lines[-1]:
            self.path.write_text("\n".join([*whole, ""]), encoding="utf-8")

    def score(self, trial: Sequence[Any], score: Callable[[], float]) -> float:
        """The score of this trial, from the log or, if it ends before, taken now."""
        if self.known:
            found = self.known.pop(0)
            if found.get(self.key) != [*trial]:
                raise UsageError(f"{self.who}: {str(self.path)!r} has other {self.key} than this search makes")
            return float(found["score"])
        value = score()
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({self.key: [*trial], "score": value}) + "\n")
        return value


def _parsed(line: str) -> Any:
    """A line of a log; None for what is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
