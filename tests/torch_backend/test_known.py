"""What is said at once of an operator's result is what torch says of it."""

from __future__ import annotations

import pytest
import torch

from spacompiler.torch_backend.read.known import _AT_ONCE, _asked

A = torch.ops.aten
INT, BOOL = torch.long, torch.bool


def made(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


SAID = [
    (A.add.Tensor, (made(2, 3), made(3))),
    (A.add.Tensor, (made(2, 1, 3, of=INT), made(4, 1, of=INT))),
    (A.mul.Tensor, (made(2, 3, of=INT), 2)), (A.sub.Tensor, (made(2, 3, of=torch.float16), 1.5)),
    (A.div.Tensor, (made(4, 2), 3)), (A.neg.default, (made(2, 3),)),
    (A.eq.Tensor, (made(2, 1, of=INT), made(5, of=INT))), (A.lt.Scalar, (made(2, 3), 0)),
    (A.__and__.Tensor, (made(2, 3, of=BOOL), made(3, of=BOOL))),
    (A.bitwise_or.Tensor, (made(2, 3, of=INT), made(2, 3, of=INT))),
    (A.mean.dim, (made(2, 3, 4), [-1], True)), (A.mean.dim, (made(2, 3, 4, 5), [2, -1])),
    (A.cat.default, ([made(2, 3), made(2, 5)], -1)), (A.cat.default, ([made(2, 3), made(4, 3)],)),
    (A.linear.default, (made(2, 7, 3), made(5, 3), made(5))),
    (A.conv2d.default, (made(2, 4, 9, 9), made(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], 2)),
    (A.add_.Tensor, (made(2, 3), made(2, 3))), (A.mul_.Tensor, (made(4, of=INT), made(4, of=INT))),
    (A.scaled_dot_product_attention.default,
     (made(2, 4, 9, 8), made(2, 4, 7, 8), made(2, 4, 7, 6))),
]
LEFT = [
    (A.div.Tensor, (made(2, 3, of=INT), made(2, 3, of=INT))),
    (A.add.Tensor, (made(2, 3, of=BOOL), made(2, 3, of=BOOL))),
    (A.add.Tensor, (made(2, 3, of=INT), 0.5)), (A.mul.Tensor, (made(2, 3, of=INT), True)),
    (A.add.Tensor, (made(2, 3), made(2, 3, of=INT))), (A.add.Tensor, (made(3, 2).t(), made(2, 3))),
    (A.neg.default, (made(2, 3, of=INT),)), (A.add_.Tensor, (made(2, 3), made(3))),
    (A.add_.Tensor, (made(2, 3), 2)), (A.mul_.Tensor, (made(2, 3), made(2, 3, of=INT))),
    (A.mean.dim, (made(2, 3), [])),
    (A.cat.default, ([made(2, 3), made(0)], 0)),
    (A.cat.default, ([made(2, 3), made(2, 3, of=INT)], 0)),
    (A.scaled_dot_product_attention.default,
     (made(2, 8, 9, 8), made(2, 4, 9, 8), made(2, 4, 9, 8), None, 0.0, False)),
]


@pytest.mark.parametrize(("operator", "args"), SAID, ids=str)
def test_results_are_of_the_sizes_strides_and_types_that_torch_gives_them(operator, args):
    have, want = _AT_ONCE[operator](args, {}), _asked(operator, args, {})
    assert (have.shape, have.stride(), have.dtype, have.device) == (
        want.shape, want.stride(), want.dtype, want.device)
    assert (have is args[0]) == operator._schema.is_mutable


@pytest.mark.parametrize(("operator", "args"), LEFT, ids=str)
def test_what_has_rules_of_its_own_is_left_to_torch(operator, args):
    assert _AT_ONCE[operator](args, {}) is None


@pytest.mark.parametrize("shapes", [((2, 3), (4, 3)), ((0, 3), (2, 3)), ((5,), (2, 4))])
def test_sizes_that_do_not_fit_are_refused_as_torch_refuses_them(shapes):
    args = tuple(made(*shape) for shape in shapes)
    for call in (_AT_ONCE[A.add.Tensor], lambda args, kwargs: _asked(A.add.Tensor, args, kwargs)):
        with pytest.raises(RuntimeError):
            call(args, {})
