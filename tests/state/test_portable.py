"""The file of a stream's state: what goes in comes out, others can open it, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base import State
from tests.adapters.networks import CASES, Case
from tta_server.errors import BadInput
from tta_server.policies import make_policy, policy_digest, settings_of
from tta_server.state.portable import HEADER_BYTES, Manifest, Portable
from tta_server.state.records import Field
from tta_server.state.slots import Layout

FORMAT_1 = Path(__file__).parent / "data" / "format-1.safetensors"
"""Written when the format was new. It must not be written anew: there are others like it."""

MANIFEST = Manifest(
    stream="camera-7",
    model="digits",
    model_digest="5e" * 32,
    policy="tent",
    settings={"lr": 0.001, "ostta": None, "nesterov": True, "skip": ["layer4", "norm"]},
    policy_digest="9c" * 32,
    version=41,
    request_number=57,
    random_key=2**63 - 1,
    created=1750000000.25,
    exported=1750003600.5,
)
FIELDS = (
    Field("memory/step", "I64", ()),
    Field("weights/norm.weight", "F32", (2,)),
    Field("memory/mean", "BF16", (1, 1)),
    Field("memory/warm", "BOOL", (3,)),
)
"""In the order that safetensors gives them as well."""
DATA = struct.pack("<q2f", 41, 0.5, -1.25) + b"\x80\x3f" + b"\1\0\1"
PORTABLE = Portable(MANIFEST, FIELDS, DATA)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

briefly = settings(max_examples=200, deadline=None, derandomize=True, database=None)


# Writing and reading


def test_round_trip() -> None:
    assert Portable.parse(PORTABLE.dump()) == PORTABLE
    first = dataclasses.replace(MANIFEST, version=0, request_number=None, random_key=0, settings={})
    other = dataclasses.replace(PORTABLE, manifest=first)
    assert Portable.parse(other.dump()) == other


def test_a_state_without_tensors() -> None:
    empty = Portable(MANIFEST, (), b"")
    assert Portable.parse(empty.dump()) == empty


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3), (1, 1, 1, 1)], ids=str)
def test_dtypes_and_shapes(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """All that a state can have; the values are those that torch reads from the file."""
    tensor = (torch.arange(math.prod(shape)).view(shape) % 5).to(DTYPES[dtype])
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    portable = Portable(MANIFEST, (Field("memory/x", dtype, shape),), data)
    assert Portable.parse(portable.dump()) == portable
    (tmp_path / "state").write_bytes(portable.dump())
    loaded = safetensors.torch.load_file(tmp_path / "state")["memory/x"]
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(loaded, tensor)


def test_other_readers_can_open_it(tmp_path: Path) -> None:
    path = tmp_path / "camera-7.safetensors"
    path.write_bytes(PORTABLE.dump())
    tensors = safetensors.torch.load_file(path)
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "memory/step": 41,
        "weights/norm.weight": [0.5, -1.25],
        "memory/mean": [[1.0]],
        "memory/warm": [True, False, True],
    }
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "tta-server stream, version 1"
    assert json.loads(metadata["manifest"]) == dataclasses.asdict(MANIFEST)
    assert json.loads(metadata["tensors"]) == [[name, dtype, list(shape)] for name, dtype, shape in FIELDS]


@st.composite
def portables(draw: st.DrawFn) -> Portable:
    fields, data = [], []
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, max_size=6)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        values = torch.zeros(shape, dtype=DTYPES[dtype])
        if values.numel():
            values.view(-1)[0] = draw(st.integers(0, 1))
        fields.append(Field(draw(st.sampled_from(["weights/", "memory/"])) + name, dtype, shape))
        data.append(values.view(-1).view(torch.uint8).numpy().tobytes())
    names = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
    digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
    text = st.text(st.characters(codec="utf-8"))
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | text
        | st.floats(allow_nan=False, allow_infinity=False)
    )
    times = st.floats(0, 2.5e11)
    manifest = st.builds(
        Manifest,
        stream=names,
        model=names,
        model_digest=digests,
        policy=st.text(st.characters(codec="utf-8"), min_size=1, max_size=128),
        settings=st.dictionaries(text, scalars | st.lists(scalars) | st.dictionaries(text, scalars)),
        policy_digest=digests,
        version=st.integers(0, 2**62 - 1),
        request_number=st.none() | st.integers(0, 2**64 - 1),
        random_key=st.integers(0, 2**63 - 1),
        created=times,
        exported=times,
    )
    return Portable(draw(manifest), tuple(fields), b"".join(data))


@settings(briefly, max_examples=100)
@given(portables())
def test_any_state_comes_back(portable: Portable) -> None:
    assert Portable.parse(portable.dump()) == portable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_of_every_policy(case: Case) -> None:
    """As a new stream has them, and after two steps; the settings make the same policy again."""
    digest = policy_digest(case.policy)
    manifest = dataclasses.replace(
        MANIFEST, policy=case.policy.name, settings=settings_of(case.policy), policy_digest=digest
    )
    for state in (*case.init(1), *case.warm(0, (5,))):
        fields, data = dumped(state)
        read = Portable.parse(Portable(manifest, fields, data).dump())
        assert (read.fields, read.data) == (fields, data)
        policy = make_policy(read.manifest.policy, read.manifest.settings)
        assert (policy, policy_digest(policy)) == (case.policy, digest)


def dumped(state: State) -> tuple[tuple[Field, ...], bytes]:
    layout = Layout(state)
    return layout.fields, layout.dump({dtype: rows[0] for dtype, rows in layout.pack(state).items()})


def test_dump_refuses_what_could_not_be_read() -> None:
    with pytest.raises(ValueError, match="the tensors take 21 bytes, got 20"):
        Portable(MANIFEST, FIELDS, DATA[:-1]).dump()
    with pytest.raises(ValueError, match="not JSON compliant"):
        Portable(dataclasses.replace(MANIFEST, settings={"lr": math.inf}), FIELDS, DATA).dump()
    many = tuple(Field(f"memory/{'x' * 100}{index}", "U8", (0,)) for index in range(20_000))
    with pytest.raises(ValueError, match=r"the header takes [\d,]+ bytes; at most 4,194,304 can be read again"):
        Portable(MANIFEST, many, b"").dump()


def test_reads_format_1() -> None:
    assert Portable.parse(FORMAT_1.read_bytes()) == PORTABLE


# What is no such file


def forge(manifest: Any = None, tensors: Any = None, entries: Any = None, data: bytes = DATA, **metadata: Any) -> bytes:
    """A file like PORTABLE's with other parts, as objects or as JSON text, and the checksum that fits them."""
    manifest = dataclasses.asdict(MANIFEST) if manifest is None else manifest
    tensors = [list(field) for field in FIELDS] if tensors is None else tensors
    entries = entries_of(*FIELDS) if entries is None else entries
    said = {"format": "tta-server stream, version 1", "manifest": as_text(manifest), "tensors": as_text(tensors)}
    digest = hashlib.blake2b(digest_size=16)
    for part in [*(text.encode(errors="surrogatepass") for text in said.values()), data]:
        digest.update(b"%d;" % len(part) + part)
    said = {key: text for key, text in (said | {"checksum": digest.hexdigest()} | metadata).items() if text is not None}
    return sealed('{"__metadata__":' + json.dumps(said) + as_text(entries).replace("{", ",", 1), data)


def as_text(part: Any) -> str:
    return part if isinstance(part, str) else json.dumps(part)


def sealed(header: str | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header)) + header + data


def entries_of(*fields: Field) -> dict[str, Any]:
    """The header's entries of tensors one behind the other."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    made, start = {}, 0
    for name, dtype, shape in fields:
        end = start + math.prod(shape) * sizes.get(dtype, 1)
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    return made


def claim(**changes: Any) -> bytes:
    """A file with another manifest; ``...`` leaves an entry out."""
    said = dataclasses.asdict(MANIFEST) | changes
    return forge({key: value for key, value in said.items() if value is not ...})


def with_state(*fields: Field, data: bytes) -> bytes:
    """A file with another state."""
    return forge(tensors=[list(field) for field in fields], entries=entries_of(*fields), data=data)


def with_entry(name: str, **changes: Any) -> bytes:
    """A file with another entry of a tensor."""
    entries = entries_of(*FIELDS)
    return forge(entries=entries | {name: entries[name] | changes})


def test_what_is_forged_here_is_otherwise_sound() -> None:
    """So that the cases below are refused for their own fault."""
    assert Portable.parse(forge()) == PORTABLE
    assert Portable.parse(claim(version=3)).manifest.version == 3
    assert Portable.parse(with_state(FIELDS[0], data=DATA[:8])) == Portable(MANIFEST, FIELDS[:1], DATA[:8])


FILE = FORMAT_1.read_bytes()
HEADER = 8 + int.from_bytes(FILE[:8], "little")

X = "memory/x"
MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "of 0 bytes the header would take 0, which must be from 2"),
    "an empty header": (lambda: bytes(8), "of 8 bytes the header would take 0, which must be from 2"),
    "no header": (lambda: FILE[:8], r"of 8 bytes the header would take 992"),
    "half a header": (lambda: FILE[:300], r"cut off: of 300 bytes the header would take 992, .* from 2 to 292"),
    "half of the tensors": (lambda: FILE[:-4], "cut off, .* its tensors take 21 bytes, 17 follow the header"),
    "something behind": (lambda: FILE + b"\0", "behind its end: its tensors take 21 bytes, 22 follow the header"),
    "a header without end": (lambda: b"\xff" * 100, "the header would take 18,446,744,073,709,551,615"),
    "a header too large": (
        lambda: sealed(" " * (HEADER_BYTES + 8)), r"would take 4,194,312, which must be from 2 to 4,194,304"
    ),
    "no text": (lambda: sealed(b'{"\xff": 1}'), "the file's header is no JSON: 'utf-8' codec can't decode"),
    "UTF-16": (lambda: sealed("{}".encode("utf-16")), "the file's header is no JSON: 'utf-8' codec"),
    "no JSON": (lambda: sealed('{"a": }'), r"the file's header is no JSON: Expecting value: line 1 column 7"),
    "nested deep": (lambda: sealed("[" * 100_000), "the file's header is nested too deep"),
    "no object": (lambda: sealed("[1, 2]"), "its header must have metadata; got None"),
    "a name twice": (lambda: sealed('{"a": 1, "a": 1}'), "the file's header is no JSON: 'a' is there twice"),
    "an endless number": (lambda: sealed('{"a": ' + "9" * 5000 + "}"), "Exceeds the limit"),
    "no metadata": (lambda: safetensors.torch.save({"a": torch.zeros(1)}), "its header must have metadata; got None"),
    "metadata of another kind": (lambda: sealed('{"__metadata__": "x"}'), "must have metadata; got 'x'"),
    "other metadata": (
        lambda: safetensors.torch.save({"a": torch.zeros(1)}, {"format": "pt"}),
        "no stream's file: its metadata's format must be 'tta-server stream, version 1', got 'pt'",
    ),
    "a newer format": (
        lambda: forge(format="tta-server stream, version 2"),
        "written by a newer release: it has format 2, this one knows 1",
    ),
    "a newer format with other metadata": (
        lambda: forge(format="tta-server stream, version 12", manifest=None, more="x"),
        "it has format 12, this one knows 1",
    ),
    "format 0": (lambda: forge(format="tta-server stream, version 0"), "format must be"),
    "no checksum": (lambda: forge(checksum=None), r"metadata must have format, manifest, .*; got \['format'"),
    "more metadata": (lambda: forge(more="x"), "metadata must have format, manifest, tensors, checksum; got"),
    "a number as metadata": (lambda: forge(checksum=1), "metadata must be text; checksum is int"),
    "a manifest of no JSON": (lambda: forge("version 3"), "the file's manifest is no JSON: Expecting value"),
    "a manifest of no object": (lambda: forge("[]"), "the file's manifest must have stream, model, .*; got list"),
    "a manifest with half a character": (lambda: forge('{"stream": "\\ud800"}'), "the file's manifest must have"),
    "an id of half a character": (lambda: claim(stream="\ud800"), "the file's manifest cannot be used"),
    "an entry missing": (lambda: claim(version=...), "the file's manifest must have stream, .*; got"),
    "an entry too many": (lambda: claim(more=1), "the file's manifest must have stream, .*; got"),
    "an entry twice": (
        lambda: forge(json.dumps(dataclasses.asdict(MANIFEST)).replace('"model":', '"model": "a", "model":')),
        "the file's manifest is no JSON: 'model' is there twice",
    ),
    "an id with a slash": (lambda: claim(stream="a/b"), "stream: String should match pattern .*, got 'a/b'"),
    "an id with a line end": (lambda: claim(stream="a\n"), r"stream: String should match pattern .*, got 'a\\n'"),
    "an id too long": (lambda: claim(stream="a" * 129), "stream: String should match pattern"),
    "a model's name": (lambda: claim(model=""), "model: String should match pattern .*, got ''"),
    "a digest": (lambda: claim(model_digest="5E" * 32), "model_digest: String should match pattern"),
    "a policy's digest": (lambda: claim(policy_digest="9c"), "policy_digest: String should match pattern"),
    "no policy": (lambda: claim(policy=""), "policy: String should have at least 1 character"),
    "a negative version": (lambda: claim(version=-1), "version: Input should be greater than or equal to 0, got -1"),
    "a version of 2^62": (lambda: claim(version=2**62), "version: Input should be less than 4611686018427387904"),
    "a version as text": (lambda: claim(version="1"), "version: Input should be a valid integer, got '1'"),
    "a version with a point": (lambda: claim(version=1.0), "version: Input should be a valid integer, got 1.0"),
    "a version that is true": (lambda: claim(version=True), "version: Input should be a valid integer, got True"),
    "a request number": (lambda: claim(request_number=-1), "request_number: Input should be greater than or equal"),
    "a request number of 2^64": (lambda: claim(request_number=2**64), "request_number: Input should be less than"),
    "a random key of 64 bits": (lambda: claim(random_key=2**63), "random_key: Input should be less than"),
    "a negative random key": (lambda: claim(random_key=-1), "random_key: Input should be greater than or equal"),
    "before 1970": (lambda: claim(created=-1.0), "created: Input should be greater than or equal to 0"),
    "after 9999": (lambda: claim(exported=1e12), "exported: Input should be less than or equal to 253402300799"),
    "no time": (lambda: claim(created=math.nan), "created: Input should be"),
    "settings of no object": (lambda: claim(settings=[1]), r"settings: Input should be .*, got \[1\]"),
    "an infinite setting": (lambda: claim(settings={"lr": math.inf}), "settings: .*every number must be finite"),
    "a setting as large": (
        lambda: forge(json.dumps(dataclasses.asdict(MANIFEST)).replace("0.001", "1e999")),
        "settings: .*every number must be finite",
    ),
    "settings nested deep": (
        lambda: claim(settings={"a": [[[[1]]]]}), "settings: .*the limit is 4 levels of lists and objects"
    ),
    "settings nested very deep": (
        lambda: claim(settings=json.loads('{"a":' * 900 + "1" + "}" * 900)),
        "the file's manifest",
    ),
    "tensors of no list": (lambda: forge(tensors={}), "the file's tensors must be a list, got dict"),
    "a tensor without a shape": (lambda: forge(tensors=[["memory/x", "F32"]]), r"must be \[name, dtype, shape\], got"),
    "a tensor of other types": (lambda: forge(tensors=[[1, "F32", []]]), r"must be \[name, dtype, shape\], got \[1, "),
    "a tensor outside": (
        lambda: forge(tensors=[["adam/x", "F32", []]]),
        "a tensor's name must be weights/<key> or memory/<key>, got 'adam/x'",
    ),
    "a tensor without a key": (lambda: forge(tensors=[["weights/", "F32", []]]), "name must be weights/<key> or"),
    "the metadata as a tensor": (lambda: forge(tensors=[["__metadata__", "F32", []]]), "name must be weights/<key> or"),
    "a tensor listed twice": (
        lambda: forge(tensors=[["memory/x", "F32", []], ["memory/x", "F64", []]]),
        "must differ in name, got 'memory/x' twice",
    ),
    "a dtype of four bits": (
        lambda: forge(tensors=[["memory/x", "F4", [2]]]), "dtype of 'memory/x' must be one of F64, .*, got 'F4'"
    ),
    "a negative size": (lambda: forge(tensors=[["memory/x", "F32", [-1]]]), "shape of 'memory/x' must be .*, got"),
    "a size with a point": (lambda: forge(tensors=[["memory/x", "F32", [1.0]]]), "shape of 'memory/x' must be at"),
    "a size that is true": (lambda: forge(tensors=[["memory/x", "F32", [True]]]), "shape of 'memory/x' must be at"),
    "a size beyond all": (
        lambda: with_state(Field(X, "F32", (2**40, 2**40)), data=b"\0" * 8),
        r"shape of 'memory/x' must be at most 64 whole numbers with a product below 2\^63, got \[1099511627776, 1099",
    ),
    "a size beyond the file": (
        lambda: with_state(Field(X, "F32", (2**40,)), data=b"\0" * 8),
        "its tensors take 4,398,046,511,104 bytes, 8 follow the header",
    ),
    "none of a size beyond all": (
        lambda: with_state(Field(X, "F32", (2**60, 2**60, 0)), data=b""),
        "tensors cannot be read: .*overflow",
    ),
    "sizes without end": (lambda: with_state(Field(X, "U8", (1,) * 65), data=b"\0"), "must be at most 64 whole"),
    "a tensor that is not listed": (
        lambda: forge(tensors=[list(field) for field in FIELDS[:3]], data=DATA),
        "its tensors take 18 bytes, 21 follow the header",
    ),
    "an empty tensor that is not listed": (
        lambda: forge(entries=entries_of(*FIELDS, Field(X, "F32", (0,)))),
        r"not those it lists: it lists no more, it has 'memory/x' F32 \[0\]",
    ),
    "an empty tensor that is not there": (
        lambda: forge(tensors=[list(field) for field in FIELDS] + [["memory/x", "F32", [0]]]),
        r"it lists 'memory/x' F32 \[0\], it has no more",
    ),
    "another dtype than listed": (
        lambda: with_entry("memory/step", dtype="F64"),
        r"it lists 'memory/step' I64 \[\], it has 'memory/step' F64 \[\]"
    ),
    "another shape than listed": (
        lambda: with_entry("memory/mean", shape=[1]),
        r"it lists 'memory/mean' BF16 \[1, 1\], it has 'memory/mean' BF16 \[1\]",
    ),
    "tensors that overlap": (
        lambda: with_entry("weights/norm.weight", data_offsets=[4, 12]), "tensors cannot be read: .*invalid offset"
    ),
    "a gap between tensors": (
        lambda: with_entry("memory/mean", data_offsets=[17, 19]), "tensors cannot be read: .*invalid offset"
    ),
    "a tensor beyond the end": (
        lambda: with_entry("memory/warm", data_offsets=[18, 2**63]), "the file's tensors cannot be read"
    ),
    "a tensor that ends before it starts": (
        lambda: with_entry("memory/warm", data_offsets=[21, 18]), "the file's tensors cannot be read"
    ),
    "a negative offset": (lambda: with_entry("memory/step", data_offsets=[-8, 0]), "the file's tensors cannot be read"),
    "an entry of no tensor": (lambda: forge(entries={"memory/step": 1}), "the file's tensors cannot be read"),
    "a tensor there twice": (
        lambda: forge(entries=json.dumps(entries_of(*FIELDS)).replace("memory/mean", "memory/step")),
        "the file's header is no JSON: 'memory/step' is there twice",
    ),
    "another checksum": (
        lambda: forge(checksum="0" * 32), "altered: its checksum is [0-9a-f]{32}, it says '0000"
    ),
    "a changed number": (lambda: FILE[:-2] + b"\1" + FILE[-1:], "the file was altered: its checksum is"),
    "a changed setting": (lambda: FILE.replace(b"0.001", b"0.002"), "the file was altered: its checksum is"),
    "two tensors that changed places": (
        lambda: swapped(Field("memory/a", "U8", (1,)), Field("memory/b", "U8", (1,))),
        "the file was altered: its checksum is",
    ),
    "a BOOL of 2": (lambda: forge(data=DATA[:-1] + b"\2"), "a BOOL is 0 or 1; tensor 'memory/warm' has 2"),
}  # fmt: skip


def swapped(a: Field, b: Field) -> bytes:
    """The one's bytes under the other's name."""
    file = with_state(a, b, data=b"\0\1")
    assert Portable.parse(file).data == b"\0\1"
    entries = entries_of(a, b)
    entries[a.name], entries[b.name] = entries[b.name], entries[a.name]
    return file.replace(json.dumps(entries_of(a, b))[1:].encode(), json.dumps(entries)[1:].encode())


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    make, said = MALFORMED[case]
    with pytest.raises(BadInput, match=f"(?s){said}") as refused:
        Portable.parse(make())
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "largest"])
def test_numbers_that_are_not_finite(dtype: str, value: float | str) -> None:
    """Refused, and the largest finite ones are not."""
    kind = DTYPES[dtype]
    large = torch.finfo(kind).max
    values = torch.tensor([-large, large, large if value == "largest" else float(value)], dtype=kind)
    fields = (FIELDS[0], Field("weights/norm.weight", dtype, (3,)))
    data = bytes(8) + values.view(torch.uint8).numpy().tobytes()
    file = Portable(MANIFEST, fields, data).dump()
    if value == "largest":
        assert Portable.parse(file).data == data
    else:
        with pytest.raises(BadInput, match=r"must be finite; tensor 'weights/norm\.weight' has an infinity or a NaN"):
            Portable.parse(file)


# Noise


def is_refused(body: bytes) -> bool:
    """Whether it is refused, in our own words."""
    try:
        Portable.parse(body)
    except BadInput:
        return True
    return False


def test_every_flipped_bit() -> None:
    number = int.from_bytes(FILE, "little")
    for place in range(8 * len(FILE)):
        assert is_refused((number ^ 1 << place).to_bytes(len(FILE), "little")), divmod(place, 8)


def test_every_truncation() -> None:
    for length in range(len(FILE)):
        assert is_refused(FILE[:length]), length
        assert is_refused(FILE[:length] + FILE[length + 1 :]), length
        assert is_refused(FILE[length + 1 :]), length


@briefly
@given(st.binary(max_size=200), st.integers(0, 1))
def test_random_bytes(noise: bytes, has_header: int) -> None:
    assert is_refused(sealed(noise) if has_header else noise)
    assert is_refused(FILE[: HEADER + 21 - len(noise)] + noise) or FILE.endswith(noise)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**63, 2**64, 1e400, "F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(briefly, max_examples=300)
@given(st.sampled_from(["manifest", "tensors", "entries"]), st.data())
def test_a_part_that_is_something_else(part: str, data: st.DataObject) -> None:
    """One value anywhere in the header is replaced, and the checksum made to fit: refused, or sound all the same."""
    parts = {
        "manifest": dataclasses.asdict(MANIFEST),
        "tensors": [[name, dtype, list(shape)] for name, dtype, shape in FIELDS],
        "entries": json.loads(json.dumps(entries_of(*FIELDS))),
    }
    holder: Any = parts
    key: Any = part
    while data.draw(st.booleans()) and isinstance(holder[key], dict | list) and holder[key]:
        holder = holder[key]
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[key] = data.draw(values)
    texts = {name: json.dumps(made) for name, made in parts.items()}
    try:
        read = Portable.parse(forge(texts["manifest"], texts["tensors"], texts["entries"]))
    except BadInput:
        return
    assert Portable.parse(read.dump()) == read


LONG = f"memory/{'x' * 200_000}"
HOSTILE = {
    "lists": lambda: sealed('{"a":[' + "[]," * 100_000 + "0]}"),
    "names": lambda: sealed("{" + ",".join(f'"{n:x}":0' for n in range(40_000)) + "}"),
    "a name that ends alike": lambda: sealed("{" + ",".join(f'"{n:x}":0' for n in range(40_000)) + ',"9c3f":0}'),
    "a manifest of names": lambda: forge(dict.fromkeys(map(str, range(40_000)), 0)),
    "tensors of numbers": lambda: forge(tensors=[0] * 100_000),
    "sizes": lambda: forge(tensors=[["memory/x", "F32", [2**62] * 20_000]]),
    "tensors": lambda: forge(tensors=[[f"memory/{n:x}", "F32", [2**40, 2**20]] for n in range(3_000)]),
    "a shape": lambda: forge(tensors=[["memory/x", "F32", [2**40, 2**22]]]),
    "settings": lambda: claim(settings={"a": [math.inf] * 50_000}),
    "a long name": lambda: sealed('{"' + "x" * 400_000 + '": 1}'),
    "a long name twice": lambda: sealed(f'{{"{LONG}": 1, "{LONG}": 1}}'),
    "long metadata": lambda: sealed(f'{{"__metadata__": "{LONG}"}}'),
    "a long format": lambda: forge(format=LONG),
    "a long checksum": lambda: forge(checksum=LONG),
    "a long entry": lambda: forge(tensors=[LONG]),
    "a long name of no dtype": lambda: forge(tensors=[[LONG, "F4", []]]),
    "a long name of another dtype": lambda: forge(
        tensors=[[LONG, "U8", [1]]], entries=entries_of(Field(LONG, "I8", (1,))), data=b"\0"
    ),
    "a long name of a tensor": lambda: forge(
        tensors=[[LONG, "U8", [1]], [X, "U8", [1]]],
        entries=entries_of(Field(LONG, "U8", (1,))) | entries_of(Field(X, "U8", (1,))),
        data=b"\0\0",
    ),
    "data": lambda: with_state(Field("memory/x", "F32", (100_000,)), data=b"\xff" * 400_000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_memory_and_messages_are_bounded(case: str) -> None:
    body = HOSTILE[case]()
    tracemalloc.start()
    try:
        with pytest.raises(BadInput) as refused:
            Portable.parse(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * len(body) + 2**20
    assert len(str(refused.value)) < 1000
