"""Compile parts of a network that cannot be traced whole: detectors, data-dependent loops.

    spacompiler.compile(model, inputs, target="params=70%", modules=("backbone",))

The network runs once as it is; each part's inputs are those of its first call. The parts are
then traced side by side as one program, so that there is one plan, one proof and one report. What
goes into and comes out of a part keeps its size, as does every array that code outside of the
parts uses too. The pruned parts are put back into a copy of the network, and the whole is checked
to use nothing of them but their results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ProofError, SpaError, UsageError, did_you_mean
from ..evidence.calibration import Calibration
from ..evidence.calls import Inputs, as_call
from ..evidence.labels import inputs_only
from ..graph.ir import Tensor
from ..groups.solution import Solution, solve
from ..plan.plan import Plan
from ..rows.aten_table import TABLE
from ..stages.comparison import compare
from ..stages.records import Decided, Emitted, Subject
from ..stages.tolerances import WHOLE
from .backend import TORCH
from .emit.apart import fresh
from .emit.program import rewrite
from .outside import Outside, left_out, outside
from .read.export import trace
from .rebuilt import called_like
from .trace import Trace
from .untouched import untouched
from .weights import called, weights_hash

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Kept:
    """A module that is neither registered with its holder nor copied with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: object) -> _Kept:
        return self


class Parts(nn.Module):
    """Sub-modules of a network at their own paths, called side by side: one call for each."""

    def __init__(self, whole: nn.Module, paths: Sequence[str],
                 beyond: Outside | None = None) -> None:
        super().__init__()
        self.paths, self._kept, self.beyond = tuple(paths), _Kept(whole), beyond or Outside()
        for path in paths:
            _place(self, path, whole.get_submodule(path))

    @property
    def whole(self) -> nn.Module:
        """The network that the parts were taken from."""
        return self._kept.module

    def forward(self, *calls: Call) -> list[Any]:
        """Return what each part gives for its own call."""
        return [self.get_submodule(path)(*args, **kwargs)
                for path, (args, kwargs) in zip(self.paths, calls, strict=True)]


def _place(root: nn.Module, path: str, part: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(leaf, part)


# --- inputs -----------------------------------------------------------------------------------


def capture(whole: nn.Module, paths: Iterable[str], inputs: Inputs) -> dict[str, Call]:
    """Run a network and return the first call of each sub-module that was called."""
    calls: dict[str, Call] = {}
    args, kwargs = as_call(inputs)
    with untouched(whole), ExitStack() as hooks, torch.no_grad():
        for path in paths:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                     path: str = path) -> None:
                if path not in calls:
                    calls[path] = pytree.tree_map(_copied, (tuple(args), dict(kwargs)))

            hook = whole.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(hook.remove)
        try:
            whole(*args, **kwargs)
        except SpaError:
            raise
        except Exception as problem:  # any code may run here
            raise SpaError("the network does not run on the example inputs",
                           where=type(whole).__name__,
                           why=f"{type(problem).__name__}: {problem}".splitlines()[0],
                           fix="give inputs that it runs on") from problem
    return calls


def _copied(value: object) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _checked(whole: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Raise UsageError for a path that names no sub-module, or one inside another part."""
    known = [path for path, _ in whole.named_modules() if path]
    for path in paths:
        if path not in known:
            raise UsageError(f"the network has no sub-module {path!r}",
                             fix=did_you_mean(path, known[:200]))
        if isinstance(whole.get_submodule(path), torch.jit.ScriptModule):
            raise UsageError(f"part {path!r} is TorchScript, which cannot be traced",
                             fix="give the Python module that it was made from")
        outer = next((p for p in paths if path.startswith(p + ".")), None)
        if outer or paths.count(path) > 1:
            raise UsageError(f"part {path!r} is given twice",
                             why=f"it lies in {outer!r}" if outer else "its path is repeated")
    return tuple(paths)


# --- which parts can be traced ----------------------------------------------------------------


def traceable(whole: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return the largest sub-modules that can be traced and hold more than one layer.

    Goes down from the children of the whole; sub-modules of one kind and shape are tried once.
    """
    verdicts: dict[Any, bool] = {}
    found: list[str] = []
    level = _children("", whole)
    if not level:  # a network that does not run says so
        capture(whole, (), inputs)
    while level:
        calls = capture(whole, level, inputs)
        below: dict[str, nn.Module] = {}
        for path, part in level.items():
            if path in calls and _verdict(part, calls[path], verdicts):
                found.append(path)
            else:
                below |= _children(path, part)
        level = below
    return tuple(sorted(found, key=[p for p, _ in whole.named_modules()].index))


def _children(path: str, part: nn.Module) -> dict[str, nn.Module]:
    """Sub-modules with several layers of their own, by path."""
    return {} if isinstance(part, torch.jit.ScriptModule) else {
        f"{path}.{name}".lstrip("."): child for name, child in part.named_children()
        if not isinstance(child, torch.jit.ScriptModule)
        and sum(bool(m._parameters) for m in child.modules()) > 1}


def _verdict(part: nn.Module, call: Call, verdicts: dict[Any, bool]) -> bool:
    kind = (type(part), tuple((n, p.shape) for n, p in part.named_parameters()))
    if kind not in verdicts:
        try:
            trace(Parts(_Holder(part), ("part",)), (call,))
            verdicts[kind] = True
        except SpaError:
            verdicts[kind] = False
    return verdicts[kind]


class _Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


# --- the steps of a compile -------------------------------------------------------------------


def enter(subject: Subject, calibration: Calibration,
          paths: Sequence[str]) -> tuple[Subject, Calibration, list[str]]:
    """Make a compile about parts of its module: the subject, its data, and what to tell the user.

    Raises UsageError for wrong paths, SpaError for a part that the example inputs do not reach.
    """
    whole = subject.model
    parts, inputs = of(whole, paths, subject.inputs)
    batches, beside = ([as_call(_inputs(whole, paths, (args, inputs_only(whole, kwargs))))
                        for args, kwargs in given]
                       for given in (calibration.batches, calibration.beside))
    notes = [f"compiled in parts: {', '.join(paths)}",
             *filter(None, (left_out(whole, paths), _packed(whole, subject.inputs)))]
    return replace(subject, model=parts, inputs=inputs, whole_inputs=subject.inputs,
                   parts=tuple(paths), backend=PARTS), \
        replace(calibration, batches=batches, beside=beside), notes


def _packed(whole: nn.Module, inputs: Inputs) -> str:
    """Say which recurrent layers read packed sequences, which no trace holds, and what helps."""
    found: dict[str, None] = {}
    args, kwargs = as_call(inputs)
    with untouched(whole), ExitStack() as hooks, torch.no_grad():
        for path, part in whole.named_modules():
            if isinstance(part, nn.RNNBase):
                def note(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                    if args and isinstance(args[0], nn.utils.rnn.PackedSequence):
                        found[path] = None

                hooks.callback(part.register_forward_pre_hook(note).remove)
        if any(isinstance(part, nn.RNNBase) for part in whole.modules()):
            whole(*args, **kwargs)
    return f"{', '.join(found)} read packed sequences, which cannot be traced, and stay: to let " \
        "their units go, give them padded batches (drop pack_padded_sequence)" if found else ""


def of(whole: nn.Module, paths: Sequence[str], inputs: Inputs) -> tuple[Parts, tuple[Call, ...]]:
    """Return parts of a network and their inputs; raises as `enter` does."""
    paths = _checked(whole, paths)
    calls = _inputs(whole, paths, inputs)
    return Parts(whole, paths, outside(whole, paths, *as_call(inputs))), calls


def _inputs(whole: nn.Module, paths: Sequence[str], inputs: Inputs) -> tuple[Call, ...]:
    calls = capture(whole, paths, inputs)
    missing = [path for path in paths if path not in calls]
    if missing:
        raise SpaError(f"sub-module {missing[0]!r} is not called", where=type(whole).__name__,
                       why="running the network on the example inputs does not reach it",
                       fix="give a sub-module whose forward runs (no container), or other inputs")
    return tuple(calls[path] for path in paths)


def _trace(parts: Parts, inputs: Inputs, quick: bool = False,
           checked: bool = False) -> tuple[Trace, Solution]:
    """A program of parts is checked where they are put back, whoever asks for it."""
    del checked
    traced = trace(parts, inputs, quick=quick)
    _mark_outside(traced, parts)
    return traced, solve(traced.graph, TABLE)


def _mark_outside(traced: Trace, parts: Parts) -> None:
    """Name the arrays of the whole that lie outside of the parts, and those inside it shares."""
    inside = {name: t for name, t in parts.named_parameters(remove_duplicate=False)}
    ids = {id(t) for t in inside.values()}
    shared = set()
    for name, tensor in parts.whole.named_parameters():
        if name not in inside and id(tensor) not in ids:
            traced.graph.tensors[f"outside.{name}"] = Tensor(
                f"outside.{name}", tuple(tensor.shape), str(tensor.dtype), "outside", name)
            traced.tied[name] = name
    for name, tensor in parts.whole.named_parameters(remove_duplicate=False):
        if name not in inside and id(tensor) in ids:
            shared.add(id(tensor))
    traced.graph.outside_macs = parts.beyond.macs
    traced.graph.heads = frozenset(traced.tied.get(n, n) for n in parts.beyond.heads)
    names = {traced.tied.get(name) for name, t in inside.items() if id(t) in shared}
    for held in traced.graph.tensors.values():
        if held.weight in names:
            held.kind = "outside"


def _emit(subject: Subject, decided: Decided, layout: str, notes: list[str]) -> Emitted:
    """Emit the parts, put them into a copy of the whole, and check the whole.

    From here on the compile is about the whole.
    """
    emitted = TORCH.emit(subject, decided, layout, notes)
    parts: Parts = subject.model
    if emitted.emission == "module":
        made = {path: emitted.model.get_submodule(path) for path in parts.paths}
    else:
        made = rewritten(parts, subject.inputs, decided.plan)  # type: ignore[arg-type]
    args, kwargs = as_call(subject.whole_inputs)
    last: Decided = emitted.decided
    whole: Emitted = replace(
        emitted, model=put_back(parts.whole, made),
        subject=replace(subject, model=parts.whole, backend=TORCH),
        decided=replace(last, trace=replace(last.trace, args=args, kwargs=kwargs)))
    _check_whole(whole, parts)
    return whole


def rewritten(parts: Parts, calls: Sequence[Call], plan: Plan) -> dict[str, nn.Module]:
    """Return each part as its own program, re-written by the part of a plan that it holds."""
    made: dict[str, nn.Module] = {}
    for path, call in zip(parts.paths, calls, strict=True):
        alone = Parts(parts.whole, (path,))
        traced, solution = _trace(alone, (call,))
        kept = {k: v for k, v in plan.kept.items() if k in solution.groups}
        choices = replace(plan, kept=kept).choices(solution)
        part = parts.whole.get_submodule(path)
        made[path] = called_like(part)(rewrite(traced, solution, choices), part, path)
    return made


def put_back(whole: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of the whole, sharing its memory, with other modules at some paths."""
    copied = _shell(whole)
    for path, part in made.items():
        _place(copied, path, part)
    return copied


def _shell(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {id(t): fresh(t) for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _check_whole(emitted: Emitted, parts: Parts) -> None:
    """The whole with pruned parts equals the dense whole that only calls the pruned parts."""
    trace, reference = emitted.decided.trace, _shell(parts.whole)
    for path in parts.paths:
        reference.get_submodule(path).forward = emitted.model.get_submodule(path).forward
    with untouched(emitted.model):  # the parts' own mode counts too
        want = called(reference, trace.args, trace.kwargs)
    found = compare(called(emitted.model, trace.args, trace.kwargs), want)
    if not found.within(WHOLE.value):
        raise ProofError("the whole network uses more of a part than its results",
                         where=", ".join(parts.paths),
                         why=found.why or f"results differ by {found.relative:.1e}",
                         fix="give a part that contains the code that does")


PARTS = replace(
    TORCH, trace=_trace, digest=lambda parts: weights_hash(parts.whole), emit=_emit)
