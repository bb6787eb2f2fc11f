"""Whole blocks: which may go, that the network without them is the one that bypasses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler import models_zoo
from spacompiler.errors import ControlError, ProofError, SpaError, TargetError, UsageError
from spacompiler.pipeline.request import Given, make_request
from spacompiler.plan.plan import pruned_bytes
from spacompiler.request.recipe import Recipe
from spacompiler.sources import named as source
from spacompiler.stages.records import Request
from spacompiler.torch_backend.weights import results
from spacompiler.trials import blocks, depth
from spacompiler.trials.blocks import bypassed, drop, removable, without
from spacompiler.trials.shorter import renumbered

QUICK = {"align": 1, "latency": False, "onnx": False}
WHOLE = {  # blocks of each zoo model
    "llama-gqa": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "resnet": ["2", "4"],  # those that halve the map are no x + f(x)
    "bert": [],  # norms stand after the sums
    "vgg": [],
    "mlp": [],
}


def tiny(layers: int = 4, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": layers, **sizes})
    return LlamaForCausalLM(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "use_cache": False}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", WHOLE)
def test_which_blocks_may_go(name: str) -> None:
    found = source.load(f"zoo:{name}")
    assert removable(found.module, found.inputs) == WHOLE[name]


class Nested(nn.Module):
    """Stages of residual blocks, one block called twice, one list inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(Add(), Add()), nn.Sequential(Add(), Add()))
        self.twice = nn.ModuleList([Add(), Add()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(x)
        return self.twice[1](self.twice[0](self.twice[0](x)))


class Add(nn.Module):
    """x + f(x), x overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.f(x))


def test_innermost_blocks_called_once() -> None:
    found = removable(Nested().eval(), (torch.randn(2, 6),))
    assert found == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "twice.1"]


class Rectified(Add):
    """relu(x) + f(relu(x)), x overwritten: no x + f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu_() + self.f(x)


def test_what_a_block_reads_is_what_it_was() -> None:
    module = nn.Sequential(Rectified(), Rectified()).eval()
    assert removable(module, (torch.randn(4, 6),)) == []


class Cache:
    """What blocks write into, beside their results."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []


class Counting(nn.Module):
    """Blocks that write into a cache that they are given."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Kept(), Kept(), Kept()])
        self.wanted = wanted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache)
        if len(cache.states) != self.wanted:
            raise ValueError(f"{len(cache.states)} entries")
        return x


class Kept(Add):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.states.append(x)
        return x + self.f(x)


def test_caches_are_not_written_twice() -> None:
    module, example = Counting(3).eval(), (torch.randn(2, 6),)
    known = removable(module, example)
    assert known == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(SpaError, match=r"without blocks\.1 does not run"):
        drop(module, example, known[1:2], known)
    with pytest.raises(SpaError, match="does not run block by block"):
        removable(Counting(2).eval(), example)


@pytest.mark.parametrize("gone", [[0], [1, 2], [0, 3]])
def test_shorter_is_the_dense_one_that_bypasses(gone: list[int]) -> None:
    module, paths = tiny(), [f"model.layers.{i}" for i in gone]
    before = copy.deepcopy(module.state_dict())
    made = without(module, paths)
    assert made.config.num_hidden_layers == 4 - len(gone)
    for length in (9, 5):
        ids = {"input_ids": inputs()["input_ids"][:, :length]}
        with bypassed(module, paths):
            want = results(module, (), ids)
        assert torch.equal(results(made, (), ids)[0], want[0])
        assert not torch.equal(results(module, (), ids)[0], want[0])  # and back to itself
    assert all(map(torch.equal, before.values(), module.state_dict().values()))


def test_a_wrong_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, known = tiny(), [f"model.layers.{i}" for i in range(4)]
    _, found = drop(module, inputs(), known[1:2], known)
    assert found.error == 0 and found.control > 1e-2 and found.bypassed != known[1]
    monkeypatch.setattr(blocks, "without", lambda m, paths: without(m, known[2:3]))
    with pytest.raises(ProofError, match="is not the one that bypasses"):
        drop(module, inputs(), known[1:2], known)


def test_blocks_without_effect_are_no_control() -> None:
    module = tiny()
    with torch.no_grad():
        for layer in module.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    known = [f"model.layers.{i}" for i in range(4)]
    with pytest.raises(ControlError, match="wrong bypass is not seen"):
        drop(module, inputs(), known[:1], known)


def test_lists_in_the_config_lose_the_same_layers() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    module = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8,
        num_key_value_heads=4, num_hidden_layers=4, layer_types=kinds, sliding_window=3,
        use_sliding_window=True)).eval()  # heads and layers are four: which entry is found out
    known = [f"model.layers.{i}" for i in range(4)]
    made, found = drop(module, inputs(), known[1:2], known)
    assert made.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    assert made.config.num_attention_heads == 4 and found.error == 0


def test_no_config_says_so() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    module = T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)).eval()
    with pytest.raises(SpaError, match=r"no configuration describes encoder\.block"):
        without(module, ["encoder.block.0"])  # it holds the table of positions


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_other_language_models(name: str) -> None:
    last = WHOLE[name][-1]
    found = source.load(f"zoo:{name}")
    made, check = drop(found.module, found.inputs, [last], WHOLE[name])
    assert check.error <= 1e-6 and f"{last}." not in "".join(made.state_dict())


def test_names_are_numbered_anew() -> None:
    names = dict.fromkeys(["a.h.0.w", "a.h.10.w", "a.h.9.w", "a.hh.0.w", "h.0.w"])
    assert renumbered(names, "a.h", 11, [0, 9]) == {
        "a.h.8.w": "a.h.10.w", "a.hh.0.w": "a.hh.0.w", "h.0.w": "h.0.w"}


# --- the step ---------------------------------------------------------------------------------


def asked(module: nn.Module, **options: object) -> Request:
    recipe = Recipe("body=50%", importance="magnitude", **{**QUICK, **options})
    return make_request(module, inputs(), recipe, Given(calibration=[((), inputs())]))[0]


def test_blocks_that_do_least_go_first() -> None:
    module = tiny()
    with torch.no_grad():
        for i, scale in ((2, 1e-3), (0, 1e-2)):
            layer = module.model.layers[i]
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    known = [f"model.layers.{i}" for i in range(4)]
    assert depth.order(asked(module), module, known, 2) == [known[2], known[0]]
    assert depth.order(asked(module), module, known, 2, known[:1]) == [known[0], known[2]]


@pytest.mark.parametrize("target, width", [("body=75%", False), ("body=50%,macs=90%", True)])
def test_compile_without_blocks(tmp_path, target: str, width: bool) -> None:
    from transformers import AutoModelForCausalLM

    tiny().save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    result = spacompiler.compile(
        str(tmp_path / "dense"), target=target, blocks="1", importance="magnitude", out=out,
        calibration=[((), inputs())], align=1, latency=width)
    gone = result.job.dropped
    assert gone is not None and result.report["blocks"]["dropped"] == list(gone.paths)
    widths = spacompiler.compile(tiny(), inputs(), target=target, importance="magnitude", **QUICK)
    cost = result.plan.costs["body"]
    assert cost["dense"] == widths.plan.costs["body"]["dense"]
    share = cost["pruned"] / cost["dense"]
    assert abs(share - float(target[5:7]) / 100) <= 0.01 and bool(result.plan.kept) == width
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 3
    assert torch.equal(model(**inputs()).logits, result.module(**inputs()).logits)
    assert model.generate(inputs()["input_ids"], max_new_tokens=4, do_sample=False).shape == (2, 13)
    checks = {c.name: c for c in spacompiler.verify(out, str(tmp_path / "dense"))}
    assert all(c.passed for c in checks.values()), checks
    assert "bypasses 1 blocks" in (out / "report.md").read_text()
    assert result.report["bytes"]["dense"] == pruned_bytes(widths.solution, {})["dense"]


@pytest.mark.parametrize(("target", "repair"), [("body=75%", "none"), ("body=50%", "refit")])
def test_a_repair_is_reported_where_there_was_one(tmp_path, target: str, repair: str) -> None:
    """Nothing lost a slice where blocks alone meet the target; the recipe says what was asked."""
    result = spacompiler.compile(tiny(), inputs(), target=target, blocks="1", repair="refit",
                                 importance="magnitude", calibration=[((), inputs())],
                                 out=tmp_path / "out", **QUICK)
    assert result.report["repair"].startswith(repair)
    said = "refit repaired nothing: no width changed" in result.report["notes"]
    assert said == (repair == "none") == (not result.job.trace.repaired)
    assert '"refit(' in (tmp_path / "out" / "recipe.json").read_text()


@pytest.mark.parametrize("layout", ["module", "program"])
def test_blocks_of_a_plain_module(tmp_path, layout: str, monkeypatch) -> None:
    from spacompiler.torch_backend import backend as torch_backend

    chosen = [e for e in torch_backend.EMITTERS if e[1] == layout]
    monkeypatch.setattr(torch_backend, "EMITTERS", tuple(chosen))
    result = spacompiler.compile("zoo:resnet", target="params=50%", blocks="1",
                                 importance="magnitude", out=tmp_path / "out", **QUICK)
    assert len(result.job.dropped.paths) == 1 and result.job.emission == layout
    assert {c.name: c.passed for c in spacompiler.verify(tmp_path / "out")} == {
        "hashes": True, "reload": True, "plan identity": True}
    module, example = models_zoo.load("resnet").build()
    again = spacompiler.load(tmp_path / "out", model=module)
    assert torch.equal(again(*example), result.module(*example))


def test_auto_takes_blocks_where_they_are_cheaper() -> None:
    module = tiny()
    with torch.no_grad():
        for layer in module.model.layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
    ids = [((), inputs())]
    result = spacompiler.compile(module, inputs(), target="body=50%", blocks="auto",
                                 importance="magnitude", calibration=ids, repair="none", **QUICK)
    assert set(result.job.dropped.paths) == {"model.layers.1", "model.layers.2"}
    assert sum("divergence" in note for note in result.job.notes) == 3  # 0, 1 and 2
    wide = tiny(intermediate_size=600)
    with torch.no_grad():
        for layer in wide.model.layers:
            layer.mlp.down_proj.weight[:, 200:] = 0
    kept = spacompiler.compile(wide, inputs(), target="body=50%", blocks="auto",
                               importance="taylor", calibration=ids, repair="none",
                               only=("*.mlp.*",), **QUICK)
    assert kept.job.dropped is None and "widths are cheaper" in "".join(kept.job.notes)


def test_the_dense_network_teaches() -> None:
    """Distillation takes the network with all of its blocks."""
    seen = []

    class Look:
        name = "look"

        def run(self, task):
            seen.append(task.dense)
            return {"amount": 0, "unit": "", "parameters": 0, "best_step": 0, "history": [],
                    "held_out": 0}

    module = tiny()
    spacompiler.compile(module, inputs(), target="body=50%", blocks="1", importance="magnitude",
                        calibration=[((), inputs())] * 4, recovery=Look(), **QUICK)
    assert seen == [module]


def test_blocks_are_not_distilled_by_other_numbers() -> None:
    from spacompiler.passes.lora import Lora

    with pytest.raises(UsageError, match="one by one"):
        spacompiler.compile(tiny(), inputs(), target="body=50%", blocks="1",
                            recovery=Lora(blocks=1.0), importance="magnitude",
                            calibration=[((), inputs())] * 4, **QUICK)


@pytest.mark.parametrize("blocks, error, text", [
    ("0", UsageError, "cannot drop 0 blocks"),
    ("-2", UsageError, "cannot drop -2 blocks"),
    ("h.1,,h.2", UsageError, "cannot read blocks"),
    ("h.1,h.1", UsageError, "cannot read blocks"),
    ("4", UsageError, "cannot drop 4 blocks"),
    ("model.layers.9", UsageError, "is no block that may go"),
    ("3", TargetError, "drop fewer blocks"),
])
def test_what_cannot_be_dropped(blocks: str, error: type[SpaError], text: str) -> None:
    with pytest.raises(error, match=text):
        spacompiler.compile(tiny(), inputs(), target="body=50%", blocks=blocks,
                            importance="magnitude", **QUICK)


def test_where_no_block_may_go(tmp_path) -> None:
    with pytest.raises(SpaError, match="no block may go"):
        spacompiler.compile("zoo:bert", target="body=50%", blocks="1", **QUICK)
    with pytest.raises(UsageError, match="cannot be dropped with modules"):
        Recipe("body=50%", blocks="1", modules=("model",))
