from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded

from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.errors import QConfigError
from lightning_ptq.runtime.memory import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("500MB", 500_000_000),
        (" 1.5 kib ", 1536),
        ("3KB", 3000),
        ("1gb", 10**9),
        ("10", 10),
        (7, 7),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["lots", "", "MB", "-5", -5, "5XB", "2G", "1e3", "2GiB 3", None])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(QConfigError, match=r"as a size in bytes\. Write for example '2GiB'"):
        parse_bytes(text)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_beyond_the_limit_tensors_go_to_files_and_come_back_to_memory_when_there_is_room(tmp_path):
    values = [seeded(i, 100) for i in range(4)]  # 400 bytes each
    with ActivationStore(1000, str(tmp_path)) as store:
        first, second, third = (store.put(value) for value in values[:3])
        assert (store.in_memory, store.on_disk, store.peak) == (800, 400, 800)
        assert [path.stat().st_size for path in files(tmp_path)] == [400]
        del first
        assert store.in_memory == 400
        fourth = store.put(values[3])
        assert (store.in_memory, store.on_disk) == (800, 400)
        for kept, value in zip((second, third, fourth), values[1:], strict=True):
            assert torch.equal(kept, value)
        del third
        assert (store.on_disk, files(tmp_path)) == (0, [])
        del second, fourth, kept
        assert (store.in_memory, store.peak) == (0, 800)


def test_a_tensor_that_fills_the_limit_exactly_stays_in_memory():
    with ActivationStore("400") as store:
        full = store.put(torch.zeros(100))
        more = store.put(torch.zeros(1, dtype=torch.uint8))
        assert (store.in_memory, store.on_disk) == (full.nbytes, more.nbytes)


@pytest.mark.parametrize("fails", [False, True])
def test_files_are_gone_at_the_end_and_after_an_exception(tmp_path, fails):
    def work():
        with ActivationStore(0, str(tmp_path)) as store:
            kept.append(store.put(torch.ones(5)))
            assert len(files(tmp_path)) == 1
            if fails:
                raise KeyboardInterrupt

    kept = []
    if fails:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert list(tmp_path.iterdir()) == []
    assert kept[0].sum() == 5  # still readable by who holds it
    kept.clear()  # and its release finds no file to remove


@pytest.mark.parametrize("limit", [0, "1MB"])
@pytest.mark.parametrize(
    "tensor",
    [
        seeded(0, 3, 4).t(),
        seeded(0, 5).bfloat16(),
        torch.arange(6).view(2, 3),
        torch.tensor([True, False]),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        seeded(0, 2).requires_grad_(),
    ],
    ids=["transposed", "bfloat16", "int64", "bool", "scalar", "empty", "with gradient"],
)
def test_put_copies(tmp_path, tensor, limit):
    before = tensor.detach().clone()
    with ActivationStore(limit, str(tmp_path)) as store:
        copy = store.put(tensor)
        tensor.detach().zero_()
        assert copy.dtype == before.dtype
        assert not copy.requires_grad
        assert torch.equal(copy, before)


@pytest.mark.parametrize("limit", [0, 200, "1MB"])
def test_stack_concatenates_unequal_parts_and_lets_go_of_them(tmp_path, limit):
    values = [seeded(i, rows, 2, 3) for i, rows in enumerate((4, 1, 3))]
    with ActivationStore(limit, str(tmp_path)) as store:
        parts = [store.put(value) for value in values]
        whole = store.stack(parts, torch.device("cpu"))
        assert parts == []
        assert torch.equal(whole, torch.cat(values))
        assert store.in_memory + store.on_disk == whole.nbytes


def test_a_tensor_counts_as_long_as_a_view_of_it_lives():
    with ActivationStore("1MB") as store:
        whole = store.put(seeded(0, 8, 4))
        first = whole.split(2)[0]
        expected, size = first.clone(), whole.nbytes
        del whole
        assert store.in_memory == size
        assert torch.equal(first, expected)
        del first
        assert store.in_memory == 0
