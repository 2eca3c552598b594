"""The wire format: records come back equal, damaged bytes never become a record."""

import pickle
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import wire
from cluster.errors import WireError
from cluster.types import (
    GroupHeader,
    Message,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Verdict,
    VersionSpan,
)

FLOATS = st.floats(width=32, allow_nan=False)
SCORES = st.none() | st.floats(allow_nan=False)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(0, 12))
    tokens = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)
    mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    logprobs = draw(st.lists(FLOATS, min_size=length, max_size=length))
    return Trajectory(
        trajectory_id=draw(st.text(max_size=4)),
        group_id="g",
        task_id="t",
        context_tokens=np.array(draw(st.lists(st.integers(0, 99), max_size=4)), dtype=np.int32),
        token_ids=np.array(draw(tokens), dtype=np.int32),
        loss_mask=np.array(mask, dtype=bool),
        rollout_logprobs=np.array(logprobs, dtype=np.float32),
        version_spans=[VersionSpan(draw(st.integers(0, 9)), 0, length)],
        status=draw(st.sampled_from(TrajectoryStatus)),
        text=draw(st.text(max_size=8)),
        train_context_tokens=draw(st.none() | st.just(np.array([1, 2], dtype=np.int32))),
        verdicts=[Verdict(score=draw(SCORES), step_scores=[(1, draw(FLOATS))])],
        reward=draw(SCORES),
    )


@st.composite
def groups(draw: st.DrawFn) -> TrajectoryGroup:
    return TrajectoryGroup(
        group_id="g",
        task=Task(
            task_id="t",
            taskset="s",
            messages=[Message(role="user", content=draw(st.text(max_size=8)))],
        ),
        trajectories=draw(st.lists(trajectories(), max_size=3)),
        reward_versions={"correct": "v1"},
        priority=draw(st.floats(allow_nan=False)),
    )


def assert_equal(left: object, right: object) -> None:
    """Field by field, arrays with their dtype."""
    if isinstance(left, np.ndarray):
        assert isinstance(right, np.ndarray)
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, list):
        assert isinstance(right, list)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    elif isinstance(left, Trajectory | TrajectoryGroup):
        assert type(left) is type(right)
        for name in left.__struct_fields__:
            assert_equal(getattr(left, name), getattr(right, name))
    else:
        assert left == right


@given(groups())
@settings(max_examples=100, deadline=None)
def test_group_survives_the_round_trip(group: TrajectoryGroup) -> None:
    assert_equal(group, wire.decode(wire.encode(group), TrajectoryGroup))


@given(groups())
@settings(max_examples=30, deadline=None)
def test_header_survives_the_round_trip(group: TrajectoryGroup) -> None:
    header = GroupHeader.of(group)
    assert wire.decode(wire.encode(header), GroupHeader) == header


@given(groups(), st.data())
@settings(max_examples=100, deadline=None)
def test_one_changed_byte_is_noticed(group: TrajectoryGroup, data: st.DataObject) -> None:
    encoded = bytearray(wire.encode(group))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError, match=r"checksum|schema"):
        wire.decode(bytes(encoded), TrajectoryGroup)


@given(groups(), st.data())
@settings(max_examples=50, deadline=None)
def test_cut_bytes_are_noticed(group: TrajectoryGroup, data: st.DataObject) -> None:
    encoded = wire.encode(group)
    with pytest.raises(WireError):
        wire.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))], TrajectoryGroup)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_rubbish_with_a_valid_checksum_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(sealed(body), TrajectoryGroup)


def sealed(body: bytes) -> bytes:
    return bytes([wire.SCHEMA]) + zlib.crc32(body).to_bytes(4, "little") + body


def example_group() -> TrajectoryGroup:
    return TrajectoryGroup(
        group_id="g",
        task=Task(task_id="t", taskset="s", messages=[]),
        trajectories=[
            Trajectory(
                trajectory_id="x",
                group_id="g",
                task_id="t",
                context_tokens=np.array([1], dtype=np.int32),
                token_ids=np.array([2, 3], dtype=np.int32),
                loss_mask=np.array([True, False]),
                rollout_logprobs=np.array([-0.5, 0.0], dtype=np.float32),
                version_spans=[VersionSpan(0, 0, 2)],
                status=TrajectoryStatus.COMPLETED,
            )
        ],
    )


def test_another_schema_is_refused_by_number() -> None:
    encoded = wire.encode(example_group())
    with pytest.raises(WireError, match="schema 7, this build reads 1"):
        wire.decode(b"\x07" + encoded[1:], TrajectoryGroup)


def test_record_of_another_kind_is_refused() -> None:
    header = wire.encode(GroupHeader.of(example_group()))
    with pytest.raises(WireError, match="missing required field"):
        wire.decode(header, TrajectoryGroup)


def test_arrays_of_unequal_length_are_refused() -> None:
    plain = msgspec.msgpack.decode(wire.encode(example_group())[5:])
    plain["trajectories"][0]["loss_mask"] = msgspec.msgpack.Ext(3, b"\x01")
    with pytest.raises(WireError, match="one value per token: 1 values, 2 tokens"):
        wire.decode(sealed(msgspec.msgpack.encode(plain)), TrajectoryGroup)


def test_array_of_an_unknown_code_is_refused() -> None:
    plain = msgspec.msgpack.decode(wire.encode(example_group())[5:])
    plain["trajectories"][0]["token_ids"] = msgspec.msgpack.Ext(99, b"\x00" * 8)
    with pytest.raises(WireError, match="99"):
        wire.decode(sealed(msgspec.msgpack.encode(plain)), TrajectoryGroup)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, object])
def test_only_the_agreed_dtypes_travel(dtype: type) -> None:
    group = example_group()
    odd = msgspec.structs.replace(group.trajectories[0], token_ids=np.zeros(2, dtype=dtype))
    with pytest.raises(WireError, match="only int32, float32 and bool"):
        wire.encode(msgspec.structs.replace(group, trajectories=[odd]))


def test_pickle_is_never_read() -> None:
    with pytest.raises(WireError):
        wire.decode(pickle.dumps({"group_id": "g"}), TrajectoryGroup)
