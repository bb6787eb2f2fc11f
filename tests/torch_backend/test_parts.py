"""Networks that cannot be traced whole: parts by name and by search, and what is left alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import ProofError, SpaError, TraceError, UsageError
from spacompiler.torch_backend.parts import Parts, traceable
from spacompiler.torch_backend.read.export import trace

FAST = {"importance": "magnitude", "align": 1, "onnx": False, "latency": False}
INPUTS = (torch.randn(4, 12, generator=torch.Generator().manual_seed(3)),)


class Mlp(nn.Module):
    def __init__(self, width=12, hidden=32, out=12):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Sized(nn.Module):
    """A part that views by a size which only its input's width tells: no attribute can."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        width = 2 * x.shape[-1]
        return self.down(self.up(x).view(-1, width // 4, 4).relu().reshape(-1, width))


class Picky(nn.Module):
    """Two blocks around a decision that depends on data."""

    def __init__(self, block=Mlp):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.blocks[0](x)
        while x.abs().max() > 1:
            x = x / 2
        return self.head(self.blocks[1](x))


class Looking(Picky):
    """Asks a block for the type of its weights."""

    def forward(self, x):
        return super().forward(x.to(self.blocks[0].up.weight.dtype))


class Peeking(Picky):
    """Reads an array inside a block from outside of it."""

    def forward(self, x):
        return super().forward(x) + self.blocks[0].up.weight.sum()


class Tied(Picky):
    """Its head is the last layer of a block; so is its other use."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(12, 32)
        self.extra.weight = self.blocks[0].up.weight

    def forward(self, x):
        return super().forward(x) + self.extra(x).mean()


def compiled(module, **options):
    with torch.random.fork_rng():
        return spacompiler.compile(module, INPUTS, **{"target": "params=60%", **FAST, **options})


def widths(result):
    return {g.name: result.job.choices[g.atom].count for g in result.solution.groups.values()
            if g.atom in result.job.choices}


def test_a_part_is_pruned_and_put_back(tmp_path):
    dense = Picky()
    result = compiled(dense, modules=("blocks.1",), floor=0.01)
    assert type(result.module) is Picky
    assert list(widths(result)) == ["blocks.1.up.weight:0"]
    one, other = result.module.blocks[0].up.weight, dense.blocks[0].up.weight
    assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    kept = result.module.blocks[1].up.out_features
    assert kept < 32 and result.module.blocks[1].down.in_features == kept
    total = sum(p.numel() for p in dense.parameters())
    assert result.plan.costs["params"]["dense"] == total
    assert result.plan.costs["params"]["pruned"] == \
        sum(p.numel() for p in result.module.parameters())
    masked = Picky()
    masked.load_state_dict(dense.state_dict())
    index = torch.tensor(result.plan.kept["blocks.1.up.weight:0"])
    gone = torch.ones(32, dtype=bool).index_fill(0, index, False)
    masked.blocks[1].down.weight.data[:, gone] = 0
    with torch.no_grad():
        assert torch.allclose(result.module(*INPUTS), masked(*INPUTS), atol=1e-6)
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=Picky())
    with torch.no_grad():
        assert torch.equal(again(*INPUTS), result.module(*INPUTS))


def test_parts_are_found_where_the_whole_cannot_be_traced():
    with pytest.raises(TraceError) as problem:
        trace(Picky(), INPUTS)
    assert "Picky (torch_backend/test_parts.py:" in problem.value.where
    assert "--module" in problem.value.fix
    assert traceable(Picky(), INPUTS) == ("blocks.0", "blocks.1")
    result = compiled(Picky())
    assert list(widths(result)) == ["blocks.0.up.weight:0", "blocks.1.up.weight:0"]
    assert "compiled in parts: blocks.0, blocks.1" in result.job.notes


def test_a_target_of_parts_counts_the_whole_network():
    """Whatever its metric; the output layer, which no part holds, is no part of the body."""
    dense = Picky()
    result = compiled(dense, modules=("blocks.1",), floor=0.01, target="body=80%")
    costs = result.plan.costs
    layers = [m for m in dense.modules() if isinstance(m, nn.Linear)]
    assert costs["body"]["dense"] == sum(p.numel() for p in dense.blocks.parameters())
    assert costs["macs"]["dense"] == len(INPUTS[0]) * sum(m.weight.numel() for m in layers)
    gone = sum(p.numel() for p in dense.parameters()) - \
        sum(p.numel() for p in result.module.parameters())
    assert costs["body"]["dense"] - costs["body"]["pruned"] == gone
    assert abs(costs["body"]["pruned"] / costs["body"]["dense"] - 0.8) < 0.01
    kept = sum(p.numel() for part in (dense.blocks[0], dense.head) for p in part.parameters())
    share = kept / sum(p.numel() for p in dense.parameters())
    assert f"not entered, so that {share:.1%} of the parameters stay as they are: blocks.0, head" \
        in result.job.notes


@pytest.mark.parametrize("importance", ["magnitude", "wanda"])
def test_parts_are_repaired(importance):
    """From what they read as the calibration passes through the whole."""
    torch.manual_seed(0)
    dense, data = Picky(), [(torch.randn_like(INPUTS[0]),) for _ in range(8)]
    plain, mended = (compiled(dense, importance=importance, repair=repair, calibration=data)
                     for repair in ("none", "refit"))
    assert mended.plan.kept == plain.plan.kept and mended.job.proof.holds
    with torch.no_grad():
        errors = [sum((result.module(*x) - dense(*x)).square().sum() for x in data)
                  for result in (plain, mended)]
    assert errors[1] < 0.9 * errors[0]


def test_inspecting_parts():
    solved = spacompiler.inspect(Picky(), INPUTS, modules=("blocks.1",))
    assert list(solved.groups) == ["blocks.1.up.weight:0"]


def test_a_part_whose_code_holds_sizes_is_put_back_as_a_program():
    dense = Picky(Sized)
    result = compiled(dense, floor=0.01)
    assert result.job.emission == "program"
    assert sum(p.numel() for p in result.module.parameters()) < \
        0.7 * sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        assert result.module(*INPUTS).shape == dense(*INPUTS).shape
    with pytest.raises(SpaError, match="cannot be saved"):
        result.save("never")


def test_a_part_as_a_program_can_still_be_looked_at():
    result = compiled(Looking(Sized), floor=0.01)
    assert result.job.emission == "program"
    part = result.module.blocks[0]
    arrays = {id(p) for p in part.parameters()}
    assert id(part.up.weight) in arrays and len(part.up.weight) < 24
    with pytest.raises(AttributeError, match="nothing"):
        part.nothing  # noqa: B018


def test_what_code_outside_uses_too_stays():
    solved = compiled(Tied()).solution
    frozen = {(w, d): why for w, d, why in solved.frozen()}
    assert "outside" in frozen["blocks.0.up.weight", 0][0]
    assert "outside" in frozen["head.weight", 0][0]
    assert "blocks.1.up.weight:0" in solved.groups


def test_a_whole_that_looks_into_a_part_is_refused():
    with pytest.raises(ProofError, match="more of a part than its results"):
        compiled(Peeking(), modules=("blocks.0", "blocks.1"))


@pytest.mark.parametrize("paths, error, what", [
    (("blocks.7",), UsageError, "no sub-module 'blocks.7'"),
    (("blocks.0", "blocks.0.up"), UsageError, "given twice"),
    (("blocks",), SpaError, "'blocks' is not called"),
])
def test_wrong_parts_are_named(paths, error, what):
    with pytest.raises(error, match=what):
        compiled(Picky(), modules=paths)


def test_the_users_module_is_left_as_it_was():
    class Caching(Mlp):
        def forward(self, x):
            self.seen = x * 2
            self.many.append(x)
            return super().forward(x)

    module = Caching().train()
    module.many = [1]
    module.up.eval()
    module.up.weight.requires_grad_(False)
    result = compiled(module)
    assert module.training and not module.up.training
    assert module.many == [1] and not hasattr(module, "seen")
    assert result.module.training and not result.module.up.training
    assert [p.requires_grad for p in result.module.parameters()] == [False, True, True, True]


def test_sizes_that_depend_on_data_are_taken_as_seen():
    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x):
            return self.mlp(x[x[:, 0] > 0])

    result = compiled(Picking())
    assert not isinstance(result.job.module, Parts) and result.job.emission == "module"
    with torch.no_grad():
        assert result.module(-INPUTS[0]).shape == (int((-INPUTS[0][:, 0] > 0).sum()), 12)


def test_an_array_that_the_example_does_not_reach_stays():
    class Optional(Mlp):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(12, 32)

        def forward(self, x, extra=False):
            return self.down((self.up(x) + self.other(x)).relu()) if extra else super().forward(x)

    solved = compiled(Optional()).solution
    frozen = {(w, d): why for w, d, why in solved.frozen()}
    assert frozen["other.weight", 0] == ["not used on the example inputs"]


class Batched(nn.Module):
    """Computes with one example at a time, batched by torch itself."""

    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(32, 12)), nn.Linear(32, 5)

    def forward(self, x):
        return self.out(torch.vmap(lambda row: torch.relu(self.w @ row))(x))


def test_what_torch_batches_by_itself_is_traced():
    torch.manual_seed(0)
    dense = Batched()
    result = spacompiler.compile(dense, INPUTS, target="body=50%", **FAST)
    assert result.job.emission == "module" and result.module.w.shape[0] < 32
    assert all(p.requires_grad for p in dense.parameters())


def test_torchscript_is_left_alone_or_named():
    script = torch.jit.script(Mlp())
    network = Picky()
    network.blocks[0] = script
    assert traceable(network, INPUTS) == ("blocks.1",)
    result = spacompiler.compile(network, INPUTS, target="body=80%", **FAST)
    assert result.module.blocks[1].up.out_features < 32
    for module, options, kind in ((script, {}, TraceError),
                                  (network, {"modules": ("blocks.0",)}, UsageError)):
        with pytest.raises(kind, match="TorchScript"):
            spacompiler.compile(module, INPUTS, target="body=80%", **FAST, **options)


class Asking(Picky):
    """Gives a block what its signature takes."""

    def forward(self, x):
        given = {"x": x, "scale": 2}
        for block in self.blocks:
            names = inspect.signature(block.forward).parameters
            x = given["x"] = block(**{k: v for k, v in given.items() if k in names})
        while x.abs().max() > 1:
            x = x / 2
        return self.head(x)


def test_a_part_as_a_program_has_the_signature_of_the_part():
    torch.manual_seed(0)
    result = spacompiler.compile(Asking(Sized), INPUTS, target="body=67%", **FAST)
    assert result.job.emission == "program"
    assert list(inspect.signature(result.module.blocks[0].forward).parameters) == ["x"]


class Packs(nn.Module):
    """Packs its sequences for its LSTM, as code for sequences of several lengths does."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True,
                                                   enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0],
                                                          batch_first=True)[0])


def test_a_layer_that_reads_packed_sequences_is_named_with_what_helps():
    result = spacompiler.compile(
        Packs().eval(), (torch.randn(3, 5, 6), torch.tensor([5, 3, 2])), target="body~80%",
        importance="magnitude", align=1, latency=False, onnx=False)
    assert "compiled in parts: head" in result.job.notes
    assert any(n.startswith("lstm read packed sequences") and "drop pack_padded_sequence" in n
               for n in result.job.notes)
