"""ONNX Runtime and numpy alone: sessions, decoders, times."""

from .decoder import Decoder as Decoder
from .encoder_decoder import EncoderDecoder as EncoderDecoder
