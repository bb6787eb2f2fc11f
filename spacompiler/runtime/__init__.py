"""ONNX Runtime and numpy alone: sessions, decoders, times."""

from .decoder import Decoder as Decoder
