"""LoRA recovery: train low-rank adapters on the linear layers, then merge them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from spacompiler.adapters.folding import fold
from spacompiler.adapters.merging import library
from spacompiler.errors import SpaError, UsageError, did_you_mean
from spacompiler.evidence.calls import Batch, examples, singles
from spacompiler.evidence.labels import inputs_only
from spacompiler.system.process import no_warnings
from spacompiler.train.eight_bits import eight_bits
from spacompiler.train.hooks import Hooks
from spacompiler.train.lean import lean
from spacompiler.train.loop import Training, train, vectors
from spacompiler.train.objective import Objective, call
from spacompiler.train.options import Schedule

if TYPE_CHECKING:
    from peft import LoraConfig

INITS = ("default", "gaussian", "eva", "olora", "orthogonal", "mica", "pissa", "pissa_niter_N",
         "lora_ga")
REFUSED = {
    "corda": "it needs covariances that peft gathers on a network of its own",
    "loftq": "it is for weights that are quantised"}
KEEPING = ("default", "gaussian", "eva")
"""Beginnings that leave the network's own weights as they are; merging makes new ones."""
GRADIENT_BATCHES = 8


class AdapterHooks(Hooks):
    """The plain loop for adapters, with B at another rate; `finish` readies them to be merged."""

    def __init__(self, plus: float = 1.0) -> None:
        self._plus = plus

    def optimizer(self, parameters: Mapping[str, nn.Parameter],
                  options: Schedule) -> torch.optim.Optimizer:
        """AdamW, B in a group of its own where it learns at another rate."""
        if self._plus == 1:
            return super().optimizer(parameters, options)
        ups = {n for n in parameters if ".lora_B." in n}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in parameters.items() if n not in ups]},
            {"params": [parameters[n] for n in sorted(ups)], "times": self._plus}]
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.decay)

    def finish(self) -> dict[str, Any]:
        """Take off what was put on adapters, and return what there is to report."""
        return {}


@dataclass(frozen=True)
class Lora(Schedule):
    """Train W + (alpha / rank) B A on linear layers and convolutions (Hu et al. 2021), and merge.

    `init` is one of peft's `init_lora_weights`; `eva` takes A from the training data's activations
    (Paischer et al. 2024), `lora_ga` takes both factors from the gradient of the objective on the
    first batches (Wang et al. 2024). With `norms`, gains of norms and biases are trained too. B
    learns at `plus` times the rate (LoRA+, Hayou et al. 2024). `rho` is how far EVA may
    redistribute ranks: up to so many times `rank` (1: not at all). With `bits=8` frozen weights of
    linear layers are held in 8 bits while adapters train beside them (by bitsandbytes), which are
    merged into the weights of full precision; these lie in a file meanwhile.
    """

    name: ClassVar[str] = "lora"
    shares: ClassVar[bool] = True

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    init: str = "default"
    dora: bool = False
    norms: bool = True
    plus: float = 1.0
    rho: float = 2.0
    bits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (0, 8):
            raise TypeError("bits must be 8, or 0: weights as they are")
        if self.bits and self.dora:
            raise TypeError("DoRA reads weights at each step, which cannot be held in 8 bits")
        if re.fullmatch(r"pissa_niter_\d+", self.init) or self.init in INITS[:-2] + INITS[-1:]:
            return
        why = REFUSED.get(self.init, "")
        raise UsageError(f"LoRA cannot be started by {self.init!r}", why=why,
                         fix=did_you_mean(self.init, INITS))

    def run(self, task: Training) -> dict[str, Any]:
        """Train and merge in place; raises SpaError if there is no layer to adapt."""
        peft = library()
        paths = _layers(task.module)
        if not paths:
            raise SpaError("there is no linear layer to put an adapter on",
                           why="the pruned network is a re-written program, or holds none",
                           fix="use --recover norms or full")
        ranks = self.ranks(task, paths)
        paths = [path for path in paths if ranks.get(path, self.rank)]

        probe, before = _probed(task)
        extra = {id(p) for _, p in vectors(task.module)} if self.norms else set()
        for path in paths if self.init not in KEEPING else ():  # these write into the weight
            weight = task.module.get_parameter(f"{path}.weight")
            weight.data = weight.data.clone()
        tuned = self.attach(peft, task, {path: ranks.get(path, self.rank) for path in paths})
        tuned.train()
        hooks = self.hooks(task)
        parameters = {n: p for n, p in task.module.named_parameters()
                      if p.requires_grad or id(p) in extra}
        with eight_bits(tuned) if self.bits else nullcontext(0) as held, lean(tuned):
            facts = train(task, self, parameters, hooks)
        facts |= ({"ranks": ranks} if ranks else {}) | hooks.finish() \
            | ({"layers in 8 bits": held} if held else {})
        fold(tuned, probe, before, where="recovery")
        return facts

    def hooks(self, task: Training) -> AdapterHooks:
        """Return what this recovery changes of the loop, once adapters are on the module."""
        return AdapterHooks(self.plus)

    def ranks(self, task: Training, paths: Sequence[str]) -> dict[str, int]:
        """Return the ranks of layers that have not `rank` (0: no adapter), before any is on."""
        return {}

    def attach(self, peft: ModuleType, task: Training, ranks: Mapping[str, int]) -> Any:
        """Put adapters on layers, each of its rank. Raises SpaError where peft refuses."""
        paths, others = list(ranks), {p: r for p, r in ranks.items() if r != self.rank}
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init, target_modules=paths,
            rank_pattern={f"^{re.escape(p)}": r for p, r in others.items()},
            alpha_pattern={f"^{re.escape(p)}": self.alpha * r / self.rank
                           for p, r in others.items()},
            eva_config=peft.EvaConfig(rho=self.rho) if self.init == "eva" else None)
        try:
            with no_warnings():
                if self.init == "lora_ga":
                    self._gradients(peft, task, config, paths)
                tuned = peft.PeftModel(task.module, config)
                if self.init == "eva":
                    peft.initialize_lora_eva_weights(
                        tuned, [inputs_only(tuned, k) or {"x": a[0]} for a, k in task.batches],
                        show_progress_bar=False)
        except SpaError:
            raise
        except Exception as problem:  # peft refuses in many ways
            raise SpaError("adapters cannot be put on the pruned network", why=str(problem),
                           fix="use another init, or --recover norms or full") from problem
        return tuned

    def _gradients(self, peft: ModuleType, task: Training, config: LoraConfig,
                   paths: list[str]) -> None:
        """Leave on each layer the mean gradient that peft starts its factors from.

        Raises SpaError for a layer that has none: peft would start it at random, unsaid.
        """
        objective = Objective(task.module, task.dense, task.loss, self)

        def step() -> None:
            for batch in task.batches[:GRADIENT_BATCHES]:
                objective(batch).total.backward()

        config.lora_ga_config = peft.LoraGAConfig()
        for path in paths:  # the factors are two halves of the gradient's singular directions
            half = min(task.module.get_parameter(f"{path}.weight").shape[:2]) // 2
            if 0 < half < config.rank_pattern.get(f"^{re.escape(path)}", self.rank):
                config.rank_pattern[f"^{re.escape(path)}"] = half
                config.alpha_pattern[f"^{re.escape(path)}"] = self.alpha * half / self.rank
        peft.preprocess_loraga(task.module, config, step)
        without = [p for p in paths
                   if not hasattr(task.module.get_submodule(p), "_peft_loraga_grad")]
        if without:
            raise SpaError("LoRA cannot be started from gradients here", where=without[0],
                           why="only linear layers that the data reaches have one that peft "
                               f"takes ({len(without)} of {len(paths)} layers have none)",
                           fix="use init='eva' or another, or --recover norms or full")


Probe = Callable[[nn.Module], list[torch.Tensor]]


def _probed(task: Training) -> tuple[Probe, list[torch.Tensor]]:
    """What gives a module's results on a held-out example (on a batch if it takes no less), and
    those of the network as it is."""
    def results(batch: Batch, module: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return [x.clone() for x in call(module.eval(), *batch)]

    whole = task.held_out[0]
    one = partial(results, next(singles(whole, examples(*whole)), whole))
    try:
        return one, one(task.module)
    except Exception:  # any code may run here
        return partial(results, whole), results(whole, task.module)


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
