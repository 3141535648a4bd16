from __future__ import annotations

import threading
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build, same_state, seeded, state
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import default_collate

from lightning_ptq import calibrate
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.batches import Batches, merge_batches
from lightning_ptq.calibration.forward import default_forward
from lightning_ptq.calibration.sample_lists import SampleList
from lightning_ptq.callbacks.trainer.resuming import fingerprint
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.statistics.acceptance import split_samples

META = torch.device("meta")


class Encoding(UserDict):
    """As a tokenizer's BatchEncoding: attributes are entries, and ``to`` works in place."""

    def __getattr__(self, name):
        if name in self.__dict__.get("data", ()):
            return self.data[name]
        raise AttributeError(name)

    def to(self, device):
        for key, value in self.data.items():
            self.data[key] = value.to(device)
        return self


class TensorMap(Mapping):
    """As a TensorDict: a mapping with a batch size, whose entries have to be on its own device."""

    def __init__(self, entries, batch_size):
        self.entries, self.batch_size = entries, torch.Size(batch_size)

    def __getitem__(self, key):
        return self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return self.batch_size[0] if self.batch_size else 0

    def to(self, device):
        return TensorMap({key: value.to(device) for key, value in self.entries.items()}, self.batch_size)


class Graphs:
    """As a batch of graphs: the length is the number of attributes, and ``to`` works in place."""

    def __init__(self, num_graphs):
        self.x, self.parts, self.num_graphs = torch.ones(9, 2), {"edges": torch.zeros(2, 5)}, num_graphs

    def __len__(self):
        return 3

    def to(self, device):
        self.x = self.x.to(device)
        for key in self.parts:
            self.parts[key] = self.parts[key].to(device)


class Sized:
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


class Picture:
    """As an image of PIL: it has a size but no length."""

    def __init__(self, name):
        self.name = name


class Graph:
    """As a single graph: the length is the number of attributes."""

    def __init__(self, nodes):
        self.x, self.num_nodes = torch.ones(nodes, 2), nodes

    def __len__(self):
        return 2

    def to(self, device):
        self.x = self.x.to(device)
        return self


class Own:
    """A batch of the user's own class, which refers to itself."""

    def __init__(self, **attributes):
        vars(self).update(attributes, me=self, others=[self])

    def to(self, device):
        return Own(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


@dataclass
class Pair:
    x: Tensor
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "total", self.x.sum(1))


@dataclass
class Known:
    x: Tensor
    batch_size: int


Named = namedtuple("Named", ["x", "y"])
Target = namedtuple("Target", ["boxes"])


def tensor(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)


def target(boxes):
    return {"boxes": tensor(boxes, 4), "id": torch.tensor(boxes)}


X, Y = tensor(4, 3), tensor(4)
PHOTOS = [tensor(3, 32, 32), tensor(3, 40, 40)]
TARGETS = [target(2), target(5)]
TRANSPARENT = [tensor(4, 32, 32), tensor(4, 40, 40)]
WAVES = [tensor(9), tensor(7), tensor(8)]
SPARSE = torch.eye(5).to_sparse()
PACKED = pack_sequence([tensor(3, 2), tensor(1, 2)])


def shown(value: Any, lists: tuple[type, ...] = ()) -> Any:
    """Types, structure, devices and values, to compare; of ``lists``, not the types."""
    kind = "list" if isinstance(value, lists) else type(value).__name__
    if isinstance(value, Tensor):
        values = None if value.is_meta else value.to_dense().tolist()
        return kind, value.device.type, str(value.layout), tuple(value.shape), values
    if isinstance(value, Mapping):
        return kind, [(key, shown(entry, lists)) for key, entry in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return kind, [shown(entry, lists) for entry in value]
    return (kind, shown(vars(value), lists)) if hasattr(value, "__dict__") else value


def entries(value: Any) -> Any:
    """What is in lists and tuples, of whatever class: one that was cut is of a class of its own."""
    return shown(value, (list, tuple))


def tensors(value: Any) -> list[Tensor]:
    """All that can be moved: the batch sizes of a packed sequence cannot."""
    if isinstance(value, (Tensor, PackedSequence)):
        return [value if isinstance(value, Tensor) else value.data]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, deque)) else ()
    inside = [*inside, *vars(value).values()] if hasattr(value, "__dict__") else inside
    return [leaf for entry in inside for leaf in tensors(entry)]


U8, LONG, DOUBLE = torch.uint8, torch.int64, torch.float64
LOW, LONGER = (3, 9, 9), (3, 8, 9)
# The batch, its number of samples, and its second sample if it can be taken.
KINDS: dict[str, tuple[Any, int, Any]] = {
    "tensor": (X, 4, X[1:2]),
    "tuple": ((X, Y), 4, (X[1:2], Y[1:2])),
    "list": ([X, Y], 4, [X[1:2], Y[1:2]]),
    "unequal tensors": ((X, tensor(5)), 4, None),
    "scalar tensor first": ((torch.tensor(7.0), X), 4, None),
    "number first": ([1, X], 4, None),
    "None": ((X, None), 4, None),
    "dict": ({"y": Y, "x": {"a": X}}, 4, {"y": Y[1:2], "x": {"a": X[1:2]}}),
    "ordered dict": (OrderedDict(b=X, a=Y), 4, OrderedDict(b=X[1:2], a=Y[1:2])),
    "default dict": (defaultdict(list, a=X), 4, defaultdict(list, a=X[1:2])),
    "read-only mapping": (MappingProxyType({"a": X}), 4, MappingProxyType({"a": X[1:2]})),
    "deque": (deque([X, Y], maxlen=3), 4, deque([X[1:2], Y[1:2]], maxlen=3)),
    "encoding": (Encoding(ids=X, mask=Y), 4, Encoding(ids=X[1:2], mask=Y[1:2])),
    "named tuple": (Named(X, [Y]), 4, Named(X[1:2], [Y[1:2]])),
    "dataclass": (Pair(X, (Y,)), 4, Pair(X[1:2], (Y[1:2],))),
    "frozen dataclass": (Frozen(X), 4, Frozen(X[1:2])),
    "dataclass with a batch size": (Known(torch.tensor(1.0), 6), 6, None),
    "batch size and rows that differ": (Known(X, 6), 6, None),
    "tensor dict": (TensorMap({"x": tensor(2, 3)}, [2]), 2, None),
    "tensor dict without batch size": (TensorMap({"x": X}, []), 4, None),
    "graphs": (Graphs(6), 6, None),
    "graphs first": ((Graphs(6), X), 6, None),
    "object with a length": ([Sized(5), 1], 5, None),
    "sparse": ((SPARSE, X), 4, None),
    "only sparse": ({"x": SPARSE, "n": 1}, 5, None),
    "packed": (PACKED, 2, None),
    "packed first": ((PACKED, tensor(2)), 2, None),
    "strings": (["a", "b", "c"], 3, ["b"]),
    "strings first": ((["a", "b"], tensor(2)), 2, (["b"], tensor(2)[1:])),
    "collated strings": (default_collate([(torch.ones(3), "a")] * 4), 4, [torch.ones(1, 3), ["a"]]),
    "collated pairs of strings": (default_collate([("a", "b")] * 3), 3, [["a"], ["b"]]),
    "collated pairs": (
        default_collate([((torch.ones(3), torch.zeros(3)), "a")] * 2),
        2,
        [[torch.ones(1, 3), torch.zeros(1, 3)], ["a"]],
    ),
    "collated dicts": (default_collate([({"a": torch.ones(3)},) * 2] * 4), 4, [{"a": torch.ones(1, 3)}] * 2),
    "photos": (PHOTOS, 2, PHOTOS[1:]),
    "one photo": (PHOTOS[:1], 1, []),
    "photos of one size": ([PHOTOS[0]] * 4, 4, PHOTOS[:1]),
    "bytes of photos": ([tensor(1, 6, 6, dtype=U8), tensor(1, 5, 5, dtype=U8)], 2, [tensor(1, 5, 5, dtype=U8)]),
    **{
        name: (planes, len(planes[0]), type(planes)(p[1:2] for p in planes))
        for name, planes in {
            "small planes of one size": [tensor(3, 7, 8)] * 2,
            "gray planes of one size": [tensor(1, 32, 32)] * 2,
            "integer planes": [tensor(*LOW, dtype=LONG), tensor(*LONGER, dtype=LONG)],
            "planes of two types": [tensor(*LOW), tensor(*LONGER, dtype=DOUBLE)],
            "sequences of two lengths": [tensor(3, 96, 7), tensor(3, 24, 7)],
            "four channels": [tensor(4, 96, 9), tensor(4, 24, 8)],
            "two channels": [tensor(2, 9, 9), tensor(2, 8, 9)],
            "tuple of two photos": tuple(PHOTOS),
        }.items()
    },
    "planes of unequal channels": ([tensor(3, 9, 9), tensor(1, 9, 9)], 3, None),
    "photos and targets": ((PHOTOS, TARGETS), 2, (PHOTOS[1:], TARGETS[1:])),
    "transposed": (tuple(zip(*zip(PHOTOS, TARGETS, strict=True), strict=True)), 2, (PHOTOS[1:], TARGETS[1:])),
    "photos and labels": ([PHOTOS, tensor(2)], 2, [PHOTOS[1:], tensor(2)[1:]]),
    "photos by name": ({"image": PHOTOS, "label": [3, 4]}, 2, {"image": PHOTOS[1:], "label": [4]}),
    "too few targets": ((PHOTOS, TARGETS[:1]), 2, None),
    "stacked photos and targets": ((tensor(2, 3, 9, 9), TARGETS), 2, (tensor(2, 3, 9, 9)[1:], TARGETS[1:])),
    "two targets of two boxes": ((tensor(2, 5), [target(2)] * 2), 2, (tensor(2, 5)[1:], [target(2)])),
    "dicts of two rows": (
        (tensor(2, 5), [{"a": tensor(2, 4)}, {"a": tensor(2, 3)}]),
        2,
        (tensor(2, 5)[1:], [{"a": tensor(2, 4)[1:]}, {"a": tensor(2, 3)[1:]}]),
    ),
    "targets in named tuples": (
        (tensor(2, 5), [Target(tensor(2, 4)), Target(tensor(1, 4))]),
        2,
        (tensor(2, 5)[1:], [Target(tensor(1, 4))]),
    ),
    "dicts of samples": ([{"image": image, "id": 3} for image in PHOTOS], 2, [{"image": PHOTOS[1], "id": 3}]),
    "samples": ([(image, 3) for image in PHOTOS], 2, [(PHOTOS[1], 3)]),
    "lists in lists": ((tensor(2, 3), [["a", "b"], ["c", "d"]]), 2, None),
    "transparent photos": (TRANSPARENT, 2, TRANSPARENT[1:]),
    "waves": (WAVES, 3, WAVES[1:2]),
    "waves of whole numbers": ([wave.short() for wave in WAVES], 3, [WAVES[1].short()]),
    "waves in two channels": ([tensor(2, 5000), tensor(2, 4000)], 2, [tensor(2, 4000)]),
    "waves and labels": ((WAVES, tensor(3)), 3, (WAVES[1:2], tensor(3)[1:2])),
    "waves transposed": ((tuple(WAVES), ("a", "b", "c")), 3, ((WAVES[1],), ("b",))),
    "sequences of vectors": ([tensor(5, 2), tensor(4, 2)], 2, [tensor(4, 2)]),
    "features of two widths": ([tensor(2, 500), tensor(2, 400)], 2, [tensor(2, 500)[1:], tensor(2, 400)[1:]]),
    "tokens and offsets": ([tensor(3, dtype=LONG), tensor(9, dtype=LONG), tensor(3, dtype=LONG)], 3, None),
    "one wave": (WAVES[:1], 9, [WAVES[0][1:2]]),
    "two waves": ((WAVES[0], WAVES[1]), 9, None),
    "pictures": ([Picture("a"), Picture("b")], 2, [Picture("b")]),
    "pictures and labels": (([Picture("a"), Picture("b")], tensor(2)), 2, ([Picture("b")], tensor(2)[1:])),
    "records of pictures": ([{"image": Picture(name)} for name in "abc"], 3, [{"image": Picture("b")}]),
    "a list of graphs": ([Graph(3), Graph(5)], 2, [Graph(5)]),
    "one graph": (Graph(7), 1, None),
    "batches of graphs": ([Graphs(6), Graphs(6)], 6, None),
    "objects of two classes": ([Picture("a"), X], 4, None),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_samples_are_counted(kind):
    data, samples, _ = KINDS[kind]
    assert Batch(data).samples == samples


@each_kind
def test_some_samples_can_be_taken_or_the_batch_is_not_divisible(kind):
    data, _, second = KINDS[kind]
    assert Batch(data).is_divisible == (second is not None)
    if second is None:
        with pytest.raises(CalibrationError, match="cannot divide"):
            Batch(data).rows(slice(1, 2))
    else:
        assert entries(Batch(data).rows(slice(1, 2))) == entries(second)


def test_a_part_of_a_list_of_samples_is_read_as_one_where_its_content_does_not_show_it():
    gray = [tensor(1, side, side) for side in (5, 6, 6)]
    for data in (gray, (tuple(gray), ("a", "b", "c")), [{"image": image} for image in gray]):
        part = Batch(data).rows(slice(1, 3))
        assert Batch(part).samples == 2
        assert entries(Batch(part).rows(slice(0, 1))) == entries(Batch(data).rows(slice(1, 2)))
        assert Batch(Batch(part).to(torch.device("cpu"))).samples == Batch(Batch(part).copy()).samples == 2
    assert Batch(gray[1:]).samples == 1


@each_kind
def test_everything_is_moved_and_the_users_object_is_not(kind):
    data, samples, _ = KINDS[kind]
    before = shown(data)
    moved = Batch(data).to(META)
    assert [leaf.device for leaf in tensors(moved)] == [META] * len(tensors(data))
    assert type(moved) is type(data)
    assert Batch(moved).samples == samples
    assert shown(data) == before
    assert shown(Batch(data).to(torch.device("cpu"))) == before


@each_kind
def test_a_copy_is_equal_and_shares_no_container(kind):
    data = KINDS[kind][0]
    before = shown(data)
    copied = Batch(data).copy()
    assert shown(copied) == before
    if isinstance(copied, (list, deque, dict, UserDict)):
        copied.clear()
    elif isinstance(copied, Pair):
        copied.x = None
    assert shown(data) == before


def test_a_copy_leaves_behind_the_storage_that_a_tensor_is_a_view_of():
    view = tensor(100, 10)[3:5]
    for copied in (Batch(view).copy(), Batch({"a": [view]}).copy()["a"][0], Batch(Pair(view, 1)).copy().x):
        assert torch.equal(copied, view)
        assert copied.untyped_storage().nbytes() == 2 * 10 * 4
        copied.zero_()
        assert view.sum() > 0


def test_sparse_tensors_and_objects_are_copied_too():
    graphs = Graphs(6)
    sparse, copied, packed = Batch([SPARSE, graphs, PACKED]).copy()
    copied.x.zero_(), sparse.mul_(2), packed.data.zero_()
    assert shown(graphs) == shown(Graphs(6))
    assert SPARSE.to_dense().sum() == 5
    assert PACKED.data.sum() > 0


NOTHING_TO_COUNT = [
    *(None, 3, "text", b"text", torch.tensor(3.0), object()),
    *([], (), {}, deque(), Encoding(), [[]], ([], []), {"a": []}, [{}], [1, 2], [None], ("a", 1)),
    *(Named(1, 2), TensorMap({}, [])),
]


@pytest.mark.parametrize("data", NOTHING_TO_COUNT, ids=lambda data: type(data).__name__)
def test_a_batch_without_anything_to_count_is_an_error_that_names_its_type(data):
    with pytest.raises(CalibrationError, match=f"of type {type(data).__name__} holds no tensor or list with samples"):
        _ = Batch(data).samples
    with pytest.raises(CalibrationError, match="holds no tensor"):
        calibrate(nn.Sequential(nn.Linear(3, 2)), [data], "w4a4", forward=lambda module, batch: module(X))


def test_leaves_are_those_of_all_containers_in_order():
    data = {"b": [X, (1, "text")], "a": Pair(Y, None), "c": deque([Encoding(z=2.5)])}
    assert [shown(leaf) for leaf in Batch(data).leaves()] == [shown(leaf) for leaf in (X, 1, "text", Y, None, 2.5)]


def checksum(data: Any) -> str:
    calibration = calibrate(build(Linear), [X], "w8a8")
    calibration.batches = Batches([data])
    return fingerprint(calibration)


class Linear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def long_array(value):
    array = tensor(5000).numpy()
    array[2500] = value
    return array


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda value: [X * value], (1, 2)),
        (lambda value: (X, torch.eye(5).mul(value).to_sparse()), (1, 2)),
        (lambda value: (X, torch.eye(5).mul(value).to_sparse_csr()), (1, 2)),
        (lambda value: pack_sequence([tensor(3) * value, tensor(2)]), (1, 2)),
        (lambda value: Graphs(value), (1, 2)),
        (lambda value: TensorMap({"x": X * value}, [4]), (1, 2)),
        (lambda value: (X, long_array(value)), (1, 2)),
        (lambda value: (X, value), (len, max)),
    ],
    ids=["tensor", "sparse", "compressed", "packed", "object", "tensor map", "array", "function"],
)
def test_the_fingerprint_of_equal_batches_is_equal_and_of_others_another(make, values):
    first, again, other = (checksum(make(value)) for value in (values[0], *values))
    assert first == again != other


class Listening(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


PASSED_ON = {
    "the first entry": "tuple, list, packed first, photos and targets, transposed, named tuple, tuple of two photos,"
    " collated pairs, collated dicts, gray planes of one size, waves and labels, features of two widths",
    "keywords": "dict, ordered dict, encoding, read-only mapping, photos by name",
    "the whole": "tensor, photos, photos of one size, bytes of photos, strings, packed, dataclass, frozen dataclass,"
    " tensor dict, graphs, dicts of samples, waves, transparent photos, pictures, a list of graphs",
}


@pytest.mark.parametrize(
    ("kind", "given"), [(kind, given) for given, kinds in PASSED_ON.items() for kind in kinds.split(", ")]
)
def test_the_default_forward_passes_on_the_inputs(kind, given):
    data = KINDS[kind][0]
    args, kwargs = default_forward(Listening(), data)
    if given == "keywords":
        assert args == ()
        assert shown(kwargs) == shown(dict(data))
    else:
        assert kwargs == {}
        assert len(args) == 1
        assert args[0] is (data if given == "the whole" else data[0])


@pytest.mark.parametrize("empty", [(), []], ids=repr)
def test_the_default_forward_on_an_empty_batch_is_an_error(empty):
    with pytest.raises(CalibrationError, match=f"is an empty {type(empty).__name__}, so there is no input"):
        default_forward(Listening(), empty)


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: dict[int, Any]) -> None:
        self.rank, self.world, self.meeting, self.table = rank, meeting.parties, meeting, table

    def gather(self, value):
        self.table[self.rank] = value
        self.meeting.wait()
        gathered = [self.table[rank] for rank in range(self.world)]
        self.meeting.wait()
        return gathered


def merged(by_rank: list[list[Any]]) -> list[list[Any]]:
    """The batches that each rank has after the exchange."""
    meeting, table, results = threading.Barrier(len(by_rank)), {}, {}

    def exchange(rank):
        try:
            batches = Batches(by_rank[rank])
            whole, traces = merge_batches(ThreadRanks(rank, meeting, table), batches, [Trace()] * len(batches))
            results[rank] = (list(whole), len(traces))
            whole.clear()
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(len(by_rank))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank][1] for rank in range(len(by_rank))] == [len(results[0][0])] * len(by_rank)
    return [results[rank][0] for rank in range(len(by_rank))]


def dealt(samples: list[Any], world: int, collate: Any, size: int) -> list[list[Any]]:
    """Batches of each rank, as a DistributedSampler deals samples."""
    own = [samples[rank::world] for rank in range(world)]
    return [[collate(of_rank[i : i + size]) for i in range(0, len(of_rank), size)] for of_rank in own]


IMAGES = [tensor(3, 8 + i, 8 + i) + i for i in range(7)]
COLLATE = {
    "tensors": lambda indices: [torch.stack([X[0] + i for i in indices]), torch.tensor(indices)],
    "encoding": lambda indices: Encoding(ids=torch.stack([X[0] + i for i in indices])),
    "images": lambda indices: [IMAGES[i] for i in indices],
    "images and targets": lambda indices: ([IMAGES[i] for i in indices], [target(i) for i in indices]),
    "tuples of images and texts": lambda indices: (tuple(IMAGES[i] for i in indices), tuple(map(str, indices))),
}


@pytest.mark.parametrize("name", COLLATE)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_batches_of_a_single_process(name, world):
    [alone] = dealt(list(range(7)), 1, COLLATE[name], 2)
    for batches in merged(dealt(list(range(7)), world, COLLATE[name], 2)):
        assert entries(batches) == entries(alone)


def test_batches_that_do_not_fit_together_are_taken_in_turn():
    def padded(indices):
        return torch.ones(len(indices), indices[-1] + 2)

    by_rank = dealt(list(range(7)), 2, padded, 2)
    (a, c), (b, d) = by_rank
    assert {batch.shape for batch in (a, b)} == {(2, 4), (2, 5)}
    for batches in merged(by_rank):
        assert entries(batches) == entries([a, b, c, d])


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Detector(nn.Module):
    """Takes a list of images."""

    def __init__(self):
        super().__init__()
        self.net = Convolutions()

    def forward(self, images):
        assert isinstance(images, list)
        return torch.cat([self.net(image[None]).mean((2, 3)) for image in images])


PICTURES = [seeded(i, 3, 8 + i, 8 + i) * (i + 1) for i in range(5)]


@pytest.mark.parametrize("collate", [lambda p: p, lambda p: (p, [{"id": 1}] * len(p))], ids=["images", "with targets"])
@pytest.mark.parametrize("sizes", [[5], [2, 3], [4, 1]], ids=str)
def test_all_images_of_a_list_are_calibrated_on(sizes, collate):
    one_by_one = calibrate(build(Detector), [[picture] for picture in PICTURES], "w4a4", forward=lambda m, x: m(x))
    parts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [collate(PICTURES[start : start + size]) for start, size in zip(parts, sizes, strict=True)]
    by_default = calibrate(build(Detector), batches, "w4a4")

    def forward(module, batch):
        images = batch[0] if isinstance(batch, tuple) else batch
        return [module.net(image[None]) for image in images]

    by_function = calibrate(build(Detector), batches, "w4a4", forward=forward)
    for calibration in (by_default, by_function):
        assert calibration.samples == 5
        assert [Batch(batch).samples for batch in calibration.batches] == sizes
        assert same_state(state(calibration.module), state(one_by_one.module))
    only_first = calibrate(build(Detector), [PICTURES[:1]], "w4a4")
    assert not same_state(state(only_first.module), state(one_by_one.module))


def test_images_of_one_batch_can_be_held_out():
    calibration = calibrate(build(Detector), [PICTURES], "w4a4")
    tune, rest = split_samples(calibration, 0.4, 0)
    assert (tune.samples, rest.samples) == (3, 2)
    assert entries([*tune.batches[0], *rest.batches[0]]) == entries(PICTURES)
    assert torch.equal(torch.cat([tune.run(0), rest.run(0)]), calibration.run(0))


class OnPacked(nn.Sequential):
    def forward(self, packed):
        assert isinstance(packed, PackedSequence)
        return super().forward(packed.data)


def test_packed_sequences_are_calibrated_on_whole():
    calibration = calibrate(
        build(lambda: OnPacked(nn.Linear(2, 3), nn.Linear(3, 2))), [PACKED, (PACKED, Y[:2])], "w8a8"
    )
    assert calibration.samples == 4
    assert calibration.run(0).shape == (4, 2)


@pytest.mark.parametrize("columns", [((48, 8), (48, 8)), ((48, 8), (24, 5)), ((32, 8), (32, 32)), ((48, 5), (48, 5))])
@pytest.mark.parametrize("rows", [1, 3, 4, 32])
def test_columns_of_sequences_are_no_images_whatever_their_number_of_rows(columns, rows):
    batch = Batch([tensor(rows, *shape) for shape in columns])
    assert batch.samples == rows
    assert len(batch.rows(slice(0, 1))[1]) == 1


def test_a_batch_of_no_rows_counts_as_none():
    assert Batch(torch.zeros(0, 3)).samples == 0
    net, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.ones(4, 3)
    assert calibrate(net, [x, x[:0]], "w4a8").samples == 4


BYTES = np.zeros((32, 32, 3), np.uint8)
# The batch, its number of samples, and whether it can be divided.
ARRAYS = {
    "columns": ([np.ones((4, 3)), np.ones(4)], 4, True),
    "by name": ({"x": np.ones((4, 3)), "y": tensor(4)}, 4, True),
    "pictures": ([BYTES, BYTES], 2, True),
    "pictures of two sizes": ([BYTES, BYTES[:20]], 2, True),
    "pictures of fractions": ([BYTES / 255, BYTES / 255], 2, True),
    "channels first": ([np.zeros((3, 32, 32)), np.zeros((3, 40, 40))], 2, True),
    "pictures and labels": (([BYTES, BYTES], tensor(2)), 2, True),
    "records": ([{"image": BYTES, "boxes": np.zeros((boxes, 4))} for boxes in (1, 2, 3)], 3, True),
    "waves": ([np.zeros(9), np.zeros(8)], 2, True),
    "sequences": ([np.zeros((4, 20, 3)), np.zeros((4, 9, 3))], 4, True),
    "without dimensions": ([np.array(3.0), tensor(4)], 4, False),
    "bare": (np.zeros((4, 2)), 4, True),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_counted_and_cut(kind):
    data, samples, divisible = ARRAYS[kind]
    batch = Batch(data)
    assert (batch.samples, batch.is_divisible) == (samples, divisible)
    if divisible:
        part = Batch(batch.rows(slice(1, 2)))
        assert part.samples == 1
        assert [type(column) for column in part.columns()] == [
            SampleList if isinstance(column, (list, tuple)) else type(column) for column in batch.columns()
        ]


def test_arrays_of_several_ranks_are_joined():
    def collate(indices):
        return {"x": np.array(indices, float), "y": torch.tensor(indices)}

    [alone] = dealt(list(range(7)), 1, collate, 2)
    for batches in merged(dealt(list(range(7)), 2, collate, 2)):
        assert [batch["x"].tolist() for batch in batches] == [batch["x"].tolist() for batch in alone]
        assert [batch["y"].tolist() for batch in batches] == [batch["y"].tolist() for batch in alone]


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (Own(name="train", x=X, y=tensor(5)), 4),
        (Own(parts={"a": [tensor(6, 2)]}), 6),
        ((Own(x=X), tensor(4)), 4),
        ({"batch": Own(table=np.ones((3, 2)))}, 3),
    ],
)
def test_objects_are_counted_by_their_attributes(data, samples):
    assert Batch(data).samples == samples
    assert not Batch(data).is_divisible


def test_an_object_with_nothing_to_count_is_an_error():
    with pytest.raises(CalibrationError, match="of type Own holds no tensor"):
        _ = Batch(Own(name="train")).samples


class Listed(nn.Module):
    """Takes a list of waves, arrays or graphs, and calls its net on each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, items):
        assert isinstance(items, list)
        return torch.stack([self.net(getattr(item, "x", item)).mean(0) for item in items])


@pytest.mark.parametrize(
    "make",
    [lambda rows: seeded(rows, rows, 2), lambda rows: graph_of(seeded(rows, rows, 2))],
    ids=["signals", "graphs"],
)
def test_all_of_a_list_is_calibrated_on(make):
    items = [make(rows) for rows in (3, 5, 4)]
    by_list = calibrate(build(Listed), [items], "w4a4")
    by_step = calibrate(build(Listed), [[item] for item in items], "w4a4", forward=lambda net, batch: net(batch))
    assert by_list.samples == 3
    assert same_state(state(by_list.module), state(by_step.module))


def graph_of(x):
    graph = Graph(len(x))
    graph.x = x
    return graph


@pytest.mark.parametrize("with_targets", [False, True])
def test_images_of_one_size_that_are_not_square_are_counted(with_targets):
    images = [seeded(i, 3, 48, 64) for i in range(4)]
    batch = Batch((images, [{"boxes": torch.zeros(3, 4)}] * 4) if with_targets else images)
    assert batch.samples == 4
    assert Batch([images[0]]).samples == 3  # one tensor: the column of a batch
