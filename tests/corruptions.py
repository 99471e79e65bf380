"""Damages a sound GGUF file in every way its structure offers, for the tests of malformed input."""

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gguf_files import RawTensor, raw_array, raw_gguf, raw_string

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B",
    U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip
WILD_U64 = (0, 1, 255, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
WILD_U32 = (0, 5, 13, 255, 2**16, 2**31, 2**32 - 1)

Key = tuple[bytes, int, bytes]
Case = tuple[str, bytes]


@dataclass(frozen=True)
class Field:
    """One item of the header: where it is and what it is for."""

    kind: str  # count, length, text, type, value, n_dims, dim, ggml_type, offset
    start: int
    size: int
    owner: str


@dataclass(frozen=True)
class Anatomy:
    """A sound file taken apart."""

    content: bytes
    fields: list[Field]
    keys: list[Key]
    tensors: list[RawTensor]
    data_start: int
    alignment: int

    def rebuilt(self, keys: list[Key] | None = None, tensors: list[RawTensor] | None = None) -> bytes:
        """The file with other keys or another tensor table."""
        return raw_gguf(
            self.keys if keys is None else keys,
            self.tensors if tensors is None else tensors,
            self.content[self.data_start :],
            alignment=self.alignment,
        )

    def with_number(self, field: Field, value: int) -> bytes:
        """The file with another unsigned number in a field."""
        number = (value % 256**field.size).to_bytes(field.size, "little")
        return self.content[: field.start] + number + self.content[field.start + field.size :]


def dissect(content: bytes) -> Anatomy:
    """Take a sound file apart (by a reader that shares no code with the one under test)."""
    fields: list[Field] = []
    at = 24
    n_tensors, n_keys = struct.unpack_from("<QQ", content, 8)

    def note(kind: str, size: int, owner: str) -> bytes:
        nonlocal at
        fields.append(Field(kind, at, size, owner))
        at += size
        return content[at - size : at]

    def number(kind: str, code: str, owner: str) -> int:
        return struct.unpack(code, note(kind, struct.calcsize(code), owner))[0]

    def text(owner: str) -> bytes:
        return note("text", number("length", "<Q", owner), owner)

    def value(value_type: int, owner: str) -> None:
        if value_type == STRING:
            text(owner)
        elif value_type == ARRAY:
            item_type = number("type", "<I", owner)
            for i in range(count := number("count", "<Q", owner)):
                value(item_type, f"{owner}[{i if i < count - 1 else 'last'}]")
        else:
            note("value", struct.calcsize(NUMBERS[value_type]), owner)

    fields += [Field("text", 0, 4, "magic"), Field("type", 4, 4, "version")]
    fields += [Field("count", 8, 8, "tensors"), Field("count", 16, 8, "keys")]
    keys: list[Key] = []
    for _ in range(n_keys):
        name = text("key name")
        value_type = number("type", "<I", f"key {name.decode()}")
        start = at
        value(value_type, f"key {name.decode()}")
        keys.append((name, value_type, content[start:at]))
    tensors: list[RawTensor] = []
    for _ in range(n_tensors):
        name = text("tensor name")
        owner = f"tensor {name.decode()}"
        dims = tuple(number("dim", "<Q", owner) for _ in range(number("n_dims", "<I", owner)))
        tensors.append(RawTensor(name, dims, number("ggml_type", "<I", owner), number("offset", "<Q", owner)))
    alignment = next((struct.unpack("<I", raw)[0] for name, _, raw in keys if name == b"general.alignment"), 32)
    anatomy = Anatomy(content, fields, keys, tensors, -(-at // alignment) * alignment, alignment)
    assert anatomy.rebuilt() == content
    return anatomy


def _single_fields(file: Anatomy) -> list[Field]:
    """The fields without the inner strings and numbers of long arrays, but for the first and the last."""
    return [each for each in file.fields if "[" not in each.owner or each.owner.endswith(("[0]", "[last]"))]


def truncations(file: Anatomy) -> Iterator[Case]:
    ends = {each.start for each in _single_fields(file)}
    ends |= {file.data_start - 1, file.data_start, file.data_start + 1, len(file.content) - 1}
    ends |= {file.data_start + tensor.offset for tensor in file.tensors}
    ends |= {each.start + each.size // 2 for each in _single_fields(file)[::7]}
    for end in sorted(ends):
        yield f"cut at byte {end}", file.content[:end]


def wild_counts(file: Anatomy) -> Iterator[Case]:
    for i, field in enumerate(_single_fields(file)):
        if field.kind in ("count", "length"):
            now = int.from_bytes(file.content[field.start : field.start + 8], "little")
            wild = WILD_U64 if field.kind == "count" else (WILD_U64[i % len(WILD_U64)], now + 1, max(0, now - 1))
            for value in (*wild, len(file.content)):
                if value != now:
                    yield f"{field.kind} of {field.owner} is {value}", file.with_number(field, value)


def wild_dimensions(file: Anatomy) -> Iterator[Case]:
    for i, field in enumerate(file.fields):
        if field.kind == "n_dims":
            for value in (0, 1 + i % 4, 5, 2**32 - 1):
                yield f"n_dims of {field.owner} is {value}", file.with_number(field, value)
        if field.kind == "dim":
            now = int.from_bytes(file.content[field.start : field.start + 8], "little")
            for value in {now + 1, now // 2, 2 * now, WILD_U64[i % len(WILD_U64)]} - {now}:
                yield f"a dimension of {field.owner} is {value}", file.with_number(field, value)
    for i, tensor in enumerate(file.tensors):
        for dims in ((2**32,) * 4, (2**16,) * 4, (2**63, 2), (32, 2**59), tensor.dims[::-1], (*tensor.dims, 1)):
            if dims != tensor.dims:
                tensors = [*file.tensors[:i], replace(tensor, dims=dims), *file.tensors[i + 1 :]]
                yield f"{tensor.name.decode()} has dimensions {dims}", file.rebuilt(tensors=tensors)


def wild_offsets(file: Anatomy) -> Iterator[Case]:
    for i, field in enumerate(each for each in file.fields if each.kind == "offset"):
        now = file.tensors[i].offset
        others = [file.tensors[(i + 1) % len(file.tensors)].offset, len(file.content) // 32 * 32]
        for value in {now + 1, now + 32, *others, *WILD_U64[i % 3 :: 3]} - {now}:
            yield f"offset of {field.owner} is {value}", file.with_number(field, value)


def wild_types(file: Anatomy) -> Iterator[Case]:
    for i, field in enumerate(_single_fields(file)):
        now = int.from_bytes(file.content[field.start : field.start + field.size], "little")
        if field.kind == "type":
            for value in {*range(i % 4, 14, 4), *WILD_U32[i % 2 :: 2]} - {now}:
                yield f"type of {field.owner} is {value}", file.with_number(field, value)
        if field.kind == "ggml_type":
            for value in {*range(i % 9, 45, 9), WILD_U32[i % len(WILD_U32)]} - {now}:
                yield f"format of {field.owner} is {value}", file.with_number(field, value)


def wrong_key_types(file: Anatomy) -> Iterator[Case]:
    """Every key with a well-formed value of each other type."""
    values = {each: struct.pack(code, 1) for each, code in NUMBERS.items()}
    values |= {STRING: raw_string(b"1"), ARRAY: raw_array(STRING, 2, raw_string(b"1") * 2)}
    for i, (name, value_type, _) in enumerate(file.keys):
        for other, value in values.items():
            if other != value_type:
                keys = [*file.keys[:i], (name, other, value), *file.keys[i + 1 :]]
                yield f"{name.decode()} has value type {other}", file.rebuilt(keys)


def wrong_key_values(file: Anatomy) -> Iterator[Case]:
    """Every key with values of its own type that no model has."""
    for i, (name, value_type, value) in enumerate(file.keys):
        if value_type == STRING:
            wrong = [raw_string(text) for text in (b"", b"\n", b"\xff\xfe\x80", b"nonsense", b"{{", b"x" * 10_000)]
        elif value_type == ARRAY:
            wrong = list(_wrong_arrays(value))
        elif value_type in (F32, F64):
            floats = (0, -1, 1e-40, 1e30, float("nan"), float("inf"), float("-inf"))
            wrong = [struct.pack(NUMBERS[value_type], number) for number in floats]
        elif value_type == BOOL:
            wrong = [b"\0", b"\1", b"\2", b"\xff"]
        else:
            size = struct.calcsize(NUMBERS[value_type])
            numbers = (0, 1, 2, 3, 7, 31, 33, 1000, 65_537, 2**31 - 1, 2**31, 2**32 - 1)
            wrong = [(number % 256**size).to_bytes(size, "little") for number in numbers]
        for other in wrong:
            if other != value:
                keys = [*file.keys[:i], (name, value_type, other), *file.keys[i + 1 :]]
                yield f"{name.decode()} is {other[:24]!r}", file.rebuilt(keys)


def _wrong_arrays(value: bytes) -> Iterator[bytes]:
    item_type, count = struct.unpack_from("<IQ", value)
    for n in (0, 1, count - 1, count + 1, 3 * count):
        if item_type == STRING:
            yield raw_array(STRING, n, b"".join(raw_string(b"%d" % i) for i in range(n)))
            yield raw_array(STRING, n, raw_string(b"\xff") * n)
        else:
            yield raw_array(item_type, n, b"\xff" * (n * struct.calcsize(NUMBERS[item_type])))


def missing_and_double_keys(file: Anatomy) -> Iterator[Case]:
    for i, key in enumerate(file.keys):
        yield f"{key[0].decode()} is missing", file.rebuilt(file.keys[:i] + file.keys[i + 1 :])
        yield f"{key[0].decode()} is there twice", file.rebuilt([*file.keys, key])
    yield "no keys", file.rebuilt([])


def missing_and_double_tensors(file: Anatomy) -> Iterator[Case]:
    for i, tensor in enumerate(file.tensors):
        yield f"{tensor.name.decode()} is missing", file.rebuilt(tensors=file.tensors[:i] + file.tensors[i + 1 :])
        yield f"{tensor.name.decode()} is there twice", file.rebuilt(tensors=[*file.tensors, tensor])
        again = replace(tensor, offset=file.tensors[(i + 1) % len(file.tensors)].offset)
        yield f"{tensor.name.decode()} is there twice, elsewhere", file.rebuilt(tensors=[*file.tensors, again])
    yield "no tensors", file.rebuilt(tensors=[])


def bad_names(file: Anatomy) -> Iterator[Case]:
    bad = (b"", b"\xff\xfe", b"\xc3", b"a\xed\xa0\x80", b"with\nnewline", b"nul\0", b"n" * 5000, "ключ".encode())
    for i, name in enumerate(bad):
        for at in (0, (3 * i + 1) % len(file.keys)):
            keys = [*file.keys[:at], (name, *file.keys[at][1:]), *file.keys[at + 1 :]]
            yield f"key {at} is named {name[:20]!r}", file.rebuilt(keys)
        for at in (0, (3 * i + 1) % len(file.tensors)):
            tensors = [*file.tensors[:at], replace(file.tensors[at], name=name), *file.tensors[at + 1 :]]
            yield f"tensor {at} is named {name[:20]!r}", file.rebuilt(tensors=tensors)


def flipped_header_bytes(file: Anatomy) -> Iterator[Case]:
    rng = random.Random(2)
    for _ in range(300):
        at, bit = rng.randrange(file.data_start), rng.randrange(8)
        content = bytearray(file.content)
        content[at] ^= 1 << bit
        yield f"bit {bit} of byte {at} flipped", bytes(content)


def random_mutations(file: Anatomy) -> Iterator[Case]:
    """Several bytes overwritten, a piece cut out, a piece doubled, or a piece moved elsewhere."""
    rng = random.Random(3)
    for seed in range(400):
        content = bytearray(file.content)
        start, n = rng.randrange(file.data_start), rng.choice([1, 2, 4, 8, 100])
        piece = bytes(content[start : start + n])
        match seed % 4:
            case 0:
                for _ in range(n):
                    content[rng.randrange(file.data_start)] = rng.choice([0, 1, 255, rng.randrange(256)])
            case 1:
                del content[start : start + n]
            case 2:
                content[start:start] = piece
            case _:
                elsewhere = rng.randrange(file.data_start)
                content[elsewhere : elsewhere + n] = piece
        yield f"random mutation {seed}", bytes(content)


def broken_weights(file: Anatomy) -> Iterator[Case]:
    """Each tensor filled with one byte (0xFF is NaN in every float), or random."""
    rng = random.Random(4)
    starts = [file.data_start + tensor.offset for tensor in file.tensors] + [len(file.content)]
    for i, tensor in enumerate(file.tensors):
        size = starts[i + 1] - starts[i]
        for what, data in {"0xff": b"\xff" * size, "0x00": bytes(size), "random": rng.randbytes(size)}.items():
            content = file.content[: starts[i]] + data + file.content[starts[i + 1] :]
            yield f"{tensor.name.decode()} is {what}", content
    yield "all weights are random", file.content[: file.data_start] + rng.randbytes(starts[-1] - file.data_start)


def other_files(file: Anatomy) -> Iterator[Case]:
    rng = random.Random(5)
    yield "nothing", b""
    yield "zeros", bytes(1 << 20)
    yield "ones", b"\xff" * (1 << 20)
    yield "random", rng.randbytes(1 << 16)
    yield "a page", b"<!DOCTYPE html><html><body>Not found</body></html>"
    yield "magic, then zeros", b"GGUF" + bytes(1 << 16)
    yield "magic, then random", b"GGUF\3\0\0\0" + rng.randbytes(1 << 16)
    yield "big-endian", b"GGUF" + struct.pack(">IQQ", 3, len(file.tensors), len(file.keys)) + file.content[24:]
    for version in (0, 1, 4, 2**31):
        yield f"version {version}", b"GGUF" + struct.pack("<I", version) + file.content[8:]
    yield "100,000 empty strings", raw_gguf([(b"k", ARRAY, raw_array(STRING, 100_000, bytes(800_000)))])
    yield "too many empty strings", raw_gguf([(b"k", ARRAY, raw_array(STRING, 2_000_000, bytes(16_000_000)))])
    yield "a long text", raw_gguf([(b"k", STRING, raw_string(b"x" * (9 << 20)))])
    yield "the file twice", file.content * 2


# Each yields (what is wrong, the content), always the same for the same file.
FAMILIES: tuple[Callable[[Anatomy], Iterator[Case]], ...] = (
    truncations, wild_counts, wild_dimensions, wild_offsets, wild_types, wrong_key_types, wrong_key_values,
    missing_and_double_keys, missing_and_double_tensors, bad_names, flipped_header_bytes, random_mutations,
    broken_weights, other_files,
)  # fmt: skip
