"""Records to bytes and back: one schema byte, a crc32, then msgpack. Never pickle.

Invariant: `decode(encode(x))` equals x, and bytes that were cut, changed or written by another
schema raise `WireError` instead of producing a record. Arrays travel as little-endian bytes with
their dtype.
"""

import zlib
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from cluster.errors import WireError
from cluster.types import GroupHeader, TrajectoryGroup

SCHEMA = 1
_HEADER_BYTES = 5  # schema byte + crc32
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<i4"),
    2: np.dtype("<f4"),
    3: np.dtype("bool"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Record = TypeVar("Record")


def _encode_array(value: object) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray):
        array = cast(np.ndarray[Any, np.dtype[Any]], value)
        if array.dtype in _CODES:
            return msgspec.msgpack.Ext(_CODES[array.dtype], np.ascontiguousarray(array).tobytes())
    raise WireError(
        f"only int32, float32 and bool arrays travel, got {type(cast(object, value)).__name__}"
    )


def _decode_array(code: int, data: memoryview) -> np.ndarray:
    if code not in _DTYPES:
        raise WireError(f"unknown array code {code}")
    return np.frombuffer(data, dtype=_DTYPES[code])


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind, ext_hook=_decode_array)
    for kind in (TrajectoryGroup, GroupHeader)
}


def encode(record: msgspec.Struct) -> bytes:
    """Bytes of one record, ready for Redis."""
    body = _encoder.encode(record)
    return bytes([SCHEMA]) + zlib.crc32(body).to_bytes(4, "little") + body


def decode(data: bytes, kind: type[Record]) -> Record:
    """The record in `data`; raises `WireError` naming the reason (truncated, schema, checksum,
    shape).
    """
    if len(data) < _HEADER_BYTES:
        raise WireError(f"truncated: {len(data)} bytes")
    if data[0] != SCHEMA:
        raise WireError(f"schema {data[0]}, this build reads {SCHEMA}")
    body = memoryview(data)[_HEADER_BYTES:]
    if zlib.crc32(body) != int.from_bytes(data[1:_HEADER_BYTES], "little"):
        raise WireError("checksum mismatch")
    try:
        return _decoders[kind].decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise WireError(str(error)) from error
