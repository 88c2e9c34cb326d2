"""`refmerge demo`: one base, four fine-tunes, and what each merge of them is worth, on real data and without a network.

The recipes are files beside this one and use default parameters; tests/train_demo.py made the models.
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
{notes}

Models, recipes and merges are files. Change {shown}.yml or add a recipe of your
own beside it, run the demo again, and see what it is worth:

  cd {out}
  refmerge inspect merged/{shown}
  refmerge explain {shown}
  refmerge merge {shown}.yml merged/{shown} --overwrite
  refmerge demo ."""


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

    copy_files(out)
    for recipe in recipes(out):
        run_recipe(recipe, out / "merged" / recipe.stem, overwrite=True)


def copy_files(out: Path) -> None:
    """What is missing in `out`. Recipes that were changed there stay; a folder that is not the demo's is refused."""
    notice = FOLDER / "NOTICE.md"
    models = [FOLDER / f"{name}.safetensors" for name in (BASE, *FINE_TUNES)]
    shipped = [FOLDER / f"{name}.yml" for name in RECIPES]
    if out.exists() and not (out.is_dir() and (same(out, notice) or not any(out.iterdir()))):
        raise UsageError(f"{out} is there and not from an earlier demo: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for source in (notice, *models, *shipped):
        target = out / source.name
        if not target.exists():
            target.write_bytes(source.read_bytes())
        elif source in models and not same(out, source):
            raise UsageError(f"{target} is not the demo's model of that name: move it away")


def same(out: Path, source: Path) -> bool:
    """Whether `out` holds this file of the demo, unchanged."""
    target = out / source.name
    return source.is_file() and target.is_file() and target.read_bytes() == source.read_bytes()


def recipes(out: Path) -> list[Path]:
    """The demo's recipes in their order, then those that were added."""
    added = sorted(path for path in out.glob("*.yml") if path.stem not in RECIPES)
    return [out / f"{name}.yml" for name in RECIPES] + added


def evaluate(out: Path) -> dict[str, Any]:
    """Accuracies of every model in `out`, read back from disk."""
    tasks = load_tasks(FOLDER / "digits.npz")
    rows: list[dict[str, Any]] = []
    for name in (BASE, *FINE_TUNES):
        path = out / f"{name}.safetensors"
        kind = "base" if name == BASE else "fine-tune"
        rows.append({"name": name, "kind": kind, "path": str(path), "accuracy": accuracies(load_file(path), tasks)})
    for path in recipes(out):
        merged = out / "merged" / path.stem
        recipe = YAML(typ="safe").load(path)
        weights = {key: array for file in merged.glob("*.safetensors") for key, array in load_file(file).items()}
        rows.append(
            {
                "name": path.stem,
                "kind": "merge",
                "path": str(merged),
                "accuracy": accuracies(weights, tasks),
                "models": [Path(entry["model"]).stem for entry in recipe.get("models", [])],
                "parameters": recipe.get("parameters", {}),
                "as_shipped": same(out, FOLDER / path.name),
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
    table.add_column("parameters", width=24)
    for task in (*found["tasks"], "mean"):
        table.add_column(task.replace("digits_", "").replace("_", "-"), justify="right", no_wrap=True)
    kind = BASE
    for row in found["rows"]:
        if row["kind"] != kind:
            table.add_section()
            kind = row["kind"]
        name = row["name"] if row.get("as_shipped", True) else f"{row['name']} *"
        parameters = " ".join(f"{key}={value}" for key, value in row.get("parameters", {}).items())
        cells = [
            Text(f"{100 * value:.1f}", style="bold" if task in (row["name"], "mean") else "")
            for task, value in row["accuracy"].items()
        ]
        table.add_row(Text(name), Text(parameters), *cells)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    merges = [row for row in found["rows"] if row["kind"] == "merge"]
    few = [row for row in merges if len(row["models"]) < len(FINE_TUNES)]
    notes = "".join(f"{row['name']} merges {' and '.join(row['models'])}; " for row in few) + "others all four.\n"
    notes += "Parameters are the defaults, from the papers or their code; nothing is tuned."
    if not all(row["as_shipped"] for row in merges):
        notes += "\n* this recipe was changed or added here."
    say(INTRO.format(images=found["images"]))
    console.print(table, width=80, crop=False)  # never a number cut short
    say("")
    say(OUTRO.format(notes=notes, out=quote(found["out"]), shown=SHOWN))
