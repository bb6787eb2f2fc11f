"""Arrays that lie in files: written as the library writes them, let go of, and never lost."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spacompiler.store import tensors_file
from spacompiler.store.arrays import same_bits
from spacompiler.store.mapped import let_go
from spacompiler.store.room import Room
from spacompiler.system.pages import give_back

linux = pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="no such file here")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_written_byte_for_byte_as_the_library_does(tmp_path, metadata):
    kinds = (torch.float32, torch.bool, torch.bfloat16, torch.int64, torch.float16, torch.uint8,
             torch.int8, torch.float64, torch.int32, torch.int16)
    arrays = {f"{'zéa'[i % 3]}.{i}": (torch.arange(6).reshape(2, 3) + i).to(kind)
              for i, kind in enumerate(kinds)}
    arrays |= {"scalar": torch.tensor(3.0), "more.1": torch.ones(5), "more.10": torch.ones(7)}
    save_file(arrays, tmp_path / "theirs", metadata=metadata)
    tensors_file.write(arrays, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def _resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) << 10 for row in file if row.startswith("VmRSS"))


@linux
def test_what_a_file_shows_is_let_go_and_what_was_written_to_stays(tmp_path):
    values = torch.randn(1 << 22)
    save_file({"a": values}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        array = file.get_tensor("a")
    array.sum()
    before = _resident()
    let_go([array])
    assert before - _resident() > 0.9 * array.nbytes
    assert torch.equal(array, values)
    array[7] = 3.0
    assert not give_back(array.data_ptr(), array.nbytes)
    assert array[7] == 3.0
    assert not give_back(values.data_ptr(), values.nbytes)


@linux
def test_room_on_the_disk_holds_values_without_memory_and_leaves_nothing(tmp_path):
    made = Room(tmp_path / "not there" / "out").empty((1024, 2048), torch.bfloat16)
    made.copy_(torch.ones(1024, 1).expand(1024, 2048))
    before = _resident()
    let_go([made])
    assert before - _resident() > 0.9 * made.nbytes
    assert bool((made == 1).all())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (8,), (1,), (), (0, 3)])
def test_arrays_are_the_same_if_all_their_bits_are(kind, shape):
    one = torch.ones(shape).to(kind)
    assert same_bits(one, one.clone())
    for at in range(one.numel()):
        other = one.clone()
        other.view(-1)[at] = 0
        assert not same_bits(one, other) and not same_bits(other, one)


def test_arrays_of_another_type_or_shape_or_that_lie_apart():
    one = torch.arange(24).reshape(4, 6)
    assert not same_bits(one, one.int()) and not same_bits(one, one.reshape(6, 4))
    assert same_bits(one.t(), one.t().contiguous())
    bytes_ = one.to(torch.int8).reshape(-1)[1:9]
    assert same_bits(bytes_, bytes_.clone())
    nothing = torch.full((9,), torch.nan, dtype=torch.bfloat16)
    assert same_bits(nothing, nothing.clone())
