"""Every cell of the notebooks runs, and shows what is stored below it (`--regen`: anew)."""

from __future__ import annotations

import sys
from pathlib import Path

import notebooks
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
PAGES = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_cells_show_what_is_stored(page: Path, tmp_path: Path, regen: bool,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook"])
    found = notebooks.carried_out(page)
    if regen:
        notebooks.store(page, found)
    assert notebooks.steady(found) == notebooks.steady(notebooks.stored(page))


def test_there_are_notebooks_of_the_form_that_editors_open() -> None:
    assert len(PAGES) >= 3
    for page in PAGES:
        ids = [cell["id"] for cell in notebooks.cells(page)]
        assert len(set(ids)) == len(ids) and notebooks.cells(page)[0]["cell_type"] == "markdown"
