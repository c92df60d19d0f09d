#!/usr/bin/env python3
"""make_images.py FOLDER - files of every kind that image_read takes, by Pillow, with what Pillow reads in them. Called by test_image_read.c.

One line per file in FOLDER/list: name, width, height, channels, how far a byte may be off. NAME.raw holds the pixels, upright. The files whose names begin
with resize- hold pixels alone: what Pillow's LANCZOS makes of the picture in source.png, rows first: from version 13 on it begins with the columns where that
is quicker, which rounds in another order (at-once-).
"""
import pathlib
import struct
import sys
import zlib

import numpy as np
from PIL import Image, ImageOps

FOLDER = pathlib.Path(sys.argv[1])
FOLDER.mkdir(parents=True, exist_ok=True)
W, H = 37, 23
LIST = []

y, x = np.mgrid[0:H, 0:W].astype(float)
noise = np.random.default_rng(1)
waves = np.stack([128 + 100 * np.sin(x / 5 + y / 9), 6 * x + 30 * np.cos(y / 3), 255 - 9 * y, 255 * (x > 12) * (y / H)], axis=2)
rgba = Image.fromarray(np.clip(waves + noise.normal(0, 4, waves.shape), 0, 255).astype(np.uint8), "RGBA")
rgb = rgba.convert("RGB")


def expect(name, picture, slack=0):
    (FOLDER / f"{name}.raw").write_bytes(picture.tobytes())
    LIST.append(f"{name} {picture.width} {picture.height} {len(picture.getbands())} {slack}")


def add(name, picture, channels="RGB", slack=0, **options):
    picture.save(FOLDER / name, **options)
    with Image.open(FOLDER / name) as read:
        upright = ImageOps.exif_transpose(read)
        expect(name, upright.convert(channels), slack)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = "a description"
    return tags.tobytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(name, picture, *before_idat, body=None):
    """A PNG file by hand, for what Pillow does not write."""
    rows = np.asarray(picture)
    body = body if body is not None else b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, int(name == "adam7.png"))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(before_idat) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    (FOLDER / name).write_bytes(data)


def adam7(picture):
    rows, out = np.asarray(picture), b""
    for left, top, right, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        for row in rows[top::down, left::right]:
            out += b"\0" + row.tobytes() if row.size else b""
    return out


add("rgb.png", rgb)
add("rgba.png", rgba, "RGBA")
add("grey.png", rgb.convert("L"))
add("grey-alpha.png", rgba.convert("LA"), "RGBA")
add("bits.png", rgb.convert("1"))
add("palette.png", rgb.quantize(13))
add("palette-clear.png", rgb.quantize(200), "RGBA", transparency=3)
add("key.png", rgb.quantize(30).convert("RGB"), "RGBA", transparency=rgb.quantize(30).convert("RGB").getpixel((0, 0)))
deep = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) * 257))
deep.save(FOLDER / "deep.png")
expect("deep.png", rgb.convert("L").convert("RGB"), 1)
png("adam7.png", rgb, body=adam7(rgb))
expect("adam7.png", rgb)
for o in range(1, 9):
    add(f"turned-{o}.jpg", rgb, slack=1, quality=95, subsampling=0, exif=exif(o))
add("turned-6.png", rgb, exif=exif(6))
add("turned-8.webp", rgb, lossless=True, exif=exif(8))
add("plain.jpg", rgb, slack=3, quality=90)
add("progressive.jpg", rgb, slack=3, quality=80, progressive=True)
add("grey.jpg", rgb.convert("L"), slack=1)
add("inks.jpg", rgb.convert("CMYK"), slack=3, quality=95, subsampling=0)
add("lossy.webp", rgb, slack=3, quality=80)
add("lossless.webp", rgb, lossless=True)
add("alpha.webp", rgba, "RGBA", lossless=True, exact=True)

# Refused, but well formed.
rgb.save(FOLDER / "moving.webp", save_all=True, append_images=[rgb.rotate(180)], duration=100)
rgb.save(FOLDER / "other.gif")
rgb.save(FOLDER / "other.bmp")
# 1 GB of text, and pixels all the same.
bomb = zlib.compressobj(9)
zeros = b"".join(bomb.compress(b"\0" * (1 << 20)) for _ in range(256)) + bomb.flush()
png("text-bomb.png", rgb, chunk(b"zTXt", b"Comment\0\0" + zeros))
# More pixels than its size says, and fewer.
png("too-much.png", rgb, body=b"\0" * (1 << 26))
png("too-little.png", rgb, body=b"\0" * 1000)
# Progressive files that say the same grey square over and over again.
head = b"\xff\xd8\xff\xdb\0\x43\0" + b"\1" * 64 + b"\xff\xc2\0\x0b\x08\0\x08\0\x08\1\1\x11\0" + b"\xff\xc4\0\x14\0\1" + b"\0" * 16
scan = b"\xff\xda\0\x08\1\1\0\0\0\0\x7f"
(FOLDER / "scans.jpg").write_bytes(head + scan * 200 + b"\xff\xd9")
(FOLDER / "few-scans.jpg").write_bytes(head + scan * 20 + b"\xff\xd9")
expect("few-scans.jpg", Image.new("RGB", (8, 8), (128, 128, 128)))

rgba.save(FOLDER / "source.png")
for w, h in ((37, 23), (16, 8), (64, 64), (5, 100), (1, 1), (74, 3), (36, 22), (38, 23), (3, 24), (300, 2)):
    bands = [band.resize((w, H), Image.Resampling.LANCZOS).resize((w, h), Image.Resampling.LANCZOS) for band in rgba.split()]
    expect(f"resize-{w}x{h}", Image.merge("RGBA", bands))
    bands = [band.resize((w, h), Image.Resampling.LANCZOS) for band in rgba.split()]
    expect(f"at-once-{w}x{h}", Image.merge("RGBA", bands))
white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
expect("white", Image.alpha_composite(white, rgba).convert("RGB"), 1)
expect("dropped", rgb)
expect("mask-alpha", ImageOps.invert(rgba.getchannel("A")))
expect("mask-opaque", rgba.getchannel("A"))
expect("mask-light", rgb.convert("L"))
(FOLDER / "list").write_text("\n".join(LIST) + "\n")
