#!/usr/bin/env python3
"""check_images.py FOLDER - holds files to Pillow: their pixels to picture.raw, their texts to parameters.txt and xmp.txt. Called by test_image_formats.c.

FOLDER/list has a line per file: name, width, height, the least PSNR in dB (0: equal), and what text it must hold: full, long, none.
"""
import pathlib
import sys

import numpy as np
from PIL import Image

FOLDER = pathlib.Path(sys.argv[1])
TAG_EXIF, TAG_COMMENT = 0x8769, 0x9286


def comment(picture):
    data = picture.getexif().get_ifd(TAG_EXIF).get(TAG_COMMENT)
    if data is None:
        return None
    if data.startswith(b"UNICODE\0"):
        return data[8:].decode("utf-16-be")
    assert data.startswith(b"ASCII\0\0\0"), data[:8]
    return data[8:].decode("ascii")


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


checked = 0
for line in (FOLDER / "list").read_text().splitlines():
    name, width, height, least, text = line.split()
    want = np.frombuffer((FOLDER / f"{name}.raw").read_bytes(), np.uint8).reshape(int(height), int(width), 3)
    with Image.open(FOLDER / name) as picture:
        picture.load()
        assert picture.mode == "RGB" and picture.format.lower() == {"jpg": "jpeg"}.get(name.rsplit(".")[1], name.rsplit(".")[1]), name
        got = np.asarray(picture)
        assert got.shape == want.shape, name
        assert np.array_equal(got, want) if least == "0" else psnr(got, want) >= float(least), (name, psnr(got, want))
        said = picture.info.get("parameters") if name.endswith(".png") else comment(picture)
        xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp")
        xmp = xmp.decode() if isinstance(xmp, bytes) else xmp
        if text == "none":
            assert said is None and xmp is None, name
        else:
            assert said == (FOLDER / f"{text}.txt").read_bytes().decode("utf-8", "replace"), (name, said)
            assert xmp == (FOLDER / "xmp.txt").read_bytes().decode(), (name, xmp)
    checked += 1
assert checked >= 12, checked
