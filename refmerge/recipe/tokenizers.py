"""Tokenizers as files: which number each token has, and one tokenizer made of several.

Tokens are compared as text. Nothing is tokenized here: tokenizer.json lists all tokens, and new ones are written there as
added tokens, with numbers after the last one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.checkpoint.files import read_small, shown, there
from refmerge.checkpoint.header import strict_json
from refmerge.errors import InputError

__all__ = [
    "TOKENIZER_FILES",
    "Vocabulary",
    "differences",
    "read_json_file",
    "read_vocabulary",
    "same_files",
    "table",
    "union",
]

MAX_TOKENIZER = 256 << 20  # bytes
# What holds the vocabulary a second time, in the form of other libraries. Beside a changed tokenizer.json it would be wrong.
_OTHER_FORMS = frozenset({"tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
TOKENIZER_FILES = _OTHER_FORMS | {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says.

    ids: token -> its number. added: those of them that are added tokens -> their entry. data: the whole file. label: the
    model. changed: whether it is not the file as it lies there.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    label: str
    changed: bool = False

    def below(self, rows: int) -> Vocabulary:
        """Without the tokens for which a model of so many rows has none. InputError where they cannot be taken out."""
        unused = {token for token, i in self.ids.items() if i >= rows}
        if not unused:
            return self
        data = copy.deepcopy(dict(self.data))
        data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] < rows]
        model = data["model"]
        if unused & set(_model_ids(model)):
            if model.get("type") != "BPE":
                raise InputError(
                    f"{self.label}: its tokenizer has {len(unused)} tokens more than the model has rows, {min(unused)!r} "
                    f"for one, and they can only be taken out of one of type BPE, not {model.get('type')}"
                )
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in unused}
            model["merges"] = [m for m in model.get("merges", []) if not unused & set(_pair(m))]
        return _vocabulary(data, self.label, changed=True)

    def with_tokens(self, tokens: Iterable[tuple[str, Mapping[str, Any] | None]]) -> Vocabulary:
        """With these tokens, each with the settings of an added token; None for those of a plain one. Tokens that are there
        keep their numbers, new ones follow the last."""
        data = copy.deepcopy(dict(self.data))
        entries = {entry["content"]: entry for entry in data.get("added_tokens", [])}
        following = max(self.ids.values(), default=-1) + 1
        changed = self.changed
        for token, settings in tokens:
            if token in entries or (settings is None and token in self.ids):
                continue
            number = self.ids.get(token, following)
            following += number == following
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
            entries[token] = {**plain, **(settings or {}), "id": number, "content": token}
            changed = True
        data["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
        return _vocabulary(data, self.label, changed)

    def files(self, folder: Path | None) -> dict[str, bytes]:
        """The tokenizer's files that are not as they lie in its model's folder."""
        if not self.changed:
            return {}
        made = {"tokenizer.json": json_bytes(self.data)}
        config = None if folder is None else read_json_file(folder / "tokenizer_config.json")
        if config is not None and "added_tokens_decoder" in config:
            keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            config["added_tokens_decoder"] = {
                str(entry["id"]): {key: entry[key] for key in keys if key in entry} for entry in self.data["added_tokens"]
            }
            made["tokenizer_config.json"] = json_bytes(config)
        return made

    def sidecars(self, paths: Collection[Path]) -> list[Path]:
        """Of a folder's files those of this tokenizer."""
        left_out = _OTHER_FORMS if self.changed else frozenset()
        return [path for path in paths if path.name in TOKENIZER_FILES - left_out]


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a model, None where it has no tokenizer at all. InputError where there is one of another form."""
    folder = checkpoint.directory
    data = None if folder is None else read_json_file(folder / "tokenizer.json")
    if folder is not None and data is None:
        others = sorted(name for name in _OTHER_FORMS if there(folder / name))
        if others:
            raise InputError(
                f"{checkpoint.path}: its tokenizer is only in {', '.join(others)}: tokens are compared by tokenizer.json, "
                "which transformers writes with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
    return None if data is None else _vocabulary(data, str(checkpoint.path))


def same_files(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether all have the same tokenizer.json, to the byte, or none."""
    contents = set()
    for checkpoint in checkpoints:
        path = None if checkpoint.directory is None else checkpoint.directory / "tokenizer.json"
        contents.add(read_small(path, MAX_TOKENIZER) if path is not None and there(path) else None)
    return len(contents) <= 1


def union(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """The first one, with the tokens of the others: first those that are not added tokens, and then all that are."""
    plain = [(token, None) for v in vocabularies for token in _by_number(v.ids) if token not in v.added]
    added = {token: v.added[token] for v in reversed(vocabularies) for token in v.added}  # the first one's settings count
    own = [(token, added[token]) for v in vocabularies for token in _by_number(v.ids) if token in v.added]
    return vocabularies[0].with_tokens([*(pair for pair in plain if pair[0] not in added), *own])


def differences(one: Vocabulary, other: Vocabulary) -> tuple[int, int, int]:
    """How many tokens are only in the one, only in the other, and in both with another number."""
    moved = sum(other.ids[token] != i for token, i in one.ids.items() if token in other.ids)
    return len(one.ids.keys() - other.ids.keys()), len(other.ids.keys() - one.ids.keys()), moved


def renumbered(
    config: Mapping[str, Any], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[dict[str, Any], list[str]]:
    """A config whose numbers of tokens (`eos_token_id` and its like) mean the same tokens as before; and the changes."""
    tokens = {i: token for token, i in before.items()}
    new, changes = dict(config), []

    def moved(key: str, number: Any) -> Any:
        token = tokens.get(number) if type(number) is int else None
        if token is None or after.get(token) == number:
            return number
        if token not in after:
            changes.append(f"{key} is the number of {token!r}, which the result does not have: unchanged")
            return number
        changes.append(f"{key} is {after[token]} now, not {number}, for {token!r}")
        return after[token]

    for key, value in config.items():
        if isinstance(value, Mapping):
            new[key], inner = renumbered(value, before, after)
            changes += inner
        elif key.endswith("_token_id"):
            new[key] = [moved(key, i) for i in value] if isinstance(value, list) else moved(key, value)
    return new, changes


def table(rows: Sequence[tuple[str, int | None, Vocabulary | None]]) -> str:
    """Models, the rows of their embeddings and their tokens, each compared with the first one that has a tokenizer."""
    first = next((v for _, _, v in rows if v is not None), None)
    lines = [("model", "rows", "tokens", "not in the first", "missing here", "other number")]
    for label, count, v in rows:
        told = [label, "-" if count is None else str(count)]
        if v is None or first is None:
            told += ["no tokenizer", "", "", ""]
        else:
            missing, more, moved = differences(first, v)
            told += [str(len(v.ids)), str(more), str(missing), str(moved)]
        lines.append(tuple(told))  # type: ignore[arg-type]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = [line[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(line[1:], widths[1:])) for line in lines]
    return "\n".join(f"  {line.rstrip()}" for line in text)


def _vocabulary(data: Mapping[str, Any], label: str, changed: bool = False) -> Vocabulary:
    try:
        added = {entry["content"]: entry for entry in data.get("added_tokens") or []}
        ids = {**_model_ids(data["model"]), **{token: entry["id"] for token, entry in added.items()}}
        if not all(isinstance(t, str) and type(i) is int and i >= 0 for t, i in ids.items()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{label}: tokenizer.json does not list tokens with their numbers") from None
    return Vocabulary(ids, added, data, label, changed)


def _model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of token and score, in the order of their numbers
        return {entry[0]: i for i, entry in enumerate(vocab)}
    return dict(vocab)


def _by_number(ids: Mapping[str, int]) -> list[str]:
    return sorted(ids, key=lambda token: (ids[token], token))


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def read_json_file(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no such file; InputError if it is none."""
    if not there(path):
        return None
    try:
        value = strict_json(read_small(path, MAX_TOKENIZER), floats=True)
    except ValueError as error:
        raise InputError(f"{shown(path)}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: not a JSON object")
    return value


def read_tokenizer_config(files: Mapping[str, bytes], folder: Path | None) -> dict[str, Any] | None:
    """tokenizer_config.json as it will be: of these files, or else of the folder."""
    if "tokenizer_config.json" in files:
        found: dict[str, Any] = json.loads(files["tokenizer_config.json"])
        return found
    return None if folder is None else read_json_file(folder / "tokenizer_config.json")


def json_bytes(value: Any) -> bytes:
    """JSON as it is written beside a checkpoint."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
