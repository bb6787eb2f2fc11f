"""What may go, what not and why: the table, one dimension, a page; and when to take a pass."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli import inspection, look, pass_words
from spacompiler.cli.main import app
from spacompiler.errors import UsageError
from spacompiler.groups.cost import cost
from spacompiler.request import registry


class Block(nn.Module):
    """A residual branch behind a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.fixture(scope="module")
def solution():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(2), nn.Linear(16, 16), Block(), Block(),
                        nn.Linear(16, 4))
    return spacompiler.inspect(net, (torch.randn(2, 3, 6, 6),))


def shown(table, columns=80):
    console = Console(width=columns)
    with console.capture() as text:
        console.print(table)
    return text.get()


def test_groups_of_repeated_layers_are_folded_and_shares_add_up(solution):
    rows = inspection.rows(solution)
    names = {r.name: r for r in rows}
    assert sum(len(r.groups) for r in rows) == len(solution.groups)
    up = names["*.up.weight:0"]
    params = sum(t.numel() for t in [torch.empty(16, 40)] * 2) + 40
    total = cost(solution, "params").total
    assert up.may == "yes" and len(up.groups) == 2
    assert abs(up.params - len(up.groups) * params / total) < 1e-9
    hidden = next(r for r in rows if r.groups[0].role == "hidden")
    assert hidden.may == "--role hidden" and 0 < hidden.macs <= 1


def test_the_table_fits_80_columns_and_hides_the_axes_of_kernels(solution):
    text = shown(inspection.table(solution))
    assert max(map(len, text.splitlines())) <= 80
    assert "2 kernel" in " ".join(text.split()) and "0.weight:2" not in text


def test_of_one_dimension_it_says_what_may_go_and_why_the_rest_stays(solution):
    said = "\n".join(inspection.about(solution, "3.up.weight:0"))
    assert "40 slices of role channel may go" in said and "3.down.weight:1" in said
    said = "\n".join(inspection.about(solution, "3.up.weight:1"))
    assert "unless asked for by --role hidden" in said
    said = "\n".join(inspection.about(solution, "0.weight:2"))
    assert "3 slices stay: " in said and "works along it" in said
    with pytest.raises(UsageError, match="there is no array"):
        inspection.about(solution, "3.upp.weight:0")


def test_the_page_folds_and_searches_and_escapes(solution, tmp_path):
    inspection.write_page(solution, tmp_path / "p.html", "<nets>")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "&lt;nets&gt;" in text and "<nets>" not in text and 'type="search"' in text
    assert "http" not in text and text.count("<details") == text.count("</details>") > 2
    assert "windows of kernels" in text and "may go" in text


def test_every_built_in_pass_says_when_to_take_it():
    for kind, entry in registry.available():
        if entry.value.startswith("spacompiler."):
            said = pass_words.words(kind, entry)
            assert said.use, entry.name
            assert max(map(len, "\n".join(look._of_pass(said)).splitlines())) <= 80


def test_a_pass_is_explained_by_name():
    run = CliRunner()
    text = run.invoke(app, ["passes", "taylor"]).stdout
    assert "use it when: the default" in text and "ONNX files: no" in text and "per='token'" in text
    assert "ONNX files: yes" in run.invoke(app, ["passes", "wanda"]).stdout
    done = run.invoke(app, ["passes", "taylr"])
    assert done.exit_code == 2 and "did you mean 'taylor'?" in done.stderr
    lines = run.invoke(app, ["passes"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
