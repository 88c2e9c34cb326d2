"""The demo's files are what they claim to be, and the table it prints is what its files on disk are worth."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from refmerge import demo, registry
from refmerge.errors import UsageError

FOLDER = Path(demo.__file__).parent
FINE_TUNES = ["digits_0_4", "digits_5_9", "rotated", "noisy"]


def script():
    """tests/train_demo.py as a module."""
    spec = importlib.util.spec_from_file_location("train_demo", Path(__file__).with_name("train_demo.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    with np.load(FOLDER / "digits.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder, returned rows and printed text of one run."""
    out, text = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    return out, demo.run(out, console=Console(file=text)), text.getvalue()


def share_right(weights, digits, task):
    """Accuracy by another road than the demo's: pixel indices for the rotation, one homogeneous matrix a layer."""
    images, labels = digits["test_images"].astype(float), digits["test_labels"]
    if task == "rotated":
        images = np.array([[[image[j][7 - i] for j in range(8)] for i in range(8)] for image in images])
    elif task == "noisy":
        images = digits["test_noisy"].astype(float)
    else:
        chosen = [k for k, label in enumerate(labels) if (label <= 4) == (task == "digits_0_4")]
        images, labels = images[chosen], labels[chosen]
    x = images.reshape(-1, 64).T / 16
    for layer in ("layer1", "layer2", "head"):
        matrix = np.column_stack([weights[f"{layer}.weight"], weights[f"{layer}.bias"]]).astype(float)
        x = matrix @ np.vstack([x, np.ones(x.shape[1])])
        x = x if layer == "head" else x * (x > 0)
    return np.count_nonzero(x.argmax(axis=0) == labels) / len(labels)


def test_the_images_are_those_of_scikit_learn(digits):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the original images")
    images, labels = datasets.load_digits(return_X_y=True)
    is_test = np.arange(len(labels)) % 3 == 0
    for part, chosen in (("test", is_test), ("train", ~is_test)):
        np.testing.assert_array_equal(digits[f"{part}_images"].reshape(-1, 64), images[chosen])
        np.testing.assert_array_equal(digits[f"{part}_labels"], labels[chosen])


def test_no_test_image_was_trained_on(digits):
    trained = {image.tobytes() for image in digits["train_images"]}
    assert not trained & {image.tobytes() for image in digits["test_images"]}


def test_the_script_makes_the_images_and_models_again(digits):
    train_demo = script()
    noisy = train_demo.add_noise(digits["test_images"], np.random.RandomState(0))
    assert np.mean(noisy != digits["test_noisy"]) < 1e-3  # a rounding may differ by platform
    for name, weights in train_demo.train_all(digits["train_images"], digits["train_labels"]).items():
        shipped = load_file(FOLDER / f"{name}.safetensors")
        assert shipped.keys() == weights.keys()
        for key in weights:
            np.testing.assert_allclose(weights[key], shipped[key], rtol=0, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.parametrize("task", FINE_TUNES)
def test_a_fine_tune_beats_the_base_on_its_task(digits, task):
    base, tuned = (share_right(load_file(FOLDER / f"{name}.safetensors"), digits, task) for name in ("base", task))
    assert 0.5 < base < tuned - 0.1
    assert tuned > 0.8


@pytest.mark.parametrize("name", demo.RECIPES)
def test_a_recipe_has_the_defaults_of_its_method(name):
    recipe = YAML(typ="safe").load(FOLDER / f"{name}.yml")
    params = registry.get(recipe["merge_method"]).params
    for key, value in recipe.get("parameters", {}).items():
        param = params.get(key) or params[f"{key}_"]
        assert param.default == value, f"{name}: {key}"


def test_every_recipe_is_run():
    assert {path.stem for path in FOLDER.glob("*.yml")} == set(demo.RECIPES)


def test_the_table_is_what_the_files_on_disk_are_worth(ran, digits):
    out, found, text = ran
    assert [row["name"] for row in found["rows"]] == ["base", *FINE_TUNES, *demo.RECIPES]
    assert found["tasks"] == FINE_TUNES
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.count(".") > 4}
    for row in found["rows"]:
        path = Path(row["path"])
        path = path if path.is_file() else path / "model.safetensors"
        assert path.is_relative_to(out)
        expected = [share_right(load_file(path), digits, task) for task in FINE_TUNES]
        expected.append(math.fsum(expected) / 4)
        assert list(row["accuracy"].values()) == pytest.approx(expected, abs=0.004)  # one image near a border
        assert lines[row["name"]][-5:] == [f"{100 * value:.1f}" for value in row["accuracy"].values()]


def test_the_text_fits_a_narrow_terminal_and_proposes_commands_that_exist(ran):
    out, _, text = ran
    assert "nothing is tuned" in text
    assert max(map(len, text.replace(str(out), "OUT").splitlines())) <= 80
    assert (out / "merged" / demo.SHOWN).is_dir() and (out / f"{demo.SHOWN}.yml").is_file()


def test_a_second_run_gives_the_same(ran):
    out, found, _ = ran
    text = io.StringIO()
    assert demo.run(out, json=True, console=Console(file=text)) == found
    assert json.loads(text.getvalue()) == found


def test_recipes_changed_or_added_are_kept_run_and_marked(tmp_path):
    demo.run(tmp_path, console=Console(file=io.StringIO()))
    changed = (FOLDER / "task_arithmetic.yml").read_text().replace("lambda: 1.0", "lambda: 0.0")
    for name in ("task_arithmetic", "mine"):
        (tmp_path / f"{name}.yml").write_text(changed)
    text = io.StringIO()
    rows = {row["name"]: row for row in demo.run(tmp_path, console=Console(file=text))["rows"]}
    assert rows["mine"]["accuracy"] == rows["task_arithmetic"]["accuracy"] == rows["base"]["accuracy"]
    assert [name for name, row in rows.items() if not row.get("as_shipped", True)] == ["task_arithmetic", "mine"]
    assert "task_arithmetic *" in text.getvalue() and "mine *" in text.getvalue()
    assert (tmp_path / "task_arithmetic.yml").read_text() == changed


@pytest.mark.parametrize("name", ["ties.yml", "NOTICE.md", "merged/ties/model.safetensors"])
def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="another folder"):
        demo.run(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_a_model_that_was_changed_is_left_alone(tmp_path):
    demo.copy_files(tmp_path)
    (tmp_path / "base.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"base\.safetensors"):
        demo.run(tmp_path)
    assert (tmp_path / "base.safetensors").read_bytes() == b"mine"
