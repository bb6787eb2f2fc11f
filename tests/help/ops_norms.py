"""Cases of norms, pooling and interpolation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ops_case import Case, aten, op


def normed(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
    """The masked run replaces layer_norm itself, so that what follows it is compared."""
    return aten.layer_norm(x, [4], *affine) * 2


def norm_cases() -> Iterator[Case]:
    yield Case("layer_norm", normed, ((3, 4),), "**", least=2)
    yield Case("layer_norm", normed, ((4, 4), (4,), (4,)), "** * *", least=2)
    yield Case("layer_norm", op("layer_norm", [4, 5]), ((3, 4, 5),), "*..")
    yield Case("rms_norm", lambda x, w: aten.rms_norm(x, [4], w, 1e-3), ((4, 4), (4,)), "** *")
    yield Case("rms_norm", lambda x: aten.rms_norm(x, [4], None, 1e-3) * 2, ((3, 4),), "**")
    yield Case("rms_norm", lambda x: aten.rms_norm(x, [4]) * 2, ((3, 4),), "**")
    yield Case("rms_norm", lambda x, w: aten.rms_norm(x, [4], w), ((3, 4), (4,)), "** *")
    yield Case("group_norm", op("group_norm", 2), ((2, 4, 4),), "**.")
    yield Case("group_norm", op("group_norm", 1), ((2, 4, 4),), "**.")
    yield Case("group_norm", lambda x, w, b: aten.group_norm(x, 3, w, b),
               ((2, 6, 4), (6,), (6,)), "**. * *")
    yield Case("group_norm", op("group_norm", 4), ((2, 4, 3),), "**.")
    call = lambda x, w, b, m, v: aten.batch_norm(x, w, b, m, v, False, 0.1, 1e-5, False)  # noqa: E731
    yield Case("batch_norm", call, ((2, 4, 4, 4), *((4,),) * 4), "**** * * * *")
    yield Case("batch_norm", call, ((4, 4), *((4,),) * 4), "** * * * *")
    yield Case("batch_norm", lambda x: aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5,
                                                       False), ((2, 4, 4),), ".*.")
    call = lambda x, m, v: aten.batch_norm(x, None, None, m, v, False, 0.1, 1e-5, False)  # noqa: E731
    yield Case("batch_norm", call, ((2, 3, 4), (3,), (3,)), "*** * *")
    call = lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(  # noqa: E731
        x, w, b, m, v, 0.1, 1e-5)
    yield Case("_native_batch_norm_legit_no_training", call, ((2, 4, 4), *((4,),) * 4),
               "*** * * * *")
    call = lambda x, w, b: aten.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False)  # noqa: E731
    yield Case("instance_norm", call, ((2, 4, 5), (4,), (4,)), "**. * *")


def pooling_cases() -> Iterator[Case]:
    for name, d in (("grid_sampler", 2), ("grid_sampler_2d", 2), ("grid_sampler_3d", 3)):
        yield Case(name, op(name, 0, 0, False), ((2, 3, *(4,) * d), (2, *(5,) * d, d)),
                   f"**{'.' * d} *{'.' * (d + 1)}")
    def case(name: str, d: int, *args: Any) -> Case:
        return Case(name, op(name, *args), ((2, 3, *(4,) * d),), "**" + "." * d)

    for d in (1, 2, 3):
        two, size = [2] * d, [6] * d
        for name in "avg_pool max_pool adaptive_avg_pool".split():
            yield case(f"{name}{d}d", d, two)
        yield case(f"upsample_nearest{d}d", d, size)
        yield case(f"replication_pad{d}d", d, [1] * 2 * d)
    for d in (1, 2):
        yield case(f"adaptive_max_pool{d}d", d, [2] * d)
        yield case(f"reflection_pad{d}d", d, [1] * 2 * d)
    for d, name in ((1, "linear"), (2, "bilinear"), (2, "bicubic"), (3, "trilinear")):
        yield case(f"upsample_{name}{d}d", d, [6] * d, False)
    yield case("_upsample_nearest_exact2d", 2, [6, 6])
    yield case("_upsample_bilinear2d_aa", 2, [3, 3], False)
    yield case("_adaptive_avg_pool2d", 2, [2, 2])
    for d in (2, 3):
        yield case(f"max_pool{d}d_with_indices", d, [2] * d)
    yield Case("max_pool2d", op("max_pool2d", [2, 2]), ((4, 4, 4),), "*..")
