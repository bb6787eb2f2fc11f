"""All cases of test_ops, by the subjects of their operators."""

from __future__ import annotations

from ops_case import Case
from ops_chosen import chosen_cases
from ops_norms import norm_cases, pooling_cases
from ops_positions import cut_cases, lookup_cases, shape_cases
from ops_products import attention_cases, contraction_cases, convolution_cases, recurrent_cases
from ops_values import along_cases, pointwise_cases, reduce_cases, transform_cases

CASES = [case for make_cases in (
    pointwise_cases, along_cases, reduce_cases, contraction_cases, convolution_cases,
    recurrent_cases, attention_cases, shape_cases, cut_cases, norm_cases, transform_cases,
    lookup_cases, pooling_cases, chosen_cases,
) for case in make_cases()]


def case_of(name: str, index: int = 0) -> Case:
    return [case for case in CASES if case.op == name][index]
