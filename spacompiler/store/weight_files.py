"""A checkpoint's directory, read before any framework builds a network from it.

Which files hold the weights, what arrays these hold (their headers only), how they are quantised,
and whether the configuration can be theirs at all. Nothing here runs code or reads pickles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from ..errors import SpaError
from . import strict_json

ADAPTER = "adapter_config.json"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_LAYERS = 1000
"""More layers than this, and than there are arrays, cannot be what was stored."""
_LAYERS = re.compile(r"^((num|n)_)?(\w*_)?(layers?|blocks?)$|^depth$")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
OTHERS = (
    ("structure.json", "it was written by this compiler in a layout of its own",
     "compile its model.onnx, or from Python: "
     "spacompiler.compile(spacompiler.load(DIR), inputs, ...)"),
    ("model_index.json", "it is a pipeline of several networks",
     "give the folder of one of them, or package.module:factory"),
    ("modules.json", "it is a pipeline whose network lies in a folder inside",
     "give that folder (0_Transformer)"),
)
"""What a directory without config.json may be: a file that says so, what it is, what to do."""
_PLAIN = "save the model without quantisation (load it where its kernels run, " \
    "model.dequantize(), save_pretrained), or give the checkpoint that it was made from"
QUANTISED = {
    "fp8": "it needs accelerate to be read",
    "bitsandbytes": "install bitsandbytes, which reads it; or " + _PLAIN,
    "compressed-tensors": "install compressed-tensors, which reads it; or " + _PLAIN,
}
"""What helps where a quantised checkpoint cannot be read, by method; else `_PLAIN`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An array as a header has it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def weighs(self) -> bool:
        """True for what may be a weight: floats that are no single number."""
        return "float" in self.dtype and self.shape != ()


def check(path: str) -> Path:
    """Return the directory of a checkpoint.

    Raises SpaError unless there is a directory with a configuration and safetensors weights.
    """
    place = Path(path)
    if not place.exists():
        raise SpaError(f"there is no model at {path!r}", why="no such file or directory",
                       fix="give zoo:NAME, a transformers directory, an .onnx file, or "
                           "package.module:factory")
    if place.is_file():
        raise SpaError(f"{path!r} is a file, not a model directory",
                       why="weights alone do not say what network they belong to",
                       fix="give the directory that holds config.json, or a factory")
    if (place / ADAPTER).is_file():
        raise _adapter(place)
    if not (place / CONFIG).is_file():
        raise _no_config(place)
    weight_files(place)
    return place


def base_of(place: Path) -> str | None:
    """Return what an adapter's directory names as its base; None for any other directory."""
    if not (place / ADAPTER).is_file() or (place / CONFIG).is_file():
        return None
    return str(read(place / ADAPTER).get("base_model_name_or_path") or "")


def _adapter(place: Path) -> SpaError:
    """The error for an adapter's directory; transformers would put it on a model beside it."""
    both = (place / CONFIG).is_file() and ((place / WEIGHTS).is_file() or (place / INDEX).is_file())
    if both:
        return SpaError(f"{str(place)!r} holds a model and an adapter",
                        why=f"{ADAPTER} lies beside {CONFIG} and weights",
                        fix="move the adapter's files to a directory of their own; give that as "
                            "--adapter, if it is to be merged")
    base = base_of(place)
    return SpaError(f"{str(place)!r} holds an adapter, not a model",
                    why=f"{ADAPTER} names {base} as its base, which is not found here" if base else
                        f"{ADAPTER} names no base",
                    fix=f"give both: spacompiler compile {base} --adapter {place} ..." if base else
                        "give the model that it was trained on, and this directory as --adapter")


def _no_config(place: Path) -> SpaError:
    for name, why, fix in OTHERS:
        if (place / name).is_file():
            return SpaError(f"{str(place)!r} holds no model of transformers", why=why, fix=fix)
    return SpaError(f"{str(place)!r} holds no model", why="there is no config.json in it",
                    fix="give a directory saved by save_pretrained, or by this compiler")


def read(file: Path) -> dict[str, Any]:
    """Return a JSON object. Raises SpaError where there is none."""
    found: dict[str, Any] = strict_json.read(
        file, {str: object}, fix="the file is damaged; copy it again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a directory's weights.

    Raises SpaError: there are none, they are pickled, one is missing, or a name leaves the
    directory.
    """
    names = weight_names(folder)
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise SpaError(f"{gone[0]} is missing", where=str(folder),
                       why=f"{INDEX} names it, and {len(gone) - 1} more that are not there",
                       fix="copy the whole directory")
    return [folder / name for name in names]


def weight_names(folder: Path) -> list[str]:
    """Return the names of the files of weights, as config and index have them.

    Raises SpaError as `weight_files` does.
    """
    named = read(folder / CONFIG).get("transformers_weights")
    first = _inside(folder, str(named)) if named else WEIGHTS
    if (folder / first).is_file() and not first.endswith(".index.json"):
        return [first]
    index = first if first.endswith(".index.json") else INDEX
    if not (folder / index).is_file():
        raise _no_weights(folder)
    places = read(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise SpaError(f"{index} cannot be read", where=str(folder),
                       why="its weight_map is no mapping of arrays to files",
                       fix="the file is damaged; copy it again")
    return sorted({_inside(folder, name) for name in places.values()})


def _no_weights(folder: Path) -> SpaError:
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    why = f"neither {WEIGHTS} nor {INDEX} is there"
    why += f", only {', '.join(others[:3])}" if others else ""
    why += f"; pickled weights ({', '.join(pickled[:3])}) are not read" if pickled else ""
    return SpaError(f"{str(folder)!r} holds no safetensors weights", why=why,
                    fix="save the model again with safe serialization" if pickled else
                        "copy the whole directory, or save the model again")


def _inside(folder: Path, name: str) -> str:
    """Return a file's name if it stays in its folder and is no pickle."""
    place = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or place.is_absolute() or ".." in place.parts or ":" in name:
        raise SpaError("a file of weights lies outside the model's directory", where=str(folder),
                       why=f"its index names {name!r}", fix="keep all weights in the directory")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise SpaError("weights are stored in a file that is not read", where=str(folder),
                       why=f"its index names {name!r}; only safetensors are read",
                       fix="save the model again with safe serialization")
    return name


def headers(folder: Path) -> dict[str, Stored]:
    """Return every stored array's shape and type, without reading any.

    Raises SpaError for a damaged file.
    """
    return {name: array for file in weight_files(folder) for name, array in header(file).items()}


def header(file: Path) -> dict[str, Stored]:
    """Return the arrays of one file. Raises SpaError if it is damaged."""
    found: dict[str, Stored] = {}
    try:
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind = part.get_dtype()
                found[name] = Stored(tuple(part.get_shape()), DTYPES.get(kind, kind.lower()))
    except Exception as problem:  # safetensors raises its own kinds
        raise SpaError(f"{file.name} cannot be read", where=str(file.parent), why=str(problem),
                       fix="copy it again: the file is damaged") from problem
    return found


def quantisation(config: Mapping[str, Any]) -> str:
    """Return how a configuration says that its weights are quantised, or ""."""
    said = config.get("quantization_config")
    if not isinstance(said, dict) or not said:
        return ""
    loads = [key for key in ("load_in_4bit", "load_in_8bit") if said.get(key)]
    return str(said.get("quant_method") or ("bitsandbytes" if loads else "an unnamed method"))


def unread(folder: Path, method: str, why: str) -> SpaError:
    """The error for a quantised checkpoint that cannot be read, or not made plain again."""
    return SpaError(f"{str(folder)!r} holds weights that are quantised ({method})", why=why,
                    fix=QUANTISED.get(method, _PLAIN))


def check_layers(config: Mapping[str, Any], arrays: int, where: str) -> None:
    """Raise SpaError for a configuration with far more layers than there are arrays."""
    for key, value in _entries(config):
        if value > max(MOST_LAYERS, arrays):
            raise SpaError(f"the configuration has {key} = {value}", where=where,
                           why=f"the weights are {arrays} arrays, and every layer has its own",
                           fix="the configuration belongs to other weights, or is damaged")


def _entries(config: Mapping[str, Any], depth: int = 8) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict) and depth:
            yield from _entries(value, depth - 1)
        elif _LAYERS.match(str(key)) and type(value) is int:
            yield key, value


def elements(arrays: Mapping[str, Stored]) -> int:
    """Return how many numbers some arrays hold."""
    return sum(math.prod(a.shape) for a in arrays.values())
