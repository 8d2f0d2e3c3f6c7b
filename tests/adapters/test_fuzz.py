"""Any bytes in the place of an adapter's files: refused as they should be, or read as an independent reader reads them.

`fuzz.py` runs the same targets for as long as one likes, guided by coverage.
"""

import dataclasses
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_files import CONFIG, LAYERS, factors, safetensors_bytes
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.files.strict_json import loads
from swaplora_adapters.files.tensorfile import read_header, read_tensors
from swaplora_adapters.intake import inspect_files

MAX_BYTES = 1 << 16
MEMORY_PER_BYTE = 64  # of a JSON text: an empty object of two characters is one of 64 bytes
MEMORY_FLOOR = 2 << 20  # of which the digest reads into one
TENSORS = factors()
SOUND_CONFIG = json.dumps(CONFIG).encode()
SOUND_WEIGHTS = safetensors.torch.save(TENSORS)
DATA_START = 8 + int.from_bytes(SOUND_WEIGHTS[:8], "little")
SOUND_HEADER = SOUND_WEIGHTS[8:DATA_START]
NAMES = list(TENSORS)
Target = Callable[[Path, bytes], bool]


def weights_target(folder: Path, raw: bytes) -> bool:
    """Whether the bytes are read as a safetensors file, which the safetensors library must then read alike."""
    path = folder / WEIGHTS_FILE
    path.write_bytes(raw)
    try:
        found = read_tensors(path, read_header(path))
    except AdapterError:
        return False
    expected = safetensors.torch.load(raw)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    return True


def header_target(folder: Path, raw: bytes) -> bool:
    """The same for a header's bytes, before the data of the sound file."""
    return weights_target(folder, safetensors_bytes(raw, SOUND_WEIGHTS[DATA_START:]))


def json_target(_folder: Path, raw: bytes) -> bool:
    """Whether the bytes are read as JSON, which the standard library must then read alike."""
    try:
        value = loads(raw, what="the text", max_bytes=MAX_BYTES, max_depth=16)
    except AdapterError:
        return False
    assert value == json.loads(raw, object_pairs_hook=distinct)
    return True


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys may come twice."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def config_target(folder: Path, raw: bytes) -> bool:
    """Whether the bytes are let in as the config of the sound weights."""
    (folder / CONFIG_FILE).write_bytes(raw)
    (folder / WEIGHTS_FILE).write_bytes(SOUND_WEIGHTS)
    refusal = ""
    try:
        found = inspect_files(folder / CONFIG_FILE, folder / WEIGHTS_FILE, LAYERS, base_model="base")
    except AdapterError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        assert str(folder) not in refusal
        return False
    assert json.loads(raw)["peft_type"] == "LORA"
    assert found.details.num_parameters == sum(tensor.numel() for tensor in TENSORS.values())
    assert json.loads(found.spec.canonical)["r"] == json.loads(raw).get("r", 8)
    return True


TARGETS: tuple[Target, ...] = (weights_target, header_target, json_target, config_target)


def seeds() -> list[bytes]:
    """Sound inputs to start from; the first byte of each is the number of its target."""
    patterns = {"rank_pattern": {"q_.*": 4}, "alpha_pattern": {"v_proj": 2}, "target_modules": "(.*)[qv]_proj"}
    layers = {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["k_proj"]}
    configs = [SOUND_CONFIG, *(json.dumps({**CONFIG, **fields}).encode() for fields in (patterns, layers))]
    groups = ([SOUND_WEIGHTS], [SOUND_HEADER], [b'{"a": [1.5, "\\u0061"]}'], configs)
    return [bytes([number]) + raw for number, group in enumerate(groups) for raw in group]


def bounded(target: Target, folder: Path, raw: bytes) -> bool:
    """Run a target, with what Python allocates meanwhile in proportion to the input."""
    tracemalloc.start()
    try:
        is_accepted = target(folder, raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_FLOOR + MEMORY_PER_BYTE * len(raw)
    return is_accepted


def spoilt(sound: bytes) -> st.SearchStrategy[bytes]:
    """A sound input with some bytes flipped, cut out, doubled or put in."""
    places = st.integers(0, len(sound))
    pieces = st.binary(max_size=4) | st.sampled_from([b"0", b"-", b"1e9", b'"', b"\\u0061", b"null", b"[[", b"}", b","])
    edits = st.lists(st.tuples(places, places, pieces, st.booleans()), min_size=1, max_size=4)

    def apply(edits: list[tuple[int, int, bytes, bool]]) -> bytes:
        raw = sound
        for start, length, piece, is_doubled in edits:
            end = start + length % 16
            raw = raw[:start] + raw[start:end] * is_doubled + piece + raw[start if is_doubled else end :]
        return raw

    return edits.map(apply)


OFFSETS = st.sampled_from([0, 1, 512, 1024, 2**31, 2**63, 2**64, -1, True, 0.5, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I32", "", 3, None]),
        "shape": st.lists(OFFSETS | st.integers(1, 64), max_size=3),
        "data_offsets": st.lists(OFFSETS, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)
HEADERS = st.lists(st.tuples(st.sampled_from([*NAMES, "__metadata__", "", "\0", "x"]), ENTRIES | OFFSETS), max_size=3)


def entries_text(pairs: list[tuple[str, Any]]) -> str:
    """Entries of a JSON object, the same key as often as it is given."""
    return ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.floats() | st.text(r"ab.*+?()[]{}|\d0_-^$,", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("qv_proj.*+()", max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*(field.name for field in dataclasses.fields(AdapterSpec)), "peft_type", "bias", "x"])
bounded_examples = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("seed", seeds(), ids=range(len(seeds())))
def test_every_seed_is_accepted(folder: Path, seed: bytes) -> None:
    assert bounded(TARGETS[seed[0]], folder, seed[1:])


@pytest.mark.parametrize("target", TARGETS)
@bounded_examples
@given(raw=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_arbitrary_bytes_are_read_or_refused(folder: Path, target: Target, raw: bytes) -> None:
    bounded(target, folder, raw)


@bounded_examples
@given(raw=spoilt(SOUND_WEIGHTS[: DATA_START + 64]))
def test_a_spoilt_start_of_a_file_is_read_or_refused(folder: Path, raw: bytes) -> None:
    bounded(weights_target, folder, raw + SOUND_WEIGHTS[DATA_START + 64 :])


@bounded_examples
@given(raw=spoilt(SOUND_HEADER))
def test_a_spoilt_header_is_read_or_refused(folder: Path, raw: bytes) -> None:
    bounded(header_target, folder, raw)


@bounded_examples
@given(pairs=HEADERS, is_alone=st.booleans())
def test_entries_added_to_a_header_are_read_or_refused(
    folder: Path, pairs: list[tuple[str, Any]], is_alone: bool
) -> None:
    sound = [] if is_alone else list(json.loads(SOUND_HEADER).items())
    bounded(header_target, folder, ("{" + entries_text([*sound, *pairs]) + "}").encode())


@bounded_examples
@given(
    order=st.permutations(NAMES), old=st.sampled_from(NAMES), new=st.sampled_from([*NAMES, "x"]), again=st.booleans()
)
def test_a_header_in_another_order_is_read_and_a_name_that_comes_twice_refused(
    folder: Path, order: list[str], old: str, new: str, again: bool
) -> None:
    sound = json.loads(SOUND_HEADER)
    pairs = [(new if name == old else name, sound[name]) for name in [*order, *order[:again]]]
    is_accepted = bounded(header_target, folder, ("{" + entries_text(pairs) + "}").encode())
    assert is_accepted == (not again and new in (old, "x"))


@bounded_examples
@given(order=st.permutations(NAMES), shift=st.sampled_from([0, 0, 4, 64, -4, -512]), moved=st.sampled_from(NAMES))
def test_offsets_dealt_anew_are_read_as_they_say_or_refused(
    folder: Path, order: list[str], shift: int, moved: str
) -> None:
    sound = json.loads(SOUND_HEADER)
    dealt = list(zip(NAMES, order, strict=True))
    header = {name: {**sound[name], "data_offsets": sound[other]["data_offsets"]} for name, other in dealt}
    header[moved]["data_offsets"] = [offset + shift for offset in header[moved]["data_offsets"]]
    is_accepted = bounded(header_target, folder, json.dumps(header).encode())
    fits = all(math.prod(sound[name]["shape"]) == math.prod(sound[other]["shape"]) for name, other in dealt)
    assert is_accepted == (fits and not shift)


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_hole_before_any_tensor_is_refused(folder: Path, number: int) -> None:
    header = json.loads(SOUND_HEADER)
    for name in sorted(NAMES, key=lambda name: header[name]["data_offsets"])[number:]:
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]
    assert not weights_target(folder, safetensors_bytes(header, SOUND_WEIGHTS[DATA_START:] + bytes(4)))


@bounded_examples
@given(raw=spoilt(SOUND_CONFIG))
def test_a_spoilt_config_is_read_or_refused(folder: Path, raw: bytes) -> None:
    bounded(config_target, folder, raw)


@bounded_examples
@given(fields=st.lists(st.tuples(FIELDS, VALUES), max_size=4))
def test_a_config_with_other_values_is_read_or_refused(folder: Path, fields: list[tuple[str, Any]]) -> None:
    bounded(config_target, folder, ("{" + entries_text(list({**CONFIG, **dict(fields)}.items())) + "}").encode())
