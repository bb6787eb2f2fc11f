"""The report as a page, as text and as a model card: whole, self-contained, true to report.json."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import huggingface_hub
import pytest
import torch
import yaml
from torch import nn

import spacompiler
from spacompiler.artifact import card, report
from spacompiler.artifact.page import page
from spacompiler.errors import SpaError, UsageError

VOID = {"meta", "link", "br", "rect", "line"}


class Reader(HTMLParser):
    """Collects tags and text; what is opened must be closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader.tags, " ".join(" ".join(reader.text).split())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8), nn.Flatten())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "out"
    spacompiler.compile(net(), (torch.randn(4, 16),), target="params~60%", importance="magnitude",
                        align=1, latency=False, onnx=False, prove=False, out=folder,
                        name="a <b> & 'c'")
    return folder


def test_the_page_needs_nothing_else_and_says_what_counts(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    tags, said = read(text)
    data = json.loads((out / "report.json").read_text())
    assert {"script", "iframe", "img"}.isdisjoint(tag for tag, _ in tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert any(t == "meta" and a.get("name") == "viewport" for t, a in tags)
    costs = data["costs"]["params"]
    assert f"{costs['pruned']:,}" in said and "a <b> & 'c'" in said
    for heading in ("How to load it", "Size and speed", "Widths, layer by layer", "Scores, and",
                    "Proof and control", "What stayed, and why", "How it was made"):
        assert heading in said, heading
    after = data["shrunk"][0]["after"]
    assert f"0.weight:0: {after} of 40" in said and "torch" in said


def test_the_page_follows_from_report_json(out):
    data = json.loads((out / "report.json").read_text())
    for made, name in ((page(data), "report.html"), (report.markdown(data), "report.md")):
        assert sorted(made) == sorted((out / name).read_text(encoding="utf-8"))  # keys are sorted
    data |= {"latency": {"dense": {"median_ms": 4.0}, "pruned": {"median_ms": 3.0}, "threads": 1,
                         "shapes": {"x": [1, 16]}}, "notes": ["<i>"], "unknown_operators": ["odd"],
             "frozen": {"a reason": 3}, "shrunk": [], "scores": []}
    _, said = read(page(data))
    assert "4.00 → 3.00" in said and "x 1×16" in said and "a reason" in said and "odd" in said


def test_a_decoder_is_timed_by_cases(out):
    times = {"dense": {"median_ms": 4.0}, "pruned": {"median_ms": 3.0}, "threads": 1}
    data = json.loads((out / "report.json").read_text()) | {
        "latency": {"case": "a prompt", **times}, "decode_latency": {"case": "a token", **times}}
    _, said = read(page(data))
    assert "a prompt, 1 thread; a token, 1 thread" in said and "latency of a decode step" in said


def test_scores_are_counted_about_the_cut(out):
    (found,) = json.loads((out / "report.json").read_text())["scores"]
    assert sum(found["bins"]) == 40 and 0 < found["cut"] < 1
    assert 0 < found["lost"] < found["gone"] < 1  # what went scored least
    said = read((out / "report.html").read_text(encoding="utf-8"))[1]
    assert f"{found['gone']:.0%} of the slices went, {found['lost']:.1%} of their scores" in said


def test_the_text_is_short_and_names_no_internals(out):
    text = (out / "report.md").read_text()
    assert "spacompiler.load" in text and "magnitude(" in text and "Magnitude(" not in text
    assert len(text.splitlines()) < 60


def test_the_card_has_front_matter_and_the_loader_loads(out):
    text = (out / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "spacompiler" and "base_model" not in front
    code = body.split("```python\n")[1].split("```")[0].replace("DIR", str(out))
    scope = {"dense": net()}
    exec(code, scope)
    assert isinstance(scope["model"], nn.Module)
    assert yaml.safe_load(card.card(json.loads((out / "report.json").read_text()), "a/b").split(
        "---\n")[1])["base_model"] == "a/b"


@pytest.mark.parametrize("layout, words", [
    ("uniform", "LlamaForCausalLM.from_pretrained"), ("onnx", "InferenceSession"),
    ("any", "spacompiler.load(\"DIR\")")])
def test_how_to_load_goes_by_the_layout(layout, words):
    assert words in report.loading({"layout": layout, "class": "LlamaForCausalLM",
                                    "source": {"kind": "zoo"}})


def test_an_upload_happens_only_when_asked_and_of_what_is_whole(out, monkeypatch, tmp_path):
    asked = []

    class Hub:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, name, private, exist_ok):
            asked.append((name, private))

        def upload_folder(self, repo_id, folder_path):
            asked.append(folder_path)
            return "there"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert asked == [] and card.push(out, "me/small") == "there"
    assert asked == [None, ("me/small", True), str(out)]
    monkeypatch.setattr(Hub, "create_repo", lambda *a, **k: 1 / 0)
    with pytest.raises(SpaError, match="cannot be uploaded"):
        card.push(out, "me/small")
    with pytest.raises(UsageError, match="nothing to upload"):
        spacompiler.Result(None).push_to_hub("me/small")
