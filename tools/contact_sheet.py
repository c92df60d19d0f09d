#!/usr/bin/env python3
"""Draws a list of prompts through a running server and puts the pictures on one sheet, each above its prompt.

    build/release/safelight serve --port 8080 &
    tools/contact_sheet.py --url http://127.0.0.1:8080 --prompts tools/train/contact.txt --out docs/contact-sheet.png

Needs Pillow. Nothing is chosen: the first picture is drawn with --seed, the next with one more, and so on.
"""
import argparse
import io
import json
import textwrap
import urllib.request

from PIL import Image, ImageDraw, ImageFont


def draw(url, prompt, seed):
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    headers = {"Content-Type": "application/json", "Accept": "image/png"}
    request = urllib.request.Request(url + "/v1/images/generations", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def sheet(pictures, prompts, columns):
    width, height = pictures[0].size
    gap, text = 8, 34
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default()
    for i, (picture, prompt) in enumerate(zip(pictures, prompts)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + text + gap)
        out.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline="#dddddd")
        pen.text((x, y + height + 3), "\n".join(textwrap.wrap(prompt, width // 6)[:3]), fill="#333333", font=font, spacing=0)
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", default="http://127.0.0.1:8080")
    ap.add_argument("--prompts", default="tools/train/contact.txt", help="one prompt a line")
    ap.add_argument("--out", default="docs/contact-sheet.png")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--columns", type=int, default=8)
    a = ap.parse_args()
    with open(a.prompts, encoding="utf-8") as f:
        prompts = [line.strip() for line in f if line.strip()]
    pictures = [draw(a.url, prompt, a.seed + i) for i, prompt in enumerate(prompts)]
    sheet(pictures, prompts, a.columns).save(a.out, optimize=True)


if __name__ == "__main__":
    main()
