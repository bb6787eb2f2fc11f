"""Merged is adapted, also in a network that makes much of a last bit; a wrong merge is not."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from spacompiler.adapters.folding import fold
from spacompiler.adapters.merging import results
from spacompiler.errors import ProofError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Loud(nn.Module):
    """Results of which a last bit of the first layer changes the third digit."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 8) to (b, 8)."""
        return torch.sin(3e4 * self.first(x)) + self.second(x)


def folded(tied: bool = False) -> list[str]:
    torch.manual_seed(0)
    module, inputs = Loud(tied).eval(), (torch.randn(64, 8),)
    before = results(module, inputs)
    tuned = peft.PeftModel(module, peft.LoraConfig(r=2, target_modules=["first"],
                                                   init_lora_weights=False))
    _, notes = fold(tuned, lambda m: results(m, inputs), before, where="here")
    return notes


def test_what_is_rounding_in_the_results_is_judged_layer_by_layer() -> None:
    (note,) = folded()
    assert "each layer is, and a last bit of theirs changes results by" in note


def test_a_merge_that_loses_a_part_of_an_adapter_is_found_at_its_layer(
        monkeypatch: pytest.MonkeyPatch) -> None:
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: 0.95 * right(*args))
    with pytest.raises(ProofError, match="not the adapted one") as error:
        folded()
    assert error.value.where == "here: first"


def test_layers_that_are_right_do_not_excuse_results_that_are_not() -> None:
    with pytest.raises(ProofError, match="a last bit of its layers changes them by"):
        folded(tied=True)
