"""Tests of the GGUF reader: equal to the gguf package's on sound files, clear errors on what cannot be opened."""

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import RawTensor, raw_array, raw_gguf, raw_string, write_tiny_deepseek2

from edge_moe.errors import EdgeMoeError, FormatError, OptionError, UnsupportedError
from edge_moe.formats import FORMATS
from edge_moe.gguf import GGUFFile, StringArray, open_gguf


def plain(value):
    """A metadata value as the oracle gives it."""
    return list(value) if isinstance(value, StringArray) else value.tolist() if isinstance(value, np.ndarray) else value


def assert_equals_oracle(opened: GGUFFile, *paths: Path) -> None:
    readers = [gguf.GGUFReader(path) for path in paths]
    expected = {key: field.contents() for key, field in readers[0].fields.items() if not key.startswith("GGUF.")}
    assert {key: plain(value) for key, value in opened.metadata.items()} == expected
    assert list(opened.metadata) == list(expected)
    tensors = [(path, tensor) for path, reader in zip(paths, readers, strict=True) for tensor in reader.tensors]
    assert list(opened.tensors) == [tensor.name for _, tensor in tensors]
    for path, tensor in tensors:
        entry = opened.tensors[tensor.name]
        assert (entry.name, entry.path) == (tensor.name, path)
        assert (entry.format.name, entry.shape) == (tensor.tensor_type.name, tuple(tensor.shape[::-1].tolist()))
        assert entry.data.dtype == np.uint8
        assert np.array_equal(entry.data, tensor.data.reshape(-1).view(np.uint8))
    assert opened.size_bytes == sum(path.stat().st_size for path in paths)


def write_raw(path: Path, *args, **options) -> Path:
    path.write_bytes(raw_gguf(*args, **options))
    return path


# ---- sound files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_lora_rank": 32, "selection_bias": True, "scoring_func": "sigmoid", "weight_type": "Q8_0"},
        {"split_kv_b": False, "tie_word_embeddings": True, "fused_gate_up": True, "n_group": 2},
        {"rope_scaling": {"factor": 4, "original_max_position_embeddings": 64, "mscale_all_dim": 1}},
        {"weight_type": "Q4_0", "num_hidden_layers": 3},
        {"weight_type": "Q6_K", "hidden_size": 256, "moe_intermediate_size": 256},
        {"weight_type": "BF16", "first_k_dense_replace": 0, "n_shared_experts": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_reads_as_with_the_gguf_package(tmp_path, options):
    path = tmp_path / "tiny.gguf"
    decoded = write_tiny_deepseek2(path, **options)
    opened = open_gguf(path)
    assert_equals_oracle(opened, path)
    for name, entry in opened.tensors.items():
        assert np.array_equal(entry.format.decode(entry.data).reshape(entry.shape), decoded[name])


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_every_kind_of_value_reads_as_with_the_gguf_package(tmp_path, alignment):
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "any")
    writer.add_custom_alignment(alignment)
    numbers = {
        gguf.GGUFValueType.UINT8: [0, 255], gguf.GGUFValueType.INT8: [-128, 127], gguf.GGUFValueType.UINT16: [0, 65535],
        gguf.GGUFValueType.INT16: [-32768, 32767], gguf.GGUFValueType.UINT32: [0, 2**32 - 1],
        gguf.GGUFValueType.INT32: [-(2**31), 2**31 - 1], gguf.GGUFValueType.UINT64: [0, 2**64 - 1],
        gguf.GGUFValueType.INT64: [-(2**63), 2**63 - 1], gguf.GGUFValueType.FLOAT32: [-0.1, 3e38],
        gguf.GGUFValueType.FLOAT64: [0.1, -1e300], gguf.GGUFValueType.BOOL: [True, False],
    }  # fmt: skip
    for value_type, values in numbers.items():
        for i, value in enumerate(values):
            writer.add_key_value(f"one.{value_type.name}.{i}", value, value_type)
        writer.add_key_value(f"many.{value_type.name}", values * 3, gguf.GGUFValueType.ARRAY, value_type)
    writer.add_string("text", "a line\nand ünïcödé 🙂")
    writer.add_array("texts", ["", "a", "é", "🙂" * 300, "\0", "last"])
    for i, n_rows in enumerate([1, 3, 7]):
        writer.add_tensor(f"tensor.{i}", np.arange(n_rows * 5, dtype=np.float32).reshape(n_rows, 5))
    writer.add_tensor("four", np.zeros((2, 3, 4, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_gguf(path)
    assert_equals_oracle(opened, path)
    assert opened.alignment == alignment
    assert type(opened.metadata["one.BOOL.0"]) is bool
    assert type(opened.metadata["one.UINT8.0"]) is int
    assert type(opened.metadata["one.FLOAT32.0"]) is float
    assert opened.metadata["many.INT16"].dtype == np.int16
    assert opened.metadata["many.BOOL"].dtype == np.bool_


def test_every_format_is_read(tmp_path):
    tensors, data = [], b""
    for i, fmt in enumerate(FORMATS):
        n_cols = 2 * fmt.block_size
        tensors.append(RawTensor(f"tensor {fmt.name}".encode(), (n_cols, 3), fmt.ggml_type, len(data)))
        piece = bytes([i]) * (3 * fmt.row_bytes(n_cols))
        data += piece + bytes(-len(piece) % 32)
    path = write_raw(tmp_path / "formats.gguf", tensors=tensors, data=data)
    opened = open_gguf(path)
    for i, fmt in enumerate(FORMATS):
        entry = opened.tensors[f"tensor {fmt.name}"]
        assert (entry.format, entry.shape) == (fmt, (3, 2 * fmt.block_size))
        assert np.array_equal(entry.data, np.full(6 * fmt.block_bytes, i, np.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_without_tensors(tmp_path, version):
    keys = [
        (b"answer", 4, struct.pack("<I", 42)),
        (b"none", 9, raw_array(8, 0, b"")),
        (b"no numbers", 9, raw_array(4, 0, b"")),
    ]
    path = write_raw(tmp_path / "vocabulary.gguf", keys, version=version)
    opened = open_gguf(path)
    assert (opened.version, opened.tensors, opened.metadata["answer"]) == (version, {}, 42)
    assert (list(opened.metadata["none"]), opened.metadata["no numbers"].tolist()) == ([], [])
    assert open_gguf(write_raw(tmp_path / "nothing.gguf", version=version)).metadata == {}


def test_a_last_tensor_may_end_the_file_without_padding(tmp_path):
    path = write_raw(tmp_path / "short.gguf", tensors=[RawTensor(b"x", (3,))], data=struct.pack("<3f", 1, 2, 3))
    assert open_gguf(path).tensors["x"].data.view("<f4").tolist() == [1, 2, 3]


def test_tensor_data_is_a_read_only_view_of_the_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_deepseek2(path)
    data = open_gguf(path).tensors["output.weight"].data
    assert not data.flags.writeable
    assert not data.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        data.flags.writeable = True


def test_strings_of_arrays_are_a_sequence(tmp_path):
    words = ["", "a", "bb", "é", "🙂" * 100]
    items = b"".join(raw_string(word.encode()) for word in words)
    strings = open_gguf(write_raw(tmp_path / "x.gguf", [(b"words", 9, raw_array(8, 5, items))])).metadata["words"]
    assert isinstance(strings, StringArray)
    assert list(strings) == words
    assert [strings[i] for i in range(-5, 5)] == words * 2
    assert (strings[1:4], strings[::-2], strings[7:]) == (words[1:4], words[::-2], [])
    assert ("bb" in strings, "c" in strings, strings.index("é"), len(strings)) == (True, False, 3, 5)
    with pytest.raises(IndexError):
        strings[5]
    with pytest.raises(IndexError):
        strings[-6]


@pytest.mark.parametrize("n_characters", [0, 127, 128])
def test_strings_are_the_same_one_by_one_and_all_together(tmp_path, n_characters):
    rng = np.random.default_rng(6)
    words = [bytes(range(n_characters)), *(rng.integers(128, 256, n, np.uint8).tobytes() for n in range(40))]
    items = b"".join(map(raw_string, words))
    path = write_raw(tmp_path / "x.gguf", [(b"words", 9, raw_array(8, len(words), items))])
    strings = open_gguf(path).metadata["words"]
    expected = [word.decode("utf-8", "replace") for word in words]
    assert list(strings) == [strings[i] for i in range(len(words))] == expected


def test_values_that_are_not_utf8_do_not_stop_the_file(tmp_path):
    items = raw_string(b"ok") + raw_string(b"\xff\xfe") + raw_string(b"\xed\xa0\x80")
    keys = [(b"words", 9, raw_array(8, 3, items)), (b"text", 8, raw_string(b"a\x80b"))]
    metadata = open_gguf(write_raw(tmp_path / "x.gguf", keys)).metadata
    assert (list(metadata["words"])[:2], metadata["text"]) == (["ok", "\ufffd\ufffd"], "a\ufffdb")
    assert metadata["words"][2].encode() == list(metadata["words"])[2].encode()


def test_a_vocabulary_of_100000_tokens_opens_in_a_third_of_a_second(tmp_path):
    path = tmp_path / "big.gguf"
    tokens = b"".join(raw_string(b"t" * (1 + i % 17)) for i in range(102_400))
    merges = b"".join(raw_string(b"m" * (3 + i % 23)) for i in range(100_000))
    types = np.ones(102_400, np.int32).tobytes()
    keys = [
        (b"tokenizer.ggml.tokens", 9, raw_array(8, 102_400, tokens)),
        (b"tokenizer.ggml.merges", 9, raw_array(8, 100_000, merges)),
        (b"tokenizer.ggml.token_type", 9, raw_array(5, 102_400, types)),
    ]
    write_raw(path, keys, [RawTensor(b"blk.%d.x" % i, (8,), 0, 32 * i) for i in range(400)], bytes(32 * 400))
    times_s = []
    for _ in range(3):
        start_s = time.process_time()  # not the clock on the wall: other programs may be running
        opened = open_gguf(path)
        times_s.append(time.process_time() - start_s)
    assert len(opened.metadata["tokenizer.ggml.merges"]) == 100_000
    assert min(times_s) < 0.3


# ---- split files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    write_tiny_deepseek2(tmp_path / "tiny.gguf", tensors_per_part=12)
    return sorted(tmp_path.glob("tiny-0000?-of-00003.gguf"))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_all(parts, given):
    opened = open_gguf(parts[given])
    assert opened.path == parts[0]
    assert_equals_oracle(opened, *parts)


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(FormatError, match=r"tiny-00002-of-00003.gguf: no such file, expected part 2 of 3"):
        open_gguf(parts[0])


def test_a_renamed_part_is_named(parts):
    renamed = parts[0].with_name("model.gguf")
    parts[0].rename(renamed)
    with pytest.raises(FormatError, match=r"part 1 of 3 .*expected its name to end in -00001-of-00003.gguf"):
        open_gguf(renamed)
    with pytest.raises(FormatError, match=r"00001-of-00003.gguf: no such file"):
        open_gguf(parts[2])


def test_exchanged_parts_are_named(parts):
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(FormatError, match=r"00003-of-00003.gguf: says that it is part 2 of 3, expected part 3 of 3"):
        open_gguf(parts[0])


def split_key(name: str, value: int) -> tuple[bytes, int, bytes]:
    return (f"split.{name}".encode(), 2, struct.pack("<H", value))


def write_parts(folder: Path, names: list[bytes], total: int) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        keys = [split_key("no", i), split_key("count", len(names)), split_key("tensors.count", total)]
        part = folder / f"m-{i + 1:05}-of-{len(names):05}.gguf"
        write_raw(part, keys, [RawTensor(name, (8,))], bytes(32))
    return folder / f"m-00001-of-{len(names):05}.gguf"


def test_parts_are_checked_against_each_other(tmp_path):
    assert list(open_gguf(write_parts(tmp_path / "sound", [b"a", b"b"], 2)).tensors) == ["a", "b"]
    with pytest.raises(FormatError, match=r"hold 2 tensors, expected 3"):
        open_gguf(write_parts(tmp_path / "one missing", [b"a", b"b"], 3))
    with pytest.raises(FormatError, match=r"00002-of-00002.gguf: tensor a is also in .*00001-of-00002.gguf"):
        open_gguf(write_parts(tmp_path / "one double", [b"a", b"a"], 2))


@pytest.mark.parametrize("value", [(8, raw_string(b"two")), (5, struct.pack("<i", -2)), (6, struct.pack("<f", 2))])
def test_a_split_count_must_be_a_count(tmp_path, value):
    path = write_raw(tmp_path / "m-00001-of-00002.gguf", [(b"split.count", *value)])
    with pytest.raises(FormatError, match=r"split.count is .*, expected a count"):
        open_gguf(path)


# ---- files that cannot be opened ------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(OptionError, match=r"nowhere.gguf: no such file"):
        open_gguf(tmp_path / "nowhere.gguf")


def test_a_folder(tmp_path):
    with pytest.raises(OptionError, match="is a folder"):
        open_gguf(tmp_path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(FormatError, match="is empty"):
        open_gguf(path)


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.gguf"
    write_raw(path)

    def refuse(*args, **options):  # the superuser, who may run the tests, can read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OptionError, match=r"secret.gguf: no permission"):
        open_gguf(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(OptionError, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("name", ["nul\0byte.gguf", "n" * 5000])
def test_impossible_names(tmp_path, name):
    with pytest.raises(OptionError) as caught:
        open_gguf(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return raw_gguf([(name, value_type, value)])


def table(*tensors: RawTensor, n_bytes: int = 64) -> bytes:
    return raw_gguf(tensors=tensors, data=bytes(n_bytes))


U32, F32_VALUE, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
WHAT_A_MESSAGE_SAYS = [
    (b"GG", FormatError, r"begins with b'GG', expected b'GGUF'"),
    (b"<!DOCTYPE html>" * 9, FormatError, r"begins with b'<!DO'"),
    (b"version https://git-lfs.github.com/spec/v1\n", FormatError, "Git LFS pointer"),
    (b"tjgg" + bytes(100), UnsupportedError, "before GGUF"),
    (b"GGUF", FormatError, "it is 4 bytes, the version needs 8"),
    (raw_gguf(version=0), UnsupportedError, "version 0, expected 2 or 3"),
    (raw_gguf(version=1), UnsupportedError, "version 1, expected 2 or 3"),
    (raw_gguf(version=4), UnsupportedError, "version 4, expected 2 or 3"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    (raw_gguf(n_keys=2**64 - 1), FormatError, "claims 18446744073709551615 metadata keys"),
    (raw_gguf(n_tensors=2**63), FormatError, "claims 9223372036854775808 tensors"),
    (key(b"k", STRING, struct.pack("<Q", 2**63)), FormatError, "key k needs 9223372036854775853"),
    (key(b"k", ARRAY, raw_array(STRING, 2**62, b"")), FormatError, "claims 4611686018427387904 strings in .* k"),
    (key(b"k", ARRAY, raw_array(STRING, 2, raw_string(b"x" * 99))), FormatError, "string 1 of metadata key k"),
    (key(b"k", ARRAY, raw_array(U32, 2**62, b"")), FormatError, "key k needs 18446744073709551665"),
    (key(b"k", ARRAY, raw_array(ARRAY, 1, b"")), UnsupportedError, "k is an array of arrays"),
    (key(b"k", 13, b""), FormatError, "k has value type 13, expected 0 to 12"),
    (key(b"k", BOOL, b"\x02"), FormatError, "k holds 2 as a bool"),
    (key(b"", BOOL, b"\x01"), FormatError, "name of metadata key 0 is empty"),
    (key(b"\xff", BOOL, b"\x01"), FormatError, r"name of metadata key 0 is b'\\xff', expected UTF-8"),
    (raw_gguf([(b"a\nb", 0, b"1")] * 2), FormatError, r"key 'a\\nb' is there twice"),
    (key(b"general.alignment", U32, struct.pack("<I", 24)), FormatError, "alignment is 24, expected a power of two"),
    (key(b"general.alignment", U32, struct.pack("<I", 4)), FormatError, "alignment is 4, expected a power of two"),
    (key(b"general.alignment", U32, struct.pack("<I", 0)), FormatError, "alignment is 0, expected a power of two"),
    (key(b"general.alignment", F32_VALUE, struct.pack("<f", 32)), FormatError, "alignment is 32.0, expected"),
    (table(RawTensor(b"t", ())), FormatError, "t has 0 dimensions"),
    (table(RawTensor(b"t", (1,) * 5)), FormatError, "t has 5 dimensions, expected 1 to 4"),
    (table(RawTensor(b"t", (0, 2))), FormatError, r"t has shape \(2, 0\) in F32"),
    (table(RawTensor(b"t", (2, 0))), FormatError, r"t has shape \(0, 2\) in F32"),
    (table(RawTensor(b"t", (33,), 8)), FormatError, r"\(33,\) in Q8_0, .* multiple of 32"),
    (table(RawTensor(b"t", (32,), 22)), UnsupportedError, r"type 22 \(IQ2_S\), expected one of F32, F16, .*IQ4_XS"),
    (table(RawTensor(b"t", (32,), 4)), UnsupportedError, r"type 4 \(unknown\)"),
    (table(RawTensor(b"\xc3", (1,))), FormatError, r"name of a tensor is b'\\xc3', expected UTF-8"),
    (table(RawTensor(b"t", (2,)), RawTensor(b"t", (2,), 0, 32)), FormatError, "t is there twice"),
    (table(RawTensor(b"t", (9,)), RawTensor(b"u", (2,), 0, 32)), FormatError, "tensors t and u overlap"),
    (table(RawTensor(b"t", (2,), 0, 8)), FormatError, "offset 8, expected a multiple of 32"),
    (
        table(RawTensor(b"t", (9,)), n_bytes=35),
        FormatError,
        "t ends at byte 100, but the file is 99 bytes and its table needs 100",
    ),
    (
        table(RawTensor(b"t", (1,), 0, 2**64 - 32)),
        FormatError,
        "t ends at byte 18446744073709551652, but the file is 128 bytes",
    ),
    (table(RawTensor(b"t", (2**32,) * 4)), FormatError, "t ends at byte 1361129467683753853853498429727072845920"),
    (table(RawTensor(b"t", (2**32, 2**32))), FormatError, "t ends at byte 7378697629483820656"),
]


@pytest.mark.parametrize(
    ("content", "error", "message"), WHAT_A_MESSAGE_SAYS, ids=[message for _, _, message in WHAT_A_MESSAGE_SAYS]
)
def test_what_a_message_says(tmp_path, content, error, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(EdgeMoeError, match=message) as caught:
        open_gguf(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
