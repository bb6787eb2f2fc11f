"""Stored constants of a model that is re-written: new ones, and single elements changed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant(model: ir.Model, array: np.ndarray, name: str) -> ir.Value:
    """Store an array under a name that must be free."""
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name),
                     shape=ir.Shape(array.shape),
                     type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    model.graph.register_initializer(value)
    return value


class Constants:
    """Adds and changes constants, each in constant time however many readers share one."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._made: dict[tuple[str, str, tuple[int, ...], bytes], ir.Value] = {}
        self._named: dict[str, int] = {}
        self._readers: dict[int, int] = {}
        self._shared: set[int] = set()

    def add(self, array: np.ndarray, name: str) -> ir.Value:
        """Return a constant; equal ones that are asked for under one name are the same."""
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = constant(self.model, array, self._free(name))
            self._shared.add(id(self._made[key]))
        return self._made[key]

    def _free(self, name: str) -> str:
        while True:
            count = self._named[name] = self._named.get(name, 0) + 1
            found = name if count == 1 else f"{name}_{count}"
            if found not in self.model.graph.initializers:
                return found

    def set(self, user: ir.Node, index: int, element: int, new: float, *, follows: bool) -> None:
        """Change one element of a constant input; other readers keep the old constant.

        With `follows` a 0 or -1 stays: a reshape copies or infers that size.
        """
        value = user.inputs[index]
        assert value is not None and value.const_value is not None
        array = np.array(value.const_value.numpy())
        flat = array.reshape(-1)
        if flat[element] == new or (follows and flat[element] in (0, -1)):
            return
        flat[element] = new
        readers = self._readers.setdefault(id(value), len(value.uses()))
        if readers > 1 or value.is_graph_output() or id(value) in self._shared:
            self._readers[id(value)] -= 1
            user.replace_input_with(index, self.add(array, f"{value.name}_pruned"))
        else:
            value.const_value = ir.Tensor(array, name=value.name)
