"""State trees come back exactly: containers, numbers, tensors, shared memory, layouts."""

import argparse
import enum
import json
import math
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtask.core.codec import decode, encode, tensor_names
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.plain_json import canonical_json, parse_json


def back(tree):
    node, tensors = encode(tree, "@")
    return decode(parse_json(canonical_json(node)), {name: t.contiguous() for name, t in tensors.items()})


def same(a, b):
    """Equal in type, order and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        bits = (t.detach().contiguous().reshape(-1) for t in (a, b))
        return a.numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in bits))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        factory = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return factory and same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (set, frozenset)):
        return a == b and {type(x) for x in a} == {type(x) for x in b}
    if isinstance(a, (float, np.floating)):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from([torch.float8_e5m2, torch.int64, torch.device("cpu"), torch.device("cuda:3")])
    | st.floats(width=32).map(np.float32)
    | st.integers(0, 255).map(np.uint8)
)
KEYS = st.text(max_size=4) | st.sampled_from(["$", "@", "", "a/b", "keys"]) | st.integers() | st.booleans()
KEYS |= st.tuples(st.integers(), st.text(max_size=2)) | st.none() | st.floats(allow_nan=False)


def containers(inner):
    dictionaries = st.dictionaries(KEYS, inner, max_size=4)
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(st.integers() | st.text(max_size=3), max_size=4)
        | st.frozensets(st.integers(), max_size=3)
        | dictionaries
        | dictionaries.map(OrderedDict)
        | dictionaries.map(lambda d: defaultdict(dict, d))
        | st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter)
        | st.lists(st.floats(width=32), max_size=5).map(torch.tensor)
        | st.lists(st.integers(0, 9), max_size=4).map(torch.Size)
    )


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.recursive(ATOMS, containers, max_leaves=20))
def test_any_nesting_of_supported_values_comes_back_exactly(tree):
    assert same(tree, back(tree))


def test_order_of_keys_and_types_of_keys_survive():
    tree = {"b": 1, "a": {1: "int", "1": "str", False: "bool"}, "$": {"$": "tensor", "name": "x"}, None: 0}
    assert same(tree, back(tree))
    assert list(back({"z": 0, "a": 1})) == ["z", "a"]


def test_special_numbers_survive():
    tree = [math.inf, -math.inf, math.nan, -0.0, 5e-324, 2**63, -(2**63), 10**5000, np.float16("inf"), 1e308]
    assert same(tree, back(tree))


def test_what_grows_with_the_data_is_a_tensor_and_not_json():
    tree = {
        "ints": list(range(100_000)),
        "floats": (0.1, math.nan, math.inf) * 10_000,
        "bools": [True, False] * 1000,
        "mixed": [1, 2.5, None] * 1000,
        "names": [f"train/cat/{n}.jpg" for n in range(5000)],
        "by name": {f"n{n}": n for n in range(5000)},
        "by number": dict.fromkeys(range(5000), "x"),
        "text": "ä" * 100_000,
        "rows": [{"epoch": n, "loss": (n / 3,)} for n in range(2000)],
        "unique": set(range(3000)),
        "torch": torch.get_rng_state(),
        "numpy": np.random.RandomState(1).get_state(),
    }
    node, tensors = encode(tree)
    assert len(canonical_json(node)) < 2000
    assert len(tensors) >= len(tree)
    assert same(tree, back(tree))


NUMPY = ["?", "i1", "u2", "<i8", ">i4", "f2", "f4", ">f8", "c8", "c16", "u8"]


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_arrays_and_scalars_keep_their_dtype(dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    for array in (
        values,
        values.T,
        values[::-1],
        values[:, ::2],
        values[:0],
        values[0, 0],
        np.array(1, dtype),
    ):
        assert same(array, back(array))


DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
SKIPPED = ("bits", "qint", "quint", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "float4", "bit")


def is_whole_bytes(dtype):
    name = str(dtype).removeprefix("torch.").removeprefix("u")
    return name in ("int16",) or not name.startswith((*SKIPPED, "bcomplex"))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if is_whole_bytes(d)], ids=str)
def test_tensors_of_every_dtype_keep_their_bits(dtype):
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
    values = bits.view(dtype).reshape(2, 3, 4)
    for tensor in (values, values[0, 0, 0], values[:0], values.transpose(0, 2), values[:, 1:, ::2]):
        assert same(tensor, back(tensor))


def test_gradients_and_parameters_become_plain_tensors():
    parameter = torch.nn.Parameter(torch.ones(2))
    found = back({"w": parameter, "v": torch.ones(2, requires_grad=True) * 2})
    assert type(found["w"]) is torch.Tensor
    assert not found["w"].requires_grad
    assert not found["v"].requires_grad


def test_tied_tensors_are_stored_once_and_come_back_tied():
    weight = torch.randn(4, 3)
    tree = {"a": weight, "b": [weight.detach()], "view": weight[1:], "turned": weight.t()}
    node, tensors = encode(tree)
    assert len(tensors) == 3
    found = back(tree)
    assert found["a"].data_ptr() == found["b"][0].data_ptr()
    assert all(torch.equal(x, y) for x, y in [(found["view"], weight[1:]), (found["turned"], weight.t())])
    assert set(tensor_names(node)) == set(tensors)


def test_empty_tensors_and_freed_memory_are_never_taken_for_tied():
    tree = {
        "a": torch.empty(0),
        "b": torch.empty(0, dtype=torch.int8),
        "c": [torch.randn(3) for _ in range(50)],
    }
    tree["d"] = [tuple(range(n, n + 600)) for n in range(20)]
    assert same(tree, back(tree))
    real = torch.view_as_real(torch.ones(2, dtype=torch.complex64))
    assert same([real, torch.view_as_complex(real)], back([real, torch.view_as_complex(real)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_memory_formats_come_back(dtype):
    image = torch.randn(2, 3, 4, 5).abs().to(dtype)
    last = image.contiguous(memory_format=torch.channels_last)
    video = torch.ones(2, 3, 4, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    pointwise = torch.ones(8, 3, 1, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    for tensor in (image, last, video, pointwise, image.permute(3, 0, 1, 2)):
        found = back(tensor)
        assert found.stride() == tensor.stride()
        assert same(found, tensor)
    assert back(image[:, ::2]).is_contiguous()
    assert back(image[:1].expand(4, 3, 4, 5)).is_contiguous()


def test_conjugate_and_negative_views_are_resolved():
    value = torch.randn(3, dtype=torch.complex64)
    assert torch.equal(back(value.conj()), value.conj())
    assert torch.equal(back(value.conj().imag), value.conj().imag)


def test_state_dict_keeps_the_versions_of_its_layers():
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert same(state, back(state))
    assert back(state)._metadata == state._metadata


def test_namespaces_come_back_as_namespaces():
    tree = argparse.Namespace(lr=0.1, sizes=(1, 2), inner=argparse.Namespace(a=None))
    assert back(tree) == tree


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


UNSAVABLE = [
    object(),
    Color.RED,
    Text("x"),
    len,
    torch.nn.Linear(1, 1),
    torch.ones(2).to_sparse(),
    torch.empty(2, device="meta"),
    torch.nn.parameter.UninitializedParameter(),
    np.array(["a"]),
    np.array([object()]),
    np.datetime64("2020-01-01"),
    {torch.ones(1): 1},
    {Color.RED: 1},
    defaultdict(lambda: 1),
]


@pytest.mark.parametrize("value", UNSAVABLE, ids=lambda value: type(value).__name__)
def test_anything_else_is_an_error_that_names_the_place(value):
    with pytest.raises(UsageError, match=r"^callback 'EarlyStopping' key 'best' key 0") as caught:
        encode({"callbacks": {"EarlyStopping": {"best": [value]}}})
    assert caught.value.fix


def test_too_deep_and_cyclic_state_is_an_error():
    deep = []
    for _ in range(27):
        deep = [deep]
    assert same(deep, back(deep))
    with pytest.raises(UsageError, match="nested too deeply"):
        encode([[deep]])
    cycle = {}
    cycle["self"] = cycle
    with pytest.raises(UsageError, match="nested too deeply"):
        encode(cycle)


def test_the_deepest_tree_stays_within_64_levels_of_json():
    tree = np.asfortranarray(np.ones((2, 2), np.complex64))
    for _ in range(27):
        tree = OrderedDict([(1, tree)])
    text = canonical_json(encode(tree)[0])
    depth = most = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        most = max(most, depth)
    assert most <= 61
    assert same(back(tree), tree)


def test_keys_that_would_share_a_name_get_their_own():
    tree = {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "": torch.ones(2),
        "__metadata__": torch.ones(3),
    }
    tensors = encode(tree)[1]
    assert len(tensors) == 4
    assert "__metadata__" not in tensors
    assert same(tree, back(tree))
    json.dumps(list(encode({"\ud800": torch.ones(1)})[1])).encode().decode()


T = {"t": torch.arange(4.0), "s": torch.tensor(1), "u": torch.tensor([255, 1], dtype=torch.uint8)}
MALFORMED = [
    {"$": "tensor", "name": "missing"},
    {"$": "tensor", "name": ["t"]},
    {"$": "tensor"},
    {"$": "tensor", "name": "t", "strides": [2]},
    {"$": "tensor", "name": "t", "strides": [-1]},
    {"$": "tensor", "name": "t", "strides": [1, 1]},
    {"$": "tensor", "name": "t", "dtype": "nn"},
    {"$": "tensor", "name": "t", "dtype": "float8_e8m0fnu"},
    {"$": "tensor", "name": "t", "dtype": "complex128"},
    {"$": "object", "class": "os.system"},
    {"$": []},
    {"$": "dict", "keys": [1, 1], "values": [1, 2]},
    {"$": "dict", "keys": [1], "values": []},
    {"$": "dict", "keys": [[]], "values": [0]},
    {"$": "dict", "keys": "ab", "values": [0, 1]},
    {"$": "default", "factory": "eval", "keys": [], "values": []},
    {"$": "float", "text": "1e3"},
    {"$": "int", "hex": "zz"},
    {"$": "complex", "parts": [1]},
    {"$": "scalar", "dtype": "O", "value": 1},
    {"$": "scalar", "dtype": "<u1", "value": 300},
    {"$": "array", "name": "t", "array": "O"},
    {"$": "dtype", "text": "load"},
    {"$": "device", "text": "nowhere"},
    {"$": "json", "name": "u"},
    {"$": "text", "name": "u"},
    {"$": "numbers", "name": "s"},
    {"$": "set", "items": [[]]},
    {"$": "size", "items": ["a"]},
]


@pytest.mark.parametrize("node", MALFORMED, ids=lambda node: json.dumps(node)[:50])
def test_malformed_json_is_refused(node):
    with pytest.raises(IntegrityError):
        decode([node], T)


def test_deep_json_is_refused():
    with pytest.raises(IntegrityError, match="nested deeper than 64"):
        decode(json.loads("[" * 100 + "]" * 100), {})
    with pytest.raises(IntegrityError):
        parse_json("[" * 100_000)


@pytest.mark.parametrize("text", ['{"a":1,"a":1}', "NaN", "[Infinity]", "1e999", "", "{", "9" * 5000, b"\xff"])
def test_json_that_python_forgives_is_refused(text):
    with pytest.raises(IntegrityError):
        parse_json(text)
