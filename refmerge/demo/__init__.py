"""`refmerge demo`: one base, four fine-tunes, and what each merge of them is worth, on real data and without a network.

The recipes are files beside this one and use the papers' default parameters; tests/train_demo.py made the models.
"""

from __future__ import annotations

from json import dumps
from pathlib import Path
from shlex import quote
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from ..errors import UsageError
from .digits import accuracies, load_tasks

BASE = "base"
FINE_TUNES = ("digits_0_4", "digits_5_9", "rotated", "noisy")
RECIPES = (
    "linear",
    "slerp",
    "wise_ft",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "model_stock",
    "widen",
)
SHOWN = "ties"  # the recipe that the closing lines propose to edit

FOLDER = Path(__file__).parent
INTRO = """\
Handwritten digits of 8x8 pixels. A small network was trained briefly on
everything (base), then fine-tuned four times, on one task each. Each merge
makes one network of them without training. Accuracy in % on {images} images that
no model has seen, always among all ten digits:
"""
OUTRO = """\
{scope}

Parameters are the papers' defaults; nothing is tuned.
Models, recipes and merges are files; change {shown}.yml and merge again:

  cd {out}
  refmerge merge {shown}.yml merged/{shown} --overwrite
  refmerge inspect merged/{shown}
  refmerge explain {shown}
"""


def run(out: str | Path | None = None, *, json: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Merge by every recipe in the folder `out`, evaluate, print a table (or JSON), and return what was found."""
    console = console or Console()
    out = Path("refmerge-demo" if out is None else out)
    merge_all(out)
    found = evaluate(out)
    if json:
        console.file.write(dumps(found, indent=2) + "\n")
    else:
        show(found, console)
    return found


def merge_all(out: Path) -> None:
    """Copy models and recipes into `out` and run each recipe there, as `refmerge merge` would."""
    from .. import run_recipe

    rerun = copy_files(out)
    for name in RECIPES:
        run_recipe(out / f"{name}.yml", out / "merged" / name, overwrite=rerun)


def copy_files(out: Path) -> bool:
    """True if all were there already, from an earlier demo. A file that differs from ours is somebody's work."""
    sources = [FOLDER / f"{name}.safetensors" for name in (BASE, *FINE_TUNES)]
    sources += [FOLDER / f"{name}.yml" for name in RECIPES] + [FOLDER / "NOTICE.md"]
    missing = []
    for source in sources:
        target = out / source.name
        if not target.exists():
            missing.append(source)
        elif target.read_bytes() != source.read_bytes():
            raise UsageError(f"{target} differs from the demo's file: move it away, or choose another folder")
    if missing and (out / "merged").exists():
        raise UsageError(f"{out / 'merged'} is not from an earlier demo: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for source in missing:
        (out / source.name).write_bytes(source.read_bytes())
    return not missing


def evaluate(out: Path) -> dict[str, Any]:
    """Accuracies of every model in `out`, read back from disk."""
    tasks = load_tasks(FOLDER / "digits.npz")
    rows = []
    for name in (BASE, *FINE_TUNES):
        path = out / f"{name}.safetensors"
        kind = "base" if name == BASE else "fine-tune"
        rows.append({"name": name, "kind": kind, "path": str(path), "accuracy": accuracies(load_file(path), tasks)})
    for name in RECIPES:
        path = out / "merged" / name
        recipe = YAML(typ="safe").load(out / f"{name}.yml")
        weights = {key: array for file in path.glob("*.safetensors") for key, array in load_file(file).items()}
        rows.append(
            {
                "name": name,
                "kind": "merge",
                "path": str(path),
                "accuracy": accuracies(weights, tasks),
                "models": [Path(entry["model"]).stem for entry in recipe["models"]],
                "parameters": recipe.get("parameters", {}),
            }
        )
    return {"out": str(out), "images": len(tasks["noisy"][1]), "tasks": list(tasks), "rows": rows}


def show(found: dict[str, Any], console: Console) -> None:
    """The table: lines and colours on a terminal, aligned text elsewhere."""
    if console.is_terminal:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("parameters", no_wrap=True)
    for task in (*found["tasks"], "mean"):
        table.add_column(task.replace("digits_", "").replace("_", "-"), justify="right", no_wrap=True)
    kind = BASE
    for row in found["rows"]:
        if row["kind"] != kind:
            table.add_section()
            kind = row["kind"]
        parameters = " ".join(f"{name}={value:g}" for name, value in row.get("parameters", {}).items())
        cells = [
            Text(f"{100 * value:.1f}", style="bold" if task in (row["name"], "mean") else "")
            for task, value in row["accuracy"].items()
        ]
        table.add_row(row["name"], parameters, *cells)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    few = [row for row in found["rows"] if row["kind"] == "merge" and len(row["models"]) < len(FINE_TUNES)]
    scope = "".join(f"{row['name']} merges {' and '.join(row['models'])}; " for row in few) + "others all four."
    say(INTRO.format(images=found["images"]))
    console.print(table, width=80, crop=False)  # never a number cut short
    say("")
    say(OUTRO.format(scope=scope, out=quote(found["out"]), shown=SHOWN))
