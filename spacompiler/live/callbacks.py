"""The pruner inside transformers' Trainer and Lightning's: callbacks, imported when asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spacompiler.errors import UsageError
from spacompiler.live.pruner import Pruner

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from transformers import TrainerControl, TrainerState, TrainingArguments

FILE = "pruner.json"


def _begin(pruner: Pruner, optimizers: object, total: int) -> None:
    """Follow a trainer's optimiser, and its length where the schedule does not know it."""
    pruner.attach(optimizers)
    if not pruner.schedule.steps:
        if total <= 0:
            raise UsageError("the run has no number of steps",
                             fix="give the trainer max_steps, or the schedule steps=...")
        pruner.schedule = replace(pruner.schedule, steps=total)


def trainer_callback(pruner: Pruner) -> Any:
    """Return a TrainerCallback that prunes during transformers' `Trainer.train`.

    Each checkpoint gets a `pruner.json`. To resume: make the dense model and the pruner, call
    `pruner.load(checkpoint / "pruner.json")`, then `train(resume_from_checkpoint=...)`.
    """
    from transformers import TrainerCallback

    class PruningCallback(TrainerCallback):
        """Shrinks the model after the optimiser's steps, as the schedule says."""

        def on_train_begin(self, args: TrainingArguments, state: TrainerState,
                          control: TrainerControl, **kwargs: object) -> None:
            _begin(pruner, kwargs["optimizer"], state.max_steps)

        def on_step_end(self, args: TrainingArguments, state: TrainerState,
                       control: TrainerControl, **kwargs: object) -> None:
            pruner.step()

        def on_save(self, args: TrainingArguments, state: TrainerState,
                   control: TrainerControl, **kwargs: object) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                pruner.save(folder / FILE)

        def on_train_end(self, args: TrainingArguments, state: TrainerState,
                        control: TrainerControl, **kwargs: object) -> None:
            pruner.finish()

    return PruningCallback()


def lightning_callback(pruner: Pruner) -> Any:
    """Return a Lightning Callback that prunes during `Trainer.fit`; its state is in checkpoints.

    Raises UsageError if Lightning is not installed. To resume: make the dense model and the
    pruner, `pruner.load_state_dict(checkpoint["callbacks"]["PruningCallback"])`, then fit with
    `ckpt_path`.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError as problem:
        raise UsageError("Lightning is not installed", fix="pip install lightning") from problem

    class PruningCallback(Callback):  # type: ignore[misc]
        """Shrinks the module after the optimiser's steps, as the schedule says."""

        state_key = "PruningCallback"
        _seen = 0

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            _begin(pruner, list(trainer.optimizers), int(trainer.estimated_stepping_batches))
            self._seen = trainer.global_step

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule,
                               *rest: object) -> None:
            while self._seen < trainer.global_step:  # none while gradients accumulate
                self._seen += 1
                pruner.step()

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pruner.finish()

        def state_dict(self) -> dict[str, Any]:
            return pruner.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """The widths were loaded before the weights; see above."""

    return PruningCallback()
