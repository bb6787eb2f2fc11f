"""Adapters kept beside the pruned base: cut to its sizes, and lifted to those of the dense one."""

import copy
import json

import pytest
import torch
from made_adapters import FAST, llama, peft, run, stored

import spacompiler
from spacompiler.adapters import cutting, foreign, lifting, merging
from spacompiler.errors import ProofError, SpaError, UsageError
from spacompiler.torch_backend.emit.program import run_pruned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# --- kept beside the pruned base ---------------------------------------------------------------

KEPT = ["lora", "lora-rs", "lora-bias", "lora-embedding", "lora-saved-module", "dora", "pissa",
        "adalora", "hira", "ia3", "ln-tuning", "loha", "beft",
        "miss", "delora", "vera", "vblora", "unilora", "tinylora"]


@pytest.mark.parametrize("variant", KEPT)
def test_a_slice_of_the_merge_is_the_merge_of_the_slices(variant, tmp_path):
    path, _ = stored(tmp_path / "a", variant)
    module, inputs = llama()
    kept = spacompiler.compile(module, inputs, adapter=path, keep_adapter=True, **FAST)
    kept.job.kept.save(tmp_path / "cut")
    want, *_ = run_pruned(kept.job.trace, kept.job.solution, kept.job.choices, double=False)
    assert (run(kept.module, inputs) - want).abs().max() > 1e-4, "the base holds the adapter"
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(kept.module), tmp_path / "cut")
    assert (run(tuned, inputs) - want).abs().max() <= 1e-6
    again, _ = merging.merge(kept.module, [foreign.read(tmp_path / "cut")], inputs)
    assert (run(again, inputs) - want).abs().max() <= 1e-6


@pytest.mark.parametrize("variant", ["boft", "oft", "lokr", "fourierft", "road", "shira", "frod",
                                     "trainable-tokens"])
def test_what_mixes_rows_must_be_merged(variant, tmp_path):
    path, _ = stored(tmp_path / "a", variant)
    with pytest.raises(SpaError, match="cannot be sliced") as error:
        spacompiler.compile(*llama(), adapter=path, keep_adapter=True, **FAST)
    assert "--keep-adapter" in error.value.fix


@pytest.mark.parametrize("variant", ["lora", "ln-tuning", "dora"])
def test_a_narrower_stream_corrects_its_norms_on_both_sides(variant, tmp_path):
    """RMSNorm gains are scaled where the residual stream shrinks, tuned norms with them."""
    path, _ = stored(tmp_path / "a", variant)
    options = {**FAST, "target": "params=70%", "roles": ("hidden",)}
    kept = spacompiler.compile(*llama(), adapter=path, keep_adapter=True, **options)
    assert "adapter = pruned merged model" in kept.job.notes[-1]


@pytest.mark.parametrize("variant, survives", [("lora", True), ("ia3", False)])
def test_a_repair_is_carried_over_where_the_adapter_adds(variant, survives, tmp_path):
    """What a refit changes goes to the base; where the adapter multiplies, that is refused."""
    pytest.importorskip("spacompiler.passes.refit")
    path, _ = stored(tmp_path / "a", variant)
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(61, (4, 12), generator=generator)} for _ in range(4)]

    def compiled():
        return spacompiler.compile(*llama(), adapter=path, keep_adapter=True, repair="refit",
                                   calibration=data, **FAST)

    if survives:
        assert "adapter = pruned merged model" in compiled().job.notes[-1]
        return
    with pytest.raises(ProofError, match="not the pruned merged model") as error:
        compiled()
    assert "--repair none" in error.value.fix


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """An artifact with a kept adapter."""
    place = tmp_path_factory.mktemp("beside")
    path, _ = stored(place / "a")
    module, inputs = llama()
    module.save_pretrained(place / "dense")
    result = spacompiler.compile(str(place / "dense"), inputs, adapter=path, keep_adapter=True,
                                 out=place / "out", onnx=False, **FAST)
    return place / "out", result, place / "dense"


def test_the_artifact_works_with_transformers_and_peft_alone(beside):
    from transformers import AutoModelForCausalLM

    out, result, _ = beside
    base = AutoModelForCausalLM.from_pretrained(out)
    ids = llama()[1]
    assert torch.equal(run(base, ids), run(result.module, ids))
    tuned = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert (run(tuned, ids) - run(result.module, ids)).abs().max() > 1e-4
    assert all(c.passed is not False for c in spacompiler.verify(out))


def test_a_base_beside_its_adapter_is_verified_against_the_dense_base(beside):
    """The arrays of such an artifact are parts of the base, not of the merged model."""
    out, _, dense = beside
    assert all(c.passed for c in spacompiler.verify(out, str(dense)))
    merged = peft.PeftModel.from_pretrained(llama()[0], out.parent / "a").merge_and_unload()
    found = spacompiler.verify(out, merged)[-1]
    assert found.passed is None and "give its base" in found.detail


def test_a_kept_adapter_knows_its_base(beside):
    out, _, dense = beside
    from transformers import AutoModelForCausalLM

    with pytest.raises(SpaError, match="belongs to another base"):
        merging.merge(AutoModelForCausalLM.from_pretrained(dense), [foreign.read(out / "adapter")],
                      llama()[1])


# --- lifted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "adalora", "hira", "loha", "ia3", "beft"])
def test_lift_after_slice_is_the_identity_on_what_was_kept(variant, beside, tmp_path):
    out, result, dense = beside
    path, _ = stored(tmp_path / "small", variant, base=(result.module, llama()[1]))
    spacompiler.lift(path, out, tmp_path / "full")
    small, full = foreign.read(path), foreign.read(tmp_path / "full")
    recorded = lifting.recorded(out)
    assert small.tensors.keys() == full.tensors.keys()
    wider = 0
    for part in cutting.parts(full):
        back = cutting._selected(full.tensors[part.key], part, recorded) \
            if part.weight in recorded else full.tensors[part.key]
        assert torch.equal(back, small.tensors[part.key])
        wider += back.shape != full.tensors[part.key].shape
        rest = full.tensors[part.key].numel() - back.numel()
        same = (full.tensors[part.key] == full.kind.fill).sum() - (back == full.kind.fill).sum()
        assert same == rest, "what the pruned model lacks must change nothing"
    assert wider
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(dense)
    merging.merge(module, [full], llama()[1])
    with pytest.raises(SpaError, match="belongs to another base"):
        merging.merge(copy.deepcopy(result.module), [full], llama()[1])


@pytest.mark.parametrize("variant", ["dora", "ln-tuning", "lokr"])
def test_what_cannot_be_lifted(variant, beside, tmp_path):
    out, result, _ = beside
    path, _ = stored(tmp_path / "small", variant, base=(result.module, llama()[1]))
    with pytest.raises(SpaError, match="cannot be lifted"):
        spacompiler.lift(path, out, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_lift_of_an_adapter_of_the_dense_model_is_refused(beside, tmp_path):
    path, _ = stored(tmp_path / "wide")
    with pytest.raises(SpaError, match="cannot be sliced"):
        spacompiler.lift(path, beside[0], tmp_path / "full")


@pytest.mark.parametrize("said, why", [
    ({"factored": {"mlp": 4}}, "products of two"), ({"dropped": ["layers.1"]}, "numbered anew"),
    ({"layout": "onnx"}, "no layers to train")])
def test_lift_to_layers_that_the_dense_model_has_not_is_refused(said, why, beside, tmp_path):
    structure = json.loads((beside[0] / "structure.json").read_text())
    lifting.check_layers(beside[0])
    (tmp_path / "structure.json").write_text(json.dumps({**structure, **said}))
    with pytest.raises(UsageError, match=f"(?s)cannot be lifted.*{why}"):
        lifting.check_layers(tmp_path)
