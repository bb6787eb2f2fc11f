"""Adapters: every type of peft that merges is merged right, the others are refused by name."""

import copy
import json
import shutil

import pytest
import torch
from made_adapters import FAST, VARIANTS, llama, peft, run, stored, tuned
from torch import nn

import spacompiler
from spacompiler.adapters import files, foreign, merging
from spacompiler.adapters.kinds import KINDS
from spacompiler.errors import ProofError, SpaError, UsageError
from spacompiler.models_zoo import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_table_names_every_type_of_peft():
    assert {t.value for t in peft.PeftType} <= set(KINDS)
    merged = {name for name, kind in KINDS.items() if not kind.refused}
    assert merged == {kind for kind, _ in VARIANTS.values()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_equals_merged(variant, tmp_path):
    """Saved, read onto a fresh base under other random state, merged: equal to 1e-6."""
    if variant == "adamss":
        pytest.importorskip("sklearn")
    path, want = stored(tmp_path / "a", variant)
    module, inputs = llama()
    base = run(module, inputs)
    torch.manual_seed(99)
    merged, notes = merging.merge(module, [foreign.read(path)], inputs)
    assert (run(merged, inputs) - want).abs().max() <= 1e-6
    assert (base - want).abs().max() > 1e-4, "the adapter does nothing: nothing was tested"
    assert "adapter = merged" in notes[-1]
    assert all(p.requires_grad for p in merged.parameters())
    assert not any(hasattr(part, "base_layer") for part in merged.modules())


# --- refused ----------------------------------------------------------------------------------


def edited(path, **changes):
    config = json.loads((path / files.CONFIG).read_text())
    (path / files.CONFIG).write_text(json.dumps({**config, **changes}))
    return path


def damaged(path):
    weights = path / files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])


def pickled(path):
    (path / files.WEIGHTS).rename(path / files.PICKLE)


def not_finite(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / files.WEIGHTS)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, path / files.WEIGHTS)


def without(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / files.WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), path / files.WEIGHTS)


def surplus(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / files.WEIGHTS)
    key = next(iter(tensors))
    save_file({**tensors, key.replace("layers.0", "layers.7"): tensors[key].clone()},
              path / files.WEIGHTS)


BROKEN = {
    "no directory": (lambda p: shutil.rmtree(p), "no adapter at"),
    "no config": (lambda p: (p / files.CONFIG).unlink(), "does not say its alpha"),
    "damaged config": (lambda p: (p / files.CONFIG).write_text("{"), "config.json cannot be read"),
    "no weights": (lambda p: (p / files.WEIGHTS).unlink(), "is missing"),
    "pickled": (pickled, "cannot be read"),
    "damaged": (damaged, "cannot be read"),
    "not finite": (not_finite, "NaN or infinity"),
    "array missing": (without, "1 are missing"),
    "array left over": (surplus, "1 of its arrays belong to no module"),
    "unknown type": (lambda p: edited(p, peft_type="LATER"), "'LATER' are not known"),
    "prompt": (lambda p: edited(p, peft_type="PREFIX_TUNING"), "not its weights"),
    "routed": (lambda p: edited(p, peft_type="XLORA"), "depends on the input"),
    "lily": (lambda p: edited(p, peft_type="LILY"), "depends on the input"),
    "activated": (lambda p: edited(p, alora_invocation_tokens=[1]), "depends on the input"),
    "pissa_niter": (lambda p: edited(p, init_lora_weights="pissa_niter_4"), "the merge would be"),
    "lora_ga": (lambda p: edited(p, init_lora_weights="lora_ga"), "the merge would be wrong"),
    "loftq": (lambda p: edited(p, init_lora_weights="loftq"), "needs data"),
    "replicated": (lambda p: edited(p, layer_replication=[[0, 2]]), "another network"),
    "other names": (lambda p: edited(p, target_modules=["query"]), "trained on"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_refused_with_the_reason(how, tmp_path):
    breaks, words = BROKEN[how]
    path, _ = stored(tmp_path / "a")
    module, inputs = llama()
    breaks(path)
    with pytest.raises(SpaError) as error:
        adapter, _ = foreign.resolved(foreign.read(path), module)
        merging.merge(module, [adapter], inputs)
    assert words in str(error.value) and error.value.fix


@pytest.mark.parametrize("variant", ["miss", "miss-bat"])
def test_directories_of_a_type_that_was_renamed(variant, tmp_path):
    """Bone, as peft wrote it until 0.17, is MiSS today."""
    from safetensors.torch import load_file, save_file

    path, want = stored(tmp_path / "a", variant)
    tensors = {k.replace("miss_block", "bone_block"): v
               for k, v in load_file(path / files.WEIGHTS).items()}
    save_file(tensors, path / files.WEIGHTS)
    config = json.loads((path / files.CONFIG).read_text())
    kept = {k: config[k] for k in ("r", "target_modules", "init_weights", "bias")}
    (path / files.CONFIG).write_text(json.dumps({"peft_type": "BONE", **kept}))
    module, inputs = llama()
    merged, _ = merging.merge(module, [foreign.read(path)], inputs)
    assert (run(merged, inputs) - want).abs().max() <= 1e-6


def test_an_adapter_of_a_wider_base_is_refused(tmp_path):
    path, _ = stored(tmp_path / "a", base=load("qwen3").build())
    module, inputs = llama()
    with pytest.raises(SpaError, match="does not fit this model"):
        merging.merge(module, [foreign.read(path)], inputs)


class Conv(nn.Module):
    def __init__(self, kernel=3):
        super().__init__()
        self.first = nn.Conv2d(4, 8, kernel, padding=kernel // 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3)))


def conv(kernel=3):
    torch.manual_seed(0)
    return Conv(kernel), (torch.randn(2, 4, 6, 6),)


def test_oft_on_patches_is_refused_and_on_points_merged(tmp_path):
    """peft merges OFT on a 3 x 3 convolution to something else; on 1 x 1 it is right."""
    oft = ("OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["first"]})
    path, want = stored(tmp_path / "one", oft, conv(1))
    merged, _ = merging.merge(*(conv(1)[0], [foreign.read(path)], conv(1)[1]))
    assert (run(merged, conv(1)[1]) - want).abs().max() <= 1e-6
    path, _ = stored(tmp_path / "three", oft, conv(3))
    with pytest.raises(SpaError, match="OFT adapter cannot be merged") as error:
        merging.merge(conv(3)[0], [foreign.read(path)], conv(3)[1])
    assert error.value.where.endswith("first")


def test_the_probe_catches_a_wrong_merge(tmp_path, monkeypatch):
    """Without the row that refuses it, the wrong merge is still found by the probe."""
    monkeypatch.setattr(merging, "LAYER_TRAPS", ())
    oft = ("OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["first"]})
    path, _ = stored(tmp_path / "a", oft, conv(3))
    with pytest.raises(ProofError, match="not the adapted one"):
        merging.merge(conv(3)[0], [foreign.read(path)], conv(3)[1])


@pytest.mark.parametrize("kind, options", [
    ("LORA", {"r": 2}), ("LORA", {"r": 2, "use_dora": True}), ("LOHA", {"r": 2}),
    ("LOKR", {"r": 2}), ("IA3", {"feedforward_modules": []}),
    ("BOFT", {"boft_block_size": 4}), ("HRA", {"r": 2}), ("HIRA", {"r": 2})])
def test_convolutions_merge(kind, options, tmp_path):
    base = conv()
    path, want = stored(tmp_path / "a", (kind, {**options, "target_modules": ["first"]}), base)
    merged, _ = merging.merge(base[0], [foreign.read(path)], base[1])
    assert (run(merged, base[1]) - want).abs().max() <= 1e-6


# --- several ----------------------------------------------------------------------------------


def test_cat_is_the_weighted_sum(tmp_path):
    module, inputs = llama()
    one, _ = stored(tmp_path / "one", seed=1)
    two, _ = stored(tmp_path / "two", ("LORA", {"r": 6, "lora_alpha": 3}), seed=2)
    w0 = {k: v.clone() for k, v in module.state_dict().items()}

    def change(path):
        merged, _ = merging.merge(llama()[0], [foreign.read(path)], inputs)
        return {k: v - w0[k] for k, v in merged.state_dict().items()}

    merged, _ = merging.merge(module, [foreign.read(one, 0.7), foreign.read(two, -0.4)], inputs)
    a, b = change(one), change(two)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, w0[key] + 0.7 * a[key] - 0.4 * b[key],
                                   rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear", "dare_ties"])
def test_other_combinations_are_those_of_peft(how, tmp_path, monkeypatch):
    module, inputs = llama()
    paths = [stored(tmp_path / str(i), seed=i)[0] for i in (1, 2)]
    torch.manual_seed(5)
    merged, _ = merging.merge(module, [foreign.read(p, 0.5) for p in paths], inputs, combine=how)
    want = peft.PeftModel.from_pretrained(llama()[0], paths[0], adapter_name="a")
    want.load_adapter(paths[1], "b")
    inject = want.base_model.inject_adapter

    def seeded(*args, **kwargs):  # DARE drops at random, after a new adapter was made at random
        inject(*args, **kwargs)
        torch.manual_seed(5)

    monkeypatch.setattr(want.base_model, "inject_adapter", seeded)
    want.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", how,
                              density=None if how in ("linear", "svd") else 0.5)
    want.set_adapter("c")
    assert (run(merged, inputs) - run(want, inputs)).abs().max() <= 1e-6


@pytest.mark.parametrize("variant", ["dora", "pissa", "lora-bias", "hira"])
def test_what_does_not_add_is_refused(variant, tmp_path):
    path, _ = stored(tmp_path / "a", variant)
    module, inputs = llama()
    with pytest.raises(SpaError, match="cannot be combined or weighted"):
        merging.merge(module, [foreign.read(path, 0.5)], inputs)


def test_a_tied_head_is_untied_when_only_one_side_is_adapted(tmp_path):
    module, inputs = llama()
    module.config.tie_word_embeddings = True
    module.lm_head.weight = module.model.embed_tokens.weight
    path, _ = stored(tmp_path / "a", "lora-head", base=(copy.deepcopy(module), inputs))
    before = module.model.embed_tokens.weight.clone()
    merged, notes = merging.merge(module, [foreign.read(path)], inputs)
    assert torch.equal(merged.model.embed_tokens.weight, before)
    assert not torch.equal(merged.lm_head.weight, before)
    assert not merged.config.tie_word_embeddings and any("untied" in n for n in notes)


def test_low_precision_is_merged_in_float32(tmp_path):
    module, inputs = llama()
    path, _ = stored(tmp_path / "a", base=(copy.deepcopy(module), inputs))
    merged, notes = merging.merge(module.bfloat16(), [foreign.read(path)], inputs)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert "bfloat16" in notes[0]


# --- compiling --------------------------------------------------------------------------------


def test_compile_merges_first(tmp_path):
    """A PeftModel, an adapter's directory, and the merged model give the same pruned model."""
    module, inputs = llama()
    path, _ = stored(tmp_path / "a")
    model = tuned(copy.deepcopy(module), "LORA", {"r": 4})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    options = {"target": "body=60%", "importance": "magnitude", "align": 1}
    merged, _ = merging.merge(copy.deepcopy(module), [foreign.read(path)], inputs)
    want = spacompiler.compile(merged, inputs, **options)
    for made in (spacompiler.compile(module, inputs, adapter=path, **options),
                 spacompiler.compile(model, inputs, **options)):
        assert made.plan.kept == want.plan.kept and any("merged" in n for n in made.job.notes)
        for key, value in made.module.state_dict().items():
            torch.testing.assert_close(value, want.module.state_dict()[key], rtol=0, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert hasattr(model, "peft_config") and run(model, inputs) is not None


@pytest.mark.parametrize("variant", ["lora-bias", "beft"])
def test_a_peft_model_that_needs_biases(variant):
    module, inputs = llama()
    model = tuned(module, *VARIANTS[variant])
    want = run(model, inputs)
    merged, _ = merging.merge_adapted(model, inputs)
    assert (run(merged, inputs) - want).abs().max() <= 1e-6
    assert torch.equal(run(model, inputs), want), "the user's model was changed"


def test_adapters_that_are_not_active_are_named():
    module, inputs = llama()
    model = tuned(module, "LORA", {"r": 2})
    model.add_adapter("spare", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    _, notes = merging.merge_adapted(model, inputs)
    assert any("spare" in note and "left out" in note for note in notes)


def test_the_name_of_another_base_is_noted(tmp_path):
    path, _ = stored(tmp_path / "a")
    adapter = foreign.read(edited(path, base_model_name_or_path="org/Other-1B"))
    assert "org/Other-1B" in files.other_names([adapter], "/models/tiny")[0]
    assert not files.other_names([adapter], "/models/other-1b")


@pytest.mark.parametrize("text, fix", [("a=b", "DIR=0.5"), ("a=", "DIR=0.5")])
def test_a_weight_that_is_no_number(text, fix):
    with pytest.raises(UsageError) as error:
        files.parse(text)
    assert fix in error.value.fix


# --- experts, tied layers, odd files ----------------------------------------------------------

EXPERTS = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}


def test_adapters_of_experts_merge_and_are_not_sliced(tmp_path):
    base = load("moe").build()
    path, want = stored(tmp_path / "a", ("LORA", EXPERTS), base)
    merged, _ = merging.merge(copy.deepcopy(base[0]), [foreign.read(path)], base[1])
    assert (run(merged, base[1]) - want).abs().max() <= 1e-5
    with pytest.raises(SpaError, match="whole parameters cannot be sliced") as error:
        spacompiler.compile(*base, adapter=path, keep_adapter=True, **FAST)
    assert "--keep-adapter" in error.value.fix


def tied():
    module, inputs = llama()
    module.config.tie_word_embeddings = True
    module.lm_head.weight = module.model.embed_tokens.weight
    return module, inputs


TIED = {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "ensure_weight_tying": True}


def of_tied(path):
    """A PeftModel whose factors of the embedding are those of the output layer, saved too."""
    module, inputs = tied()
    model = tuned(copy.deepcopy(module), "LORA", TIED)
    part = model.base_model.model
    a, b = part.model.embed_tokens.lora_embedding_A, part.model.embed_tokens.lora_embedding_B
    part.lm_head.lora_A["default"].weight.data = b["default"].data.T
    part.lm_head.lora_B["default"].weight.data = a["default"].data.T
    model.save_pretrained(path)
    return model, run(model, inputs)


@pytest.mark.parametrize("given", ["directory", "without the second", "live"])
def test_tied_layers_with_tied_factors_stay_tied(given, tmp_path):
    """The embedding's factors are the output layer's: both change alike, once."""
    from safetensors.torch import load_file, save_file

    model, want = of_tied(tmp_path / "a")
    module, inputs = tied()
    if given == "without the second":
        file = tmp_path / "a" / files.WEIGHTS
        save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
    merged, _ = merging.merge_adapted(model, inputs) if given == "live" else \
        merging.merge(module, [foreign.read(tmp_path / "a")], inputs)
    assert (run(merged, inputs) - want).abs().max() <= 1e-5
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("key, value, refused", [
    ("use_nlora", True, True), ("lora_gate", 1, True), ("kernel", {"p": 2}, True),
    ("later_option", None, False), ("another", [], False)])
def test_unknown_keys_of_a_configuration(key, value, refused, tmp_path):
    path, _ = stored(tmp_path / "a")
    adapter = foreign.read(edited(path, **{key: value}))
    if not refused:
        return merging.attach(llama()[0], [adapter])
    with pytest.raises(SpaError, match=f"not understood: {key}"):
        merging.attach(llama()[0], [adapter])


def misshaped(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / files.WEIGHTS)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, path / files.WEIGHTS)


WHOLE = {"0 missing": (lambda path: None, ""), "1 missing": (without, "1 are missing"),
         "1 extra": (surplus, "1 of its arrays belong to no module"),
         "1 mis-shaped": (misshaped, "size mismatch"), "1 NaN": (not_finite, "NaN or infinity")}


@pytest.mark.parametrize("case", WHOLE)
def test_compile_verify_and_load_with_an_adapter(case, tmp_path):
    """A whole adapter gives a model that verifies and loads; any other an error, and no files."""
    breaks, words = WHOLE[case]
    module, inputs = llama()
    module.save_pretrained(tmp_path / "dense")
    path, _ = stored(tmp_path / "a")
    breaks(path)

    def compiled():
        return spacompiler.compile(str(tmp_path / "dense"), inputs, adapter=path, onnx=False,
                                   out=tmp_path / "out", **FAST)

    if not words:
        result = compiled()
        assert all(c.passed is not False for c in spacompiler.verify(tmp_path / "out"))
        plan = spacompiler.verify(tmp_path / "out", str(tmp_path / "dense"))[-1]
        assert plan.passed is None and "give the merged model" in plan.detail
        assert torch.equal(run(spacompiler.load(tmp_path / "out"), inputs),
                           run(result.module, inputs))
        return
    with pytest.raises(SpaError) as error:
        compiled()
    assert words in str(error.value) and error.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [("LORA", {"r": 2, "use_dora": True}), ("LOHA", {"r": 2})])
def test_only_linear_layers_are_sliced_by_these_types(kind, tmp_path):
    """On a 3 x 3 convolution their arrays are laid out in another way: merge."""
    base = conv()
    path, _ = stored(tmp_path / "a", (kind[0], {**kind[1], "target_modules": ["first"]}), base)
    with pytest.raises(SpaError, match="cannot be sliced"):
        spacompiler.compile(*base, adapter=path, keep_adapter=True,
                            **{**FAST, "target": "params=63%"})


def test_arrays_of_a_type_that_no_weight_has_are_refused(tmp_path):
    """torch holds them, and computes nothing with them."""
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2, dtype=torch.uint32)},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpaError, match=r"lora_A\.weight is stored as uint32"):
        files.stored(tmp_path)


@pytest.mark.parametrize("names", [True, 3, "experts.up", ["experts.up", 2]])
def test_whole_parameters_are_refused_however_they_are_written(names):
    from types import SimpleNamespace

    from spacompiler.adapters.cutting import _check_whole_parameters
    odd = SimpleNamespace(config={"target_parameters": names}, path="there")
    with pytest.raises(SpaError, match="whole parameters cannot be lifted"):
        _check_whole_parameters(odd, "lifted", "train another")
