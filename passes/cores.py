"""LoRA-SB and NLoRA: adapters of three matrices, started from gradients or from the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spacompiler.errors import SpaError
from spacompiler.passes.lora import GRADIENT_BATCHES, AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.objective import Objective
from spacompiler.train.ranks import Cores


@dataclass(frozen=True)
class LoraSb(Lora):
    """B C A, of which C alone trains; all three from the singular vectors of the first full step.

    LoRA-SB (2024): - lr sign(G), G the gradient of the objective by the weight on the first
    batches, is U S V' to `rank`; B = U, A = V', C = S. Linear layers alone.
    """

    name: ClassVar[str] = "lora-sb"
    alpha: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != self.rank or self.dora or self.init != "default":
            raise TypeError(f"{self.name} has alpha = rank, no dora and a start of its own")

    def hooks(self, task: Training) -> AdapterHooks:
        """Cores, started."""
        cores = Cores(task.module)
        if not cores.pairs:
            raise SpaError(f"{self.name} finds no linear layer", fix="use --recover lora")
        self.begin(task, cores)
        return _Cored(self.plus, cores)

    def begin(self, task: Training, cores: Cores) -> None:
        """Start from the first full step. Raises SpaError where no gradient arrives."""
        adapted: list[Any] = [task.module.get_submodule(path) for path, _, _ in cores.pairs]
        layers = [part.get_base_layer() for part in adapted]
        for layer in layers:
            layer.weight.requires_grad_(True)
        objective = Objective(task.module, task.dense, task.loss, self)
        for batch in task.batches[:GRADIENT_BATCHES]:
            objective(batch).total.backward()
        for i, layer in enumerate(layers):
            gradient = layer.weight.grad
            if gradient is None or not bool(gradient.any()):
                raise SpaError("there is no gradient to start from", where=cores.pairs[i][0],
                               why="the data does not reach this layer",
                               fix="use --recover lora")
            u, s, v = torch.linalg.svd(-self.lr * gradient.sign(), full_matrices=False)
            cores.set(i, *_padded(u[:, :self.rank], torch.diag(s[:self.rank]), v[:self.rank],
                                  self.rank))
            layer.weight.requires_grad_(False)
        for p in task.module.parameters():
            p.grad = None


@dataclass(frozen=True)
class Nlora(LoraSb):
    """B C A from columns and rows of W itself: C the inverse of their crossing (Nystrom).

    NLoRA (2025): the first `rank` columns are B, the first rows A, and what they say of W is taken
    from the base, so that the network starts as it was. With `intermediate`, C alone trains
    (IntTune).
    """

    name: ClassVar[str] = "nlora"
    intermediate: bool = False

    def hooks(self, task: Training) -> AdapterHooks:
        """Cores, started; A and B train too unless `intermediate`."""
        cores = Cores(task.module, frozen=self.intermediate)
        if not cores.pairs:
            raise SpaError(f"{self.name} finds no linear layer", fix="use --recover lora")
        self.begin(task, cores)
        return _Cored(self.plus, cores)

    @torch.no_grad()
    def begin(self, task: Training, cores: Cores) -> None:
        """Start from the weights, and take what the adapters say from them."""
        for i, (path, _, _) in enumerate(cores.pairs):
            layer: Any = task.module.get_submodule(path)
            base = layer.get_base_layer().weight
            turned = base.T if layer.fan_in_fan_out else base
            r = min(self.rank, *turned.shape)
            parts = turned[:, :r].clone(), torch.linalg.pinv(
                turned[:r, :r].double(), rtol=1e-2).to(base.dtype), turned[:r].clone()
            turned -= parts[0] @ parts[1] @ parts[2]
            cores.set(i, *_padded(*parts, self.rank))


class _Cored(AdapterHooks):
    """Adapters with cores, folded at the end."""

    def __init__(self, plus: float, cores: Cores) -> None:
        super().__init__(plus)
        self.cores = cores

    def finish(self) -> dict[str, Any]:
        """Fold the cores."""
        self.cores.fold()
        return {}


def _padded(up: torch.Tensor, core: torch.Tensor, down: torch.Tensor,
            rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B, C and A with ranks of zeros where a layer is narrower than `rank`."""
    more = rank - core.shape[0]
    pad = torch.nn.functional.pad
    return pad(up, (0, more)), pad(core, (0, more, 0, more)), pad(down, (0, 0, 0, more))
