"""LoRA recovery: train low-rank adapters on the linear layers, then merge them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spacompiler.adapters.merging import fold, library
from spacompiler.distillation import call
from spacompiler.errors import SpaError
from spacompiler.training import Schedule, Training, train, vectors


@dataclass(frozen=True)
class Lora(Schedule):
    """Train W + (alpha / rank) B A on linear layers and convolutions (Hu et al. 2021), and merge.

    `init` is one of peft's `init_lora_weights`; `eva` takes A from the training data's activations
    (Paischer et al. 2024). With `norms`, gains of norms and biases are trained too.
    """

    name: ClassVar[str] = "lora"

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    init: str = "default"
    dora: bool = False
    norms: bool = True

    def run(self, task: Training) -> dict[str, Any]:
        """Train and merge in place; raises SpaError if there is no layer to adapt."""
        peft = library()
        paths = _layers(task.module)
        if not paths:
            raise SpaError("there is no linear layer to put an adapter on",
                           why="the pruned network is a re-written program, or holds none",
                           fix="use --recover norms or full")

        def probe(module: nn.Module) -> list[torch.Tensor]:
            with torch.no_grad():
                return [x.clone() for x in call(module.eval(), *task.held_out[0])]

        before = probe(task.module)
        extra = {id(p) for _, p in vectors(task.module)} if self.norms else set()
        for path in paths:  # merging writes into the weight
            weight = task.module.get_parameter(f"{path}.weight")
            weight.data = weight.data.clone()
        tuned = self._attach(peft, task, paths)
        tuned.train()
        parameters = {n: p for n, p in task.module.named_parameters()
                      if p.requires_grad or id(p) in extra}
        facts = train(task, self, parameters)
        fold(tuned, probe, before, where="recovery")
        return facts

    def _attach(self, peft: Any, task: Training, paths: list[str]) -> Any:
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init, target_modules=paths)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuned = peft.PeftModel(task.module, config)
                if self.init == "eva":
                    peft.initialize_lora_eva_weights(
                        tuned, [k or {"x": a[0]} for a, k in task.batches],
                        show_progress_bar=False)
        except Exception as problem:  # peft refuses in many ways
            raise SpaError("adapters cannot be put on the pruned network", why=str(problem),
                           fix="use another init, or --recover norms or full") from problem
        return tuned


# classes that peft adapts as they stand; a subclass may use its weight in a way of its own
ADAPTED = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")


def _layers(module: nn.Module) -> list[str]:
    """Linear layers and ungrouped convolutions, but not the output layer of a language model."""
    outputs: Any = getattr(module, "get_output_embeddings", None)
    output = outputs() if outputs is not None else None
    tied = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    return [path for path, part in module.named_modules()
            if type(part).__name__ in ADAPTED
            and part is not output and getattr(part, "groups", 1) == 1
            and tied.count(id(part.weight)) == 1]
