"""The reader against files that nobody should trust, and against safetensors' own on sound ones."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_files import safetensors_bytes
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.tensorfile import Header, Limits, read_header, read_tensors

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DATA = bytes(24)
SOUND = safetensors_bytes({"a": ENTRY}, DATA)


def entry(**fields: Any) -> dict[str, Any]:
    return {"a": ENTRY | fields}


def frame(header: object, data: bytes = DATA) -> bytes:
    return safetensors_bytes(header, data)


def pair(first: list[int], second: list[int], data: bytes = bytes(48)) -> bytes:
    return frame({"a": ENTRY | {"data_offsets": first}, "b": ENTRY | {"data_offsets": second}}, data)


CORPUS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "eight bytes": (bytes(8), "does not start with {"),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + SOUND[8:], "longer than the file"),
    "length 2^64 - 1": (b"\xff" * 8 + SOUND[8:], "longer than the file"),
    "length past the end by one": ((len(SOUND) - 7).to_bytes(8, "little") + SOUND[8:], "longer than the file"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "longer than the file"),
    "zip": (b"PK\x03\x04" + bytes(100), "longer than the file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "longer than the file"),
    "not UTF-8": (frame(b'{"\xff": 1}'), "not UTF-8"),
    "leading space": (frame(b" {}"), "does not start with {"),
    "array": (frame(b"[]"), "does not start with {"),
    "empty object": (frame({}, b""), "no tensors"),
    "only metadata": (frame({"__metadata__": {"format": "pt"}}, b""), "no tensors"),
    "metadata is a list": (frame({"__metadata__": [], "a": ENTRY}), "__metadata__ must map"),
    "metadata holds a number": (frame({"__metadata__": {"x": 1}, "a": ENTRY}), "__metadata__ must map"),
    "depth 10,000": (frame(b'{"a":' + b"[" * 10_000), "nested deeper"),
    "a name twice": (frame(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "a name twice, escaped": (frame(b'{"a": {}, "\\u0061": {}}'), "'a' appears twice"),
    "a field twice": (frame(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' appears twice"),
    "NaN in the header": (frame(b'{"a": NaN}'), "NaN is not a JSON number"),
    "entry is a list": (frame({"a": []}), "must have dtype, shape and data_offsets"),
    "entry is null": (frame({"a": None}), "must have dtype, shape and data_offsets"),
    "field missing": (frame({"a": {"dtype": "F32", "shape": [2, 3]}}), "must have dtype, shape and data_offsets"),
    "field extra": (frame(entry(scale=1)), "and nothing else"),
    "empty name": (frame({"": ENTRY}), "1 to 512 characters"),
    "long name": (frame({"a" * 513: ENTRY}), "1 to 512 characters"),
    "1 MiB name": (frame({"a" * (1 << 20): ENTRY}), "1 to 512 characters"),
    "NUL in a name": (frame({"a\0b": ENTRY}), "cannot be printed"),
    "newline in a name": (frame({"a\nERROR": ENTRY}), "cannot be printed"),
    "lone surrogate in a name": (frame(b'{"\\ud800": {}}'), "lone surrogate"),
    "dtype unknown": (frame(entry(dtype="F128")), "has dtype 'F128'"),
    "dtype F64": (frame(entry(dtype="F64")), "has dtype 'F64'"),
    "dtype I64": (frame(entry(dtype="I64")), "has dtype 'I64'"),
    "dtype is a list": (frame(entry(dtype=["F32"])), "has dtype"),
    "shape is a number": (frame(entry(shape=6)), "must have a shape"),
    "shape is empty": (frame(entry(shape=[])), "must have a shape"),
    "shape of nine": (frame(entry(shape=[1] * 9)), "must have a shape"),
    "zero dimension": (frame(entry(shape=[0], data_offsets=[0, 0]), b""), "must have a shape"),
    "zero dimension of three": (frame(entry(shape=[0, 3, 3], data_offsets=[0, 0]), b""), "must have a shape"),
    "empty matrix beyond bounds": (frame(entry(shape=[0, 2**63], data_offsets=[0, 0]), b""), "must have a shape"),
    "negative dimension": (frame(entry(shape=[-2, -3])), "must have a shape"),
    "bool dimension": (frame(entry(shape=[True, 6])), "must have a shape"),
    "float dimension": (frame(entry(shape=[2.0, 3])), "must have a shape"),
    "overflowing product": (frame(entry(shape=[2**62, 4, 2**62])), "its shape and dtype need"),
    "huge dimension": (frame(entry(shape=[10**30])), "more than 20 digits"),
    "negative offset": (frame(entry(data_offsets=[-24, 0])), "data_offsets of two integers"),
    "three offsets": (frame(entry(data_offsets=[0, 24, 24])), "data_offsets of two integers"),
    "bool offsets": (frame(entry(data_offsets=[False, 24])), "data_offsets of two integers"),
    "backward offsets": (frame(entry(data_offsets=[24, 0])), "its shape and dtype need 24"),
    "too few bytes for the shape": (frame(entry(data_offsets=[0, 20]), bytes(20)), "its shape and dtype need 24"),
    "offsets past the end": (frame(entry(data_offsets=[24, 48])), "starts at byte 24"),
    "hole at the start": (frame(entry(data_offsets=[8, 32]), bytes(32)), "starts at byte 8"),
    "hole": (pair([0, 24], [28, 52], bytes(52)), "'b' starts at byte 28, the one before it ends at 24"),
    "overlap": (pair([0, 24], [12, 36], bytes(36)), "'b' starts at byte 12"),
    "the same bytes twice": (pair([0, 24], [0, 24], bytes(24)), "starts at byte 0"),
    "trailing byte": (SOUND + b"\0", "the tensors end at byte 24, the file at 25"),
    "truncated by one": (SOUND[:-1], "the tensors end at byte 24, the file at 23"),
    "no data": (SOUND[:-24], "the tensors end at byte 24, the file at 0"),
    "100,000 entries": (frame({f"t{i}": 0 for i in range(100_000)}), "holds 100000 tensors, more than 32768"),
}


def complaints(path: Path, limits: Limits | None = None) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapterError) as caught:
        read_header(path, limits or Limits())
    assert str(path.parent) not in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 20_000
    return caught.value.reasons


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize(("content", "complaint"), CORPUS.values(), ids=CORPUS.keys())
def test_refuses(path: Path, content: bytes, complaint: str) -> None:
    path.write_bytes(content)
    assert complaint in "\n".join(complaints(path))


def test_the_frame_of_the_corpus_is_sound(path: Path) -> None:
    path.write_bytes(SOUND)
    assert read_header(path).tensors["a"].shape == (2, 3)
    path.write_bytes(frame(json.dumps({"__metadata__": {"format": "pt"}, "a": ENTRY}).encode() + b"   "))
    assert read_header(path).num_parameters == 6


def test_every_bad_tensor_is_named(path: Path) -> None:
    path.write_bytes(frame({"a": ENTRY | {"dtype": "I8"}, "b": ENTRY | {"shape": [0]}, "c": 7}))
    assert [reason.split()[1] for reason in complaints(path)] == ["'a'", "'b'", "'c'"]


def test_a_long_list_of_complaints_is_cut(path: Path) -> None:
    path.write_bytes(frame({f"tensor{i}": 0 for i in range(1000)}))
    assert "... and 950 more" in complaints(path)[-1]


def test_limits_are_kept(path: Path) -> None:
    path.write_bytes(pair([0, 24], [24, 48]))
    assert len(read_header(path, Limits(max_tensors=2)).tensors) == 2
    assert "more than 1" in complaints(path, Limits(max_tensors=1))[0]
    assert "longer than 20 bytes" in complaints(path, Limits(max_header_bytes=20))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_writes(path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 5).to(dtype) for i in range(4)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = read_tensors(path, read_header(path))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_tensors_own_their_memory(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(64, 64), "b": torch.ones(3)}, path)
    tensors = read_tensors(path, read_header(path))
    with path.open("r+b") as file:
        file.truncate(0)
    assert all(tensor.eq(1).all() for tensor in tensors.values())
    assert tensors["b"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize("size", [0, 8, len(SOUND) - 1, len(SOUND) + 1])
def test_a_file_that_changes_after_its_header_was_read(path: Path, size: int) -> None:
    path.write_bytes(SOUND)
    header = read_header(path)
    os.truncate(path, size)
    with pytest.raises(InvalidAdapterError, match="changed while it was read"):
        read_tensors(path, header)


def test_a_short_read_is_noticed(path: Path) -> None:
    path.write_bytes(SOUND)
    header = read_header(path)
    with pytest.raises(InvalidAdapterError, match="ends too early"):
        read_tensors(path, Header(header.tensors, header.data_offset + 1, header.file_bytes))


def test_a_missing_file(path: Path) -> None:
    assert complaints(path) == ("adapter_model.safetensors is missing",)


def test_a_folder_and_a_pipe_are_no_files(path: Path) -> None:
    path.mkdir()
    assert complaints(path) == ("adapter_model.safetensors is not a regular file",)
    path.rmdir()
    os.mkfifo(path)
    reader = threading.Thread(target=complaints, args=(path,), daemon=True)
    reader.start()
    reader.join(timeout=60)
    assert not reader.is_alive()


def test_a_large_header_of_junk_is_refused_quickly(path: Path) -> None:
    path.write_bytes(frame(b'{"a":' + b'["' * (4 << 20)))
    started = time.thread_time()
    complaints(path)
    assert time.thread_time() - started < 1


HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\0", "model.norm.weight"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", 3]),
            "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, True, 1.5]), max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 32, -1, 2**63]), min_size=1, max_size=3),
        }
    )
    | st.none()
    | st.integers(),
    max_size=3,
)


@settings(max_examples=200)
@given(header=HEADERS | st.binary(max_size=60), data=st.binary(max_size=40))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(frame(header, data))
    try:
        found = read_header(path)
    except InvalidAdapterError:
        return
    assert sum(tensor.nbytes for tensor in read_tensors(path, found).values()) == len(data)


@settings(max_examples=200)
@given(position=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255))
def test_what_the_reader_accepts_safetensors_reads_alike(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = SOUND[:position] + bytes([byte]) + SOUND[position + 1 :]
    path.write_bytes(content)
    try:
        found = read_tensors(path, read_header(path))
    except InvalidAdapterError:
        return
    expected = safetensors.torch.load(content)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
