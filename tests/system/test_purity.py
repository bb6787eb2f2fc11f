"""What a compile leaves behind: the user's model, and every process-wide setting, as they were."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.utils import logging as shown

import spacompiler
from spacompiler.request.registry import available
from spacompiler.system.process import alone
from spacompiler.torch_backend.emit.apart import set_apart

BATCHES = [(torch.randn(6, 8, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
INPUTS = (torch.randn(4, 8, generator=torch.Generator().manual_seed(9)),)


class Net(nn.Module):
    """Two blocks with all that a user may hang on a module; `fixed` writes a size into its code."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.first = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 8))
        self.head = nn.Linear(8, 8)
        self.head.bias = self.second[2].bias
        self.scale = [torch.full((8,), 1.5)]
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)
        self.head.weight.requires_grad_(False)
        self.first[1].eval()
        self.register_forward_hook(seen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x.reshape(-1, 24) if self.fixed else x
        return self.head(self.second(x)) * self.scale[0] + self.shift


def seen(module: nn.Module, args: Any, result: Any) -> None:
    """A hook of the user's."""


def net(fixed: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(fixed).train()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).train()


def loss(results: list[torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
    return results[0].pow(2).mean()


QUICK = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False}
DATA = {"calibration": BATCHES, "loss": loss}
TEXT = {"calibration": [{"input_ids": torch.arange(18).reshape(2, 9) + i} for i in range(4)]}


def compiled(make: Callable[[], nn.Module], inputs: Any, **options: Any
             ) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    return make, lambda module: spacompiler.compile(
        module, inputs, **{"target": "params=70%", **QUICK, **options}).module


@cache
def adapter() -> str:
    """The directory of an adapter for `llama`."""
    folder = tempfile.mkdtemp(prefix="purity-")
    atexit.register(shutil.rmtree, folder, True)
    adapted().save_pretrained(folder)
    return folder


def adapted() -> nn.Module:
    """`llama` with an adapter that does something."""
    with torch.random.fork_rng():
        made = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    return made


def beside_adapter() -> nn.Module:
    """`llama`, once the adapter is written."""
    adapter()
    return llama()


IDS = {"input_ids": torch.arange(18).reshape(2, 9), "use_cache": False}
CASES = {
    "surgery": compiled(net, INPUTS, repair="none"),
    "program": compiled(lambda: net(True), INPUTS, layout="any", repair="none"),
    "gradients and refit": compiled(net, INPUTS, importance="taylor", repair="refit", **DATA),
    "refit with new biases": compiled(llama, IDS, repair="refit", layout="any",
                                      **TEXT),
    "any layout": compiled(llama, IDS, layout="any", repair="none"),
    "full recovery": compiled(net, INPUTS, repair="none", recovery="full(lr=1e-2)", **DATA),
    "norms, distilled": compiled(net, INPUTS, recovery="norms(logits=1)", **DATA),
    "lora recovery": compiled(net, INPUTS, recovery="lora(rank=2)", **DATA),
    "recovery of a program": compiled(lambda: net(True), INPUTS, recovery="full", **DATA),
    "recovery, uniform": compiled(llama, IDS, layout="uniform", recovery="norms", **TEXT),
    "schedule": compiled(llama, IDS, schedule="lora-prune(steps=2)", layout="any", **TEXT),
    "parts": compiled(net, INPUTS, modules=("first", "second"), target="params=90%"),
    "dropped blocks": compiled(llama, IDS, blocks="1", target="body=45%", layout="any",
                               repair="none", **TEXT),
    "a model with an adapter on it": compiled(adapted, IDS, repair="none"),
    "an adapter, merged": (beside_adapter, lambda module: spacompiler.compile(
        module, IDS, target="params=70%", adapter=adapter(), repair="none", **QUICK).module),
    "an adapter, kept": (beside_adapter, lambda module: spacompiler.compile(
        module, IDS, target="body=70%", adapter=adapter(), keep_adapter=True, repair="none",
        **QUICK).module),
}
PASSES = [(kind, entry.name) for kind, entry in available()
          if kind in ("importance", "compensation")]
OPTION = {"compensation": "repair"}


@pytest.mark.parametrize("name", CASES)
def test_a_compile_leaves_the_model_and_the_process_as_they_were(name: str) -> None:
    make, run = CASES[name]
    module = make()
    state, settings = _state(module), _settings()
    made = run(module)
    assert _differing(settings, _settings()) == []
    assert _differing(state, _state(module)) == []
    assert ("program" in name) == hasattr(made, "body")
    assert not _memory(made) & _memory(module)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.zero_()
    assert _differing(state, _state(module)) == []


@pytest.mark.parametrize("kind, name", PASSES)
def test_no_pass_changes_the_model_or_the_process(kind: str, name: str) -> None:
    module, given = net(), (INPUTS[0].clone(), [batch[0].clone() for batch in BATCHES])
    state, settings = _state(module), _settings()
    with suppress(spacompiler.SpaError):  # not for such a network: nothing may have changed either
        spacompiler.compile(module, INPUTS, **{
            "target": "params~70%", **QUICK, "prove": False, "repair": "none", **DATA,
            OPTION.get(kind, kind): name})
    assert _differing(settings, _settings()) == []
    assert _differing(state, _state(module)) == []
    assert torch.equal(INPUTS[0], given[0])
    assert all(torch.equal(batch[0], old) for batch, old in zip(BATCHES, given[1], strict=True))


def _state(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a compile could change, with copies of the values."""
    found: dict[str, Any] = {"scale": getattr(module, "scale", [torch.zeros(1)])[0].clone()}
    for path, part in module.named_modules():
        found[f"{path} mode"] = part.training
        found[f"{path} names"] = sorted(vars(part))
        found[f"{path} hooks"] = [list(value.items()) for key, value in sorted(vars(part).items())
                                  if "hooks" in key and isinstance(value, dict)]
    for name, p in module.named_parameters(remove_duplicate=False):
        found[name] = (id(p), p.requires_grad, p.grad, p.detach().clone())
    for name, b in module.named_buffers(remove_duplicate=False):
        found[name] = (id(b), b.requires_grad, b.clone())
    return found


def _settings() -> dict[str, Any]:
    loggers = [logging.getLogger(n) for n in
               ("", "torch.onnx", "torch.export", "transformers", "onnx_ir", "onnxscript")]
    return {"filters": list(warnings.filters), "levels": [each.level for each in loggers],
            "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path),
            "streams": (sys.stdout, sys.stderr), "random": torch.get_rng_state().clone(),
            "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(), "mkldnn": torch._C._get_mkldnn_enabled(),
            "collector": gc.get_threshold(), "bars": shown.is_progress_bar_enabled()}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and torch.equal(a, b)
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    return sorted(k for k in one.keys() | other.keys()
                  if k not in one or k not in other or not same(one[k], other[k]))


def _memory(root: nn.Module) -> set[int]:
    """Where the memory of every tensor lies that can be reached from a module."""
    passed = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
              types.CodeType, types.FrameType, str)
    seen_ids: set[int] = set()
    found: set[int] = set()
    left: list[Any] = [root]
    while left:
        at = left.pop()
        if id(at) in seen_ids or isinstance(at, passed):
            continue
        seen_ids.add(id(at))
        if type(at) in (torch.Tensor, nn.Parameter) and at.numel():
            found.add(at.untyped_storage().data_ptr())
        left.extend(gc.get_referents(at))
    return found


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_pruning_a_live_model_changes_sizes_alone(importance: str) -> None:
    module = net()
    state, settings = _state(module), _settings()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.0)
    pruner = spacompiler.Pruner(module, INPUTS, optimizer, target="params=70%",
                                importance=importance)
    module(INPUTS[0]).pow(2).mean().backward()
    optimizer.step()
    pruner.shrink()
    pruner.finish()
    optimizer.zero_grad()
    assert _differing(settings, _settings()) == []
    after = _state(module)
    for key, (number, trains, _, values) in ((k, v) for k, v in state.items()
                                             if isinstance(v, tuple) and len(v) == 4):
        assert after[key][:2] == (number, trains), key
        assert set(after[key][3].flatten().tolist()) <= set(values.flatten().tolist()), key
    for key in state:
        if key.endswith((" mode", " hooks", " names")):
            assert state[key] == after[key], key
    assert not optimizer._optimizer_step_pre_hooks


def test_settings_come_back_after_an_error_too() -> None:
    settings = _settings()
    with pytest.raises(spacompiler.SpaError):
        spacompiler.compile(net(), INPUTS, target="params=1%", **QUICK)
    assert _differing(settings, _settings()) == []


def test_whatever_runs_alone_puts_back_what_it_changed(tmp_path: Any) -> None:
    settings = _settings()
    with alone():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.export").setLevel(7)
        os.environ["PURITY"] = "1"
        os.chdir(tmp_path)
        sys.stderr = sys.stdout
        sys.path.insert(0, "nowhere")
        torch.manual_seed(5)
        torch._C._set_mkldnn_enabled(not torch._C._get_mkldnn_enabled())
        torch.set_default_dtype(torch.float64)
    assert _differing(settings, _settings()) == []


def test_two_compiles_at_once_are_both_right() -> None:
    make, run = CASES["gradients and refit"]
    want = _values(run(make()))
    nets = [make(), make()]    # before the threads: both would draw from one generator
    found: list[Any] = [None, None]
    settings = _settings()

    def work(i: int) -> None:
        try:
            found[i] = _differing(want, _values(run(nets[i])))
        except BaseException as problem:
            found[i] = problem

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[], []]
    assert _differing(settings, _settings()) == []


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def test_views_of_one_memory_stay_views_of_one_copy() -> None:
    held = torch.arange(24.0)
    given, made = nn.Module(), nn.Module()
    given.register_buffer("all", held)
    made.register_buffer("left", held[:8].view(2, 4))
    made.register_buffer("turned", held[:8].view(2, 4).T)
    made.register_buffer("right", held[16:20])
    made.register_buffer("own", torch.ones(3))
    own = made.own.data_ptr()
    set_apart(made, [held])
    held.zero_()
    made.left[0, 1] = 100
    assert made.turned[1, 0] == 100 and made.left[1, 3] == 7 and made.right.tolist() == [
        16, 17, 18, 19]
    assert made.right.untyped_storage().nbytes() == 16 and made.own.data_ptr() == own
