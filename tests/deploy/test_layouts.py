"""Where files lie for a runtime, versions of operators, and tokens that other runtimes write."""

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, T5Config, T5Model

import spacompiler
from spacompiler.artifact.load import load
from spacompiler.deploy import runs
from spacompiler.deploy.cached import with_cache
from spacompiler.deploy.export import Form, export_onnx
from spacompiler.errors import ProofError, SpaError, UsageError
from spacompiler.request.recipe import Recipe
from spacompiler.runtime.decoder import Decoder
from spacompiler.runtime.session import open_session, run_session
from spacompiler.torch_backend.read.export import trace


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A language model compiled for transformers.js."""
    out = tmp_path_factory.mktemp("js") / "out"
    result = spacompiler.compile("zoo:llama-gqa", target="body=60%", importance="magnitude",
                                 runtime="transformers.js", align=1, latency=False, out=out)
    return result, out


def test_files_lie_where_transformers_js_looks(there):
    result, out = there
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {
        p.name for p in out.iterdir()} and not (out / "model.onnx").exists()
    said = json.loads((out / "config.json").read_text())
    assert said["transformers.js_config"] == {"dtype": "fp32"}
    assert said["num_key_value_heads"] == result.module.config.num_key_value_heads
    ids = torch.tensor([[5, 6, 7]])
    want = result.module.generate(input_ids=ids, max_new_tokens=6, do_sample=False,
                                  pad_token_id=0, eos_token_id=None)[:, 3:]
    assert np.array_equal(Decoder(out).generate(ids, 6), want.numpy())
    assert all(check.passed for check in spacompiler.verify(out) if check.passed is not None)
    assert torch.equal(load(out).state_dict()["lm_head.weight"],
                       result.module.state_dict()["lm_head.weight"])


def test_the_first_call_may_bring_a_cache_of_batch_0(there):
    """What transformers.js feeds before there is a cache."""
    session = open_session(there[1] / "onnx" / "model.onnx")
    ids = np.array([[5, 6, 7]], np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids),
            "position_ids": np.array([[0, 1, 2]], np.int64)}
    empty = {i.name: np.zeros((0, i.shape[1], 0, i.shape[3]), np.float32)
             for i in session.get_inputs() if i.name.startswith("past")}
    plain = {name: np.zeros((1, a.shape[1], 0, a.shape[3]), np.float32)
             for name, a in empty.items()}
    assert np.array_equal(run_session(session, {**feed, **empty})[0],
                          run_session(session, {**feed, **plain})[0])


class Reduced(nn.Module):
    """Reductions over axes, and a norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(self.linear(x))
        return x.amax(1), x.mean((0, 2)), x.square().mean(-1, keepdim=True)


@pytest.mark.parametrize("opset", [17, 24])
def test_the_version_of_operators_is_what_was_asked_for(opset, tmp_path):
    torch.manual_seed(0)
    module, x = Reduced().eval(), torch.randn(3, 5, 8)
    export_onnx(trace(module, {"x": x}).exported, tmp_path / "m.onnx", input_names=["x"],
                form=Form(opset))
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == opset
    got = run_session(open_session(tmp_path / "m.onnx"), {"x": x.numpy()})
    for one, other in zip(got, module(x), strict=True):
        assert np.allclose(one, other.detach().numpy(), atol=1e-5)


def test_what_version_17_cannot_say_is_named(tmp_path):
    class Scatter(nn.Module):
        def forward(self, x, i):
            return x.scatter_reduce(1, i, x, "amax")

    x, i = torch.randn(2, 4), torch.tensor([[0, 1, 1, 2], [3, 1, 0, 0]])
    with pytest.raises(SpaError, match="version 17") as problem:
        export_onnx(trace(Scatter(), {"x": x, "i": i}).exported, tmp_path / "m.onnx",
                    input_names=["x", "i"], form=Form(17))
    assert "ScatterElements" in problem.value.where and not (tmp_path / "m.onnx").exists()


def test_tokens_of_another_runtime_are_held_against_torchs(there, monkeypatch, tmp_path):
    result, out = there
    assert runs.run_in("", out, result.module) == {}
    assert runs.run_in("genai", out, nn.Linear(2, 2)) == {}
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    assert runs.run_in("llama.cpp", out, result.module) == {"missing": "cyllama"}
    monkeypatch.setattr(runs, "find_spec", lambda name: True)
    texts, want = runs._greedy(result.module)
    assert [t[-1] for t in texts[1:]] == want[:-1]
    monkeypatch.setattr(runs, "_ask", lambda *args: want)
    assert runs.run_in("genai", out, result.module) == {"same": 16, "tokens": 16}
    monkeypatch.setattr(runs, "_ask", lambda *args: [t + 1 for t in want])
    with pytest.raises(ProofError, match="other tokens"):
        runs.run_in("genai", out, result.module)
    assert runs.run_in("genai", out, result.module, exact=False)["same"] == 0


def test_a_runtime_that_fails_is_an_error_of_one_line(there, tmp_path):
    with pytest.raises(ProofError, match="does not run what was written"):
        runs._ask("genai", tmp_path, [[1]])
    code = f"import sys; sys.argv = []; from {runs.__package__} import runners; " \
           "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_language_models_have_their_cache_where_a_runtime_wants_one():
    recipe = Recipe("body=60%", runtime="optimum")
    assert with_cache(recipe, nn.Linear(2, 2)) == recipe
    t5 = T5Model(T5Config(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2))
    for name in ("optimum", "genai", "transformers.js"):
        with pytest.raises(UsageError, match="cannot hold an encoder-decoder"):
            with_cache(Recipe("body=60%", runtime=name), t5)
    assert not with_cache(Recipe("body=60%", runtime="vllm"), t5).decoder


def test_models_that_keep_a_state_of_their_own_are_refused_in_words():
    hybrid = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"]))
    for given, words in (({"decoder": True}, "leave --decoder out"),
                         ({"runtime": "optimum"}, "wants a cache.*compile without --for")):
        with pytest.raises(SpaError, match=f"(?s){words}"):
            with_cache(Recipe("body=60%", **given), hybrid)
