"""Run in an environment that sees torch and transformers: what loads a stock directory.

    python torch_side.py NAME JOB.json

The job names folders with `dense_hf` and `pruned_hf`, directories that stock transformers loads,
and texts with the tokens that torch writes after them. Nothing of spacompiler is imported.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def eager(model, ids, tokens):
    return _same(model, ids, tokens)


def trainer(model, ids, tokens):
    """One step of training lowers the loss on its own text, and what is saved loads again."""
    from transformers import Trainer, TrainingArguments

    row = {"input_ids": torch.tensor(ids + tokens), "labels": torch.tensor(ids + tokens)}
    with tempfile.TemporaryDirectory() as place:
        options = TrainingArguments(place, max_steps=2, learning_rate=1e-3, report_to=[],
                                    per_device_train_batch_size=1, use_cpu=True, save_steps=10**6,
                                    logging_steps=10**6, disable_tqdm=True)
        before = model(**{k: v[None] for k, v in row.items()}).loss.item()
        Trainer(model, options, train_dataset=[row]).train()
        after = model.eval()(**{k: v[None] for k, v in row.items()}).loss.item()
        model.save_pretrained(place)
        again = AutoModelForCausalLM.from_pretrained(place)
    equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                  again.state_dict().values(), strict=True))
    return f"loss {before:.2f} to {after:.2f}, saved and loaded" if after < before and equal \
        else f"fails: loss {before:.2f} to {after:.2f}, equal {equal}"


def torchao_int8(model, ids, tokens):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return _near(model, ids, lambda m: quantize_(m, Int8WeightOnlyConfig()))


def torchao_int4(model, ids, tokens):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    return _near(model, ids, lambda m: quantize_(
        m, IntxWeightOnlyConfig(torch.int4, PerGroup(32))))


def quanto(model, ids, tokens):
    from optimum.quanto import freeze, qint8, quantize

    def change(m):
        quantize(m, weights=qint8)
        freeze(m)

    return _near(model, ids, change)


def exported(model, ids, tokens):
    """torch.export, saved and loaded."""
    row = torch.tensor([ids])
    program = torch.export.export(model, (), {"input_ids": row, "use_cache": False})
    with tempfile.TemporaryDirectory() as place:
        torch.export.save(program, f"{place}/m.pt2")
        got = torch.export.load(f"{place}/m.pt2").module()(input_ids=row, use_cache=False)
    return _gap(got.logits, model(input_ids=row, use_cache=False).logits)


class Plain(torch.nn.Module):
    """Token ids to logits, without a cache: what exporters of one input take."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, row):
        return self.inner(input_ids=row, use_cache=False).logits


def executorch(model, ids, tokens):
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    row = torch.tensor([ids])
    made = to_edge(torch.export.export(Plain(model), (row,))).to_executorch().buffer
    got = Runtime.get().load_program(made).load_method("forward").execute([row])[0]
    return _gap(got, model(input_ids=row, use_cache=False).logits)


def coreml(model, ids, tokens):
    import coremltools as ct

    row = torch.tensor([ids])
    traced = torch.jit.trace(Plain(model), (row,), strict=False)
    ct.convert(traced, inputs=[ct.TensorType(name="row", shape=row.shape, dtype=int)])
    return "converts"


def _same(model, ids, tokens):
    made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=len(tokens),
                          attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                          do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):]
    return f"{sum(a == b for a, b in zip(made.tolist(), tokens, strict=True))} of {len(tokens)}"


def _near(model, ids, change):
    row = torch.tensor([ids])
    want = model(input_ids=row, use_cache=False).logits
    other = copy.deepcopy(model)
    change(other)
    return _gap(other(input_ids=row, use_cache=False).logits, want)


def _gap(got, want):
    return f"{float((got - want).abs().max() / want.abs().max()):.0e}"


RUN = {f.__name__: f for f in (eager, trainer, torchao_int8, torchao_int4, quanto, exported,
                               executorch, coreml)}


def main(name, job):
    for artifact, folder in json.loads(Path(job).read_text()).items():
        said = {}
        for which in ("dense", "pruned"):
            text = json.loads((Path(folder) / f"{which}_text.json").read_text())
            try:
                model = AutoModelForCausalLM.from_pretrained(Path(folder) / f"{which}_hf").eval()
                with torch.set_grad_enabled(name == "trainer"):
                    said[which] = {"said": RUN[name](model, text["ids"], text["tokens"])}
            except Exception as problem:
                said[which] = f"{type(problem).__name__}: {' '.join(str(problem).split())[-160:]}"
        print("ROW " + json.dumps({"artifact": artifact, **said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
