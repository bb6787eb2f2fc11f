"""Small valid modules and decoders are written as ONNX files that ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.deploy.decoder import export_decoder
from spacompiler.deploy.export import Form, export_onnx
from spacompiler.deploy.inputs import latency_inputs, other_inputs
from spacompiler.models_zoo import load
from spacompiler.runtime.session import open_session, run_session
from spacompiler.torch_backend.read.export import trace


class Positions(nn.Module):
    """Learned positions, traced at their full number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 8))
        self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids) + self.table[:ids.shape[1]])


class Projected(nn.Module):
    """An LSTM whose hidden state is smaller than its cell: ONNX has no such operator."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True, proj_size=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Chunks(nn.Module):
    """Pieces of the batch, as many as it takes: the tracer keeps their number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.norm(part) * 2 for part in x.chunk(3)])


def no_bias(kind: Any, rank: int) -> Any:
    return lambda: (nn.Sequential(kind(2, 5, 3, bias=False), nn.ReLU()),
                    torch.randn(2, 2, *(5,) * rank))


class Pooled(nn.Module):
    """A pooling to one place of a value that lies with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).contiguous(memory_format=torch.channels_last)
        return self.out(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Thinned(nn.Module):
    """Every other place, shifted by one: a padding, and a pooling with windows of one place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(nn.functional.pad(x, (1, 0, 1, 0))[..., :-1, :-1], 1, 2)


class Counted(nn.Module):
    """Frequencies times whole numbers, in an einsum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.einsum("i, j -> i j", torch.arange(4), self.table)
        return x[:, None] * places.sin()


class Attends(nn.Module):
    """Attention with a learned bias: how its result lies depends on whether gradients flow."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias = nn.Linear(12, 12), nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x).view(len(x), -1, 3, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.bias + q @ q.mT)
        return y.transpose(1, 2).reshape(len(x), x.shape[1], -1)


CASES: dict[str, Any] = {
    "attends": lambda: (Attends(), torch.randn(2, 5, 12)),
    "thinned": lambda: (nn.Sequential(nn.Conv2d(2, 3, 1), Thinned()), torch.randn(2, 2, 6, 6)),
    "counted": lambda: (Counted(), torch.randn(2, 3)),
    "rms norm": lambda: (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8)), torch.randn(3, 6)),
    "channels last": lambda: (Pooled(), torch.randn(2, 2, 4, 4)),
    "conv3d": no_bias(nn.Conv3d, 3), "conv2d": no_bias(nn.Conv2d, 2),
    "positions": lambda: (Positions(), torch.randint(0, 50, (2, 12))),
    "projected": lambda: (Projected(), torch.randn(3, 5, 6)),
    "chunks": lambda: (Chunks(), torch.randn(16, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_runs_at_other_sizes_than_the_traced_ones(name: str, tmp_path: Path) -> None:
    module, x = CASES[name]()
    module = module.eval()
    traced = trace(module, (x,))
    export_onnx(traced.exported, tmp_path / "m.onnx", input_names=traced.graph.inputs)
    session = open_session(tmp_path / "m.onnx")
    for which in (0, 1):
        (other,), _ = other_inputs(traced, which)
        got, = run_session(session, {traced.graph.inputs[0]: other.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, module(other).numpy(), atol=1e-5)


def test_no_input_is_longer_than_a_program_allows() -> None:
    module, x = CASES["positions"]()
    traced = trace(module.eval(), (x,))
    lengths = {other_inputs(traced, k)[0][0].shape[1] for k in (0, 1)}
    assert max(lengths) <= 12 and latency_inputs(traced)[0][0].shape == (1, 12)


def test_a_bias_that_there_is_not_is_not_written(tmp_path: Path) -> None:
    module, x = CASES["conv3d"]()
    export_onnx(trace(module.eval(), (x,)).exported, tmp_path / "m.onnx",
                form=Form(optimize=False))
    node, = (n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Conv")
    assert len([name for name in node.input if name]) == 2


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_decoder_starts_with_a_cache_of_batch_and_length_zero(name: str,
                                                                tmp_path: Path) -> None:
    """Batch and sequence are sizes of `input_ids`, whatever else has them."""
    model, _ = load(name).build()
    export_decoder(model, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    inputs = {value.name for value in graph.input}
    read = {(node.input[0], next(a.i for a in node.attribute if a.name == "start"))
            for node in graph.node if node.op_type == "Shape" and node.input[0] in inputs}
    assert {(source.partition(".")[0], d) for source, d in read} == {
        ("input_ids", 0), ("input_ids", 1), ("past_key_values", 2)}
    session = open_session(tmp_path / "m.onnx")
    ids = np.array([[1, 2, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 1}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros((0, value.shape[1], 0, value.shape[3]), np.float32)
    got = run_session(session, {n: a for n, a in feeds.items() if n in inputs})[0]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)


class Edges(nn.Module):
    """Sums over the edges of a graph, whose numbers point into its nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        return self.out(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


def test_a_network_of_a_graph_is_checked_at_sizes_that_it_takes(tmp_path: Path) -> None:
    call = (torch.randn(8, 4), torch.tensor([[0, 7, 3, 5, 6], [7, 1, 2, 0, 4]]))
    result = spacompiler.compile(Edges().eval(), call, target="params~60%",
                                 importance="magnitude", align=1, latency=False)
    result.save(tmp_path / "out")
    assert (tmp_path / "out/model.onnx").exists()
    assert any("the module itself does not take some" in note for note in result.job.notes)
