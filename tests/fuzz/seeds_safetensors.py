#!/usr/bin/python3
"""Writes the seeds of fuzz_safetensors into a folder: small files that are legal or break one rule each.

Usage: tests/fuzz/seeds_safetensors.py FOLDER. Needs Python alone.
"""
import json
import pathlib
import struct
import sys


def image(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}


def seeds():
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for dtype, size in SIZES.items():
        header[f"net.{dtype.lower()}.weight"] = tensor(dtype, [2, 3], at, at + 6 * size)
        at += 6 * size
    yield "every_dtype", image(header, bytes(at))
    yield "empty_object", image({})
    yield "padded", image(b"{}      ")
    yield "scalar_and_empty", image({"s": tensor("F32", [], 0, 4), "e": tensor("F32", [3, 0], 4, 4)}, bytes(4))
    yield "not_finite", image({"a": tensor("F32", [2], 0, 8), "h": tensor("F16", [5], 8, 18)}, b"\0\0\x80\x7f" * 2 + b"\0\x7c" * 5)
    yield "overlap", image({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 2, 6)}, bytes(6))
    yield "hole", image({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [1], 5, 6)}, bytes(6))
    yield "overflow", image({"a": tensor("F64", [2**61, 2**3], 0, 0)})
    yield "backwards", image({"a": tensor("U8", [4], 4, 0)}, bytes(4))
    yield "dims", image({"a": tensor("U8", [1] * 9, 0, 1)}, b"\0")
    yield "twice", image(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0")
    yield "metadata_list", image({"__metadata__": ["pt"]})
    yield "long_header", struct.pack("<Q", 2**63) + b"{}"
    yield "nested", image(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}")
    yield "no_name", image({"": tensor("U8", [1], 0, 1)}, b"\0")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
