"""Make a valid exported program out of one whose arrays and size arguments were changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._export.verifier import SpecViolationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from ...errors import SpaError
from ...system.process import quiet
from ..read.decompose import fake_mode
from ..trace import copied

_ATEN = torch.ops.aten


def refresh(
    ep: ExportedProgram,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:
    """Make a valid program from one whose weights and graph arguments were changed.

    ``state`` and ``constants`` map the names of parameters, buffers and lifted constants to their
    new tensors; names that they leave out keep the old ones. Names that shared storage before
    share it afterwards. Shapes are propagated anew with the program's own symbols, so dynamic
    axes stay dynamic. The given program is not changed, but shares its symbols with the result:
    after a refusal because of a fixed axis, capture it anew.

    Raises:
        SpaError: a name is unknown, tied names disagree, a node no longer fits its operands, or
            the change would fix an axis that was dynamic.
    """
    tensors = _new_tensors(ep, {**state, **(constants or {})})
    module = copied(ep.graph_module)
    drop_metadata_asserts(module)
    mode = fake_mode(module)
    free = _free_symbols(ep, module, mode)
    _propagate(module, mode, *_placeholder_values(ep, module, mode, tensors))
    _check_still_dynamic(free, _free_symbols(ep, module, mode))
    return rebuild(ep, module, tensors)


def _new_tensors(ep: ExportedProgram, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """All tensors of the program by name, the new ones tied where the old ones were."""
    old = {**ep.constants, **ep.state_dict}
    if unknown := sorted(set(given) - set(old)):
        raise SpaError(
            what=f"the program has no tensor named {unknown[0]!r}",
            why="only its parameters, buffers and constants can be replaced",
            fix=f"use its names, such as {', '.join(sorted(old)[:3])}",
        )
    result = dict(old)
    for names in _tied(old):
        replaced = {name: given[name] for name in names if name in given}
        if replaced:
            result.update(_tie(names, replaced, old))
    return result


def _tied(tensors: Mapping[str, Any]) -> Iterable[list[str]]:
    """Group the names of tensors that are one view of one storage."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        key = memory(tensor) if isinstance(tensor, Tensor) else None
        groups.setdefault(name if key is None else key, []).append(name)
    return groups.values()


def memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """What identifies a view of memory, or None where there is none (empty and meta tensors)."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    place = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*place, tuple(tensor.shape), tuple(tensor.stride()))


def _tie(names: list[str], new: dict[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give all names of a tied group the same new tensor: a parameter where the old one was."""
    first_name, first = next(iter(new.items()))
    for name, tensor in new.items():
        if tensor is not first and not torch.equal(tensor, first):
            raise SpaError(
                what=f"the tied tensors {first_name!r} and {name!r} would differ",
                why=f"new shapes {tuple(first.shape)} and {tuple(tensor.shape)}",
                fix="change tied tensors in the same way, or untie them before the export",
            )
    made: dict[bool, Tensor] = {}
    for name in names:  # a plain list may hold a parameter too, which is a constant there
        made.setdefault(isinstance(old[name], torch.nn.Parameter), _like(first, old[name]))
    return {name: made[isinstance(old[name], torch.nn.Parameter)] for name in names}


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    """The tensor as what the old one was, a parameter or not, without a copy of its data."""
    if not isinstance(old, torch.nn.Parameter):
        return tensor.detach()
    return torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)


def drop_metadata_asserts(module: GraphModule) -> None:
    """Remove the checks that tracing leaves on types and sizes, which a rewrite may change."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in list(part.graph.nodes):
                if node.target is _ATEN._assert_tensor_metadata.default:
                    part.graph.erase_node(node)
            part.recompile()


def _placeholder_values(
    ep: ExportedProgram, module: GraphModule, mode: FakeTensorMode, tensors: Mapping[str, Any]
) -> tuple[list[Any], set[Node]]:
    """A fake value for each placeholder, new sizes for tensors and the traced value for inputs,
    and which of them are others than before."""
    values, changed = [], set[Node]()
    nodes = module.graph.find_nodes(op="placeholder")
    for node, spec in zip(nodes, ep.graph_signature.input_specs, strict=True):
        tensor = tensors.get(spec.target) if spec.target else None
        if spec.kind is not InputKind.USER_INPUT and isinstance(tensor, Tensor) \
                and not _is_alike(node.meta.get("val"), tensor):
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            changed.add(node)
        values.append(node.meta.get("val"))
    return values, changed


def _is_alike(one: object, other: object) -> bool:
    """Whether values are of the same kinds, sizes and strides."""
    pairs = [pytree.tree_leaves(value) for value in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(
        _kind(a) == _kind(b) for a, b in zip(*pairs, strict=True))


def _kind(value: object) -> tuple[object, ...]:
    if not isinstance(value, Tensor):
        return type(value), str(value)
    return value.dtype, value.device, str(value.shape), str(value.stride())


class _Propagation(FakeTensorProp):
    """Fake propagation from what `changed`: nodes that read nothing of it keep their values.

    It remembers where it is, to name the culprit of a failure.
    """

    def __init__(self, module: GraphModule, mode: FakeTensorMode, changed: set[Node]) -> None:
        super().__init__(module, mode)
        self.changed = changed
        self.at: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.at, old = n, n.meta.get("val")
        if n.op == "call_function" and old is not None \
                and self.changed.isdisjoint(n.all_input_nodes):
            return old
        made = super().run_node(n)
        if n.op == "call_function" and not _is_alike(old, made):
            self.changed.add(n)
        return made


def _propagate(module: GraphModule, mode: FakeTensorMode, values: list[Any],
               changed: set[Node]) -> None:
    """Compute every node's value anew that follows from placeholders that changed."""
    interpreter = _Propagation(module, mode, changed)
    interpreter.extra_traceback = False
    try:
        with quiet(), enable_python_dispatcher(), torch.no_grad():
            interpreter.propagate_dont_convert_inputs(*values)
    except Exception as error:
        node = interpreter.at
        raise SpaError(
            what="an operation no longer fits its operands after the rewrite",
            where=f"node {node}: {node.target if node else ''} {_shapes(node)}",
            why=str(error).splitlines()[0] if str(error) else repr(error),
            fix="change the sizes in the node's arguments together with the weights",
        ) from error


def _shapes(node: Node | None) -> str:
    """The operands' new shapes, for a message."""
    values = [n.meta.get("val") for n in node.all_input_nodes] if node else []
    return ", ".join(str(list(v.shape)) for v in values if isinstance(v, Tensor))


def _free_symbols(
    ep: ExportedProgram, module: GraphModule, mode: FakeTensorMode
) -> dict[tuple[str, int], bool]:
    """Which axes of the inputs are dynamic, by input name and axis."""
    found = {}
    for name in ep.graph_signature.user_inputs:
        node = next((n for n in module.graph.nodes if n.name == name), None)
        value = node.meta.get("val") if node else None
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                found[str(name), axis] = _is_free(size, mode)
    return found


def _is_free(size: object, mode: FakeTensorMode) -> bool:
    """Whether a size is still a symbol; a new guard may have replaced the symbol by a number."""
    if not isinstance(size, torch.SymInt) or mode.shape_env is None:
        return False
    return not mode.shape_env.replace(size.node.expr).is_number


def _check_still_dynamic(
    before: Mapping[tuple[str, int], bool], after: Mapping[tuple[str, int], bool]
) -> None:
    """Refuse a rewrite that turned a dynamic axis into a fixed one."""
    for (name, axis), free in before.items():
        if free and not after[name, axis]:
            raise SpaError(
                what=f"axis {axis} of input {name!r} would no longer be dynamic",
                why="a changed size in the graph forces it to one value",
                fix="keep the symbolic entries of view and expand arguments when editing them",
            )


def rebuild(
    ep: ExportedProgram,
    module: GraphModule,
    tensors: Mapping[str, Any] | None = None,
    kind: type[ExportedProgram] = ExportedProgram,
) -> ExportedProgram:
    """A program around a changed graph; its constructor verifies it (a refusal: SpaError)."""
    tensors = {**ep.constants, **ep.state_dict} if tensors is None else tensors
    module.graph.lint()
    module.recompile()
    try:
        with quiet():
            return kind(
                root=module,
                graph=module.graph,
                graph_signature=copy.deepcopy(ep.graph_signature),
                state_dict={name: tensors[name] for name in ep.state_dict},
                range_constraints=dict(ep.range_constraints),
                module_call_graph=copy.deepcopy(ep.module_call_graph),
                example_inputs=ep.example_inputs,
                constants={name: tensors[name] for name in ep.constants},
                verifiers=ep.verifiers,
            )
    except SpecViolationError as problem:
        raise SpaError(
            what="torch.export refuses the re-written program",
            why=str(problem).splitlines()[0],
            fix="compile a part of the network: --module PATH",
        ) from problem
