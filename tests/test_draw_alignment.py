"""Pictures of pages that `refmerge.pages` does not draw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import draw_measures
from tests.draw_alignment import FOLDER, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_what_the_command_draws(name):
    stored = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert stored == PICTURES[name](), "python -m tests.draw_alignment"
    assert f"({name}.svg)" in (FOLDER / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", draw_measures.PICTURES)
def test_pictures_of_measures_are_what_the_command_draws(page):
    stored = (draw_measures.SPEC / f"{page}.svg").read_text(encoding="utf-8")
    assert stored == draw_measures.PICTURES[page](), "python -m tests.draw_measures"
    assert f"({page.partition('/')[2]}.svg)" in (draw_measures.SPEC / f"{page}.md").read_text(encoding="utf-8")
