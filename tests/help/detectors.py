"""A small detector of YOLO's kind, as a module and as the ONNX file that its exporter would write.

Split and concatenated branches, a pyramid of poolings, a way up to the finer scale, and for each
place a distribution of distances to the four sides of a box beside the classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

BINS, CLASSES = 4, 3


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """Half of the channels goes through a residual branch, and all are joined (C2f)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(width, width), conv(3 * width // 2, width)
        half = width // 2
        self.branch = nn.Sequential(conv(half, half, 3), conv(half, half, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.append(parts[-1] + self.branch(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Poolings of poolings, joined (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(width, width // 2), conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.enter(x)]
        for _ in range(3):
            found.append(self.pool(found[-1]))
        return self.leave(torch.cat(found, 1))


class Yolo(nn.Module):
    """Two scales; boxes (b, 4, places) as distances in cells, and classes (b, classes, places)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.first = conv(3, width, 3, 2), Split(width)
        self.down, self.second = conv(width, 2 * width, 3, 2), Pyramid(2 * width)
        self.up, self.neck = nn.Upsample(scale_factor=2), conv(3 * width, width, 3)
        self.boxes = nn.ModuleList(nn.Sequential(conv(w, w, 3), nn.Conv2d(w, 4 * BINS, 1))
                                   for w in (width, 2 * width))
        self.classes = nn.ModuleList(nn.Sequential(conv(w, w, 3), nn.Conv2d(w, CLASSES, 1))
                                     for w in (width, 2 * width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.first(self.stem(image))
        coarse = self.second(self.down(fine))
        scales = self.neck(torch.cat([self.up(coarse), fine], 1)), coarse
        boxes = torch.cat([head(x).flatten(2) for head, x in zip(self.boxes, scales, strict=True)],
                          2)
        classes = torch.cat([head(x).flatten(2) for head, x in zip(self.classes, scales,
                                                                   strict=True)], 2)
        bins = boxes.view(image.shape[0], 4, BINS, -1).softmax(2)
        distances = (bins * torch.arange(BINS).view(1, 1, -1, 1)).sum(2)
        return torch.cat([distances, classes.sigmoid()], 1)


GRAPH = """<ir_version: 9, opset_import: ["" : 17]>
detector (float[1, 3, 64, 64] images) => (float[1, 7, 1280] output0) {
    s0 = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(images, w0)
    g0 = Sigmoid(s0)  x0 = Mul(s0, g0)
    s1 = Conv(x0, w1)  g1 = Sigmoid(s1)  x1 = Mul(s1, g1)
    halves = Constant<value_ints = [8, 8]>()
    a, b = Split<axis = 1>(x1, halves)
    s2 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(b, w2)
    g2 = Sigmoid(s2)  x2 = Mul(s2, g2)  c = Add(b, x2)
    joined = Concat<axis = 1>(a, b, c)
    s3 = Conv(joined, w3)  g3 = Sigmoid(s3)  fine = Mul(s3, g3)
    s4 = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(fine, w4)
    g4 = Sigmoid(s4)  x4 = Mul(s4, g4)
    p1 = MaxPool<kernel_shape = [5, 5], pads = [2, 2, 2, 2]>(x4)
    p2 = MaxPool<kernel_shape = [5, 5], pads = [2, 2, 2, 2]>(p1)
    pooled = Concat<axis = 1>(x4, p1, p2)
    s5 = Conv(pooled, w5)  g5 = Sigmoid(s5)  coarse = Mul(s5, g5)
    twice = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>()
    raised = Resize<mode = "nearest">(coarse, , twice)
    both = Concat<axis = 1>(raised, fine)
    s6 = Conv(both, w6)  g6 = Sigmoid(s6)  x6 = Mul(s6, g6)
    h1 = Conv(x6, w7)  h2 = Conv(coarse, w8)
    flat1 = Constant<value_ints = [1, 19, 1024]>()  flat2 = Constant<value_ints = [1, 19, 256]>()
    r1 = Reshape(h1, flat1)  r2 = Reshape(h2, flat2)
    all = Concat<axis = 2>(r1, r2)
    parts = Constant<value_ints = [16, 3]>()
    box, classes = Split<axis = 1>(all, parts)
    apart = Constant<value_ints = [1, 4, 4, 1280]>()  four = Reshape(box, apart)
    turned = Transpose<perm = [0, 2, 1, 3]>(four)  soft = Softmax<axis = 1>(turned)
    sides = Conv(soft, bins)  whole = Constant<value_ints = [1, 4, 1280]>()
    distances = Reshape(sides, whole)
    scores = Sigmoid(classes)  output0 = Concat<axis = 1>(distances, scores)
}"""
SHAPES = {"w0": (16, 3, 3, 3), "w1": (16, 16, 1, 1), "w2": (8, 8, 3, 3), "w3": (16, 24, 1, 1),
          "w4": (32, 16, 3, 3), "w5": (32, 96, 1, 1), "w6": (16, 48, 1, 1), "w7": (19, 16, 1, 1),
          "w8": (19, 32, 1, 1)}


def yolo_file(place: Path) -> str:
    """Write the file, with random weights, and return its path."""
    model, draws = onnx.parser.parse_model(GRAPH), np.random.default_rng(0)
    arrays = {name: draws.standard_normal(shape).astype("float32") * 0.3
              for name, shape in SHAPES.items()}
    arrays["bins"] = np.arange(BINS, dtype="float32").reshape(1, BINS, 1, 1)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(model, place)
    return str(place)
