#!/usr/bin/python3
"""Writes the seeds of fuzz_tokenizer into a folder: vocab.json, merges.txt and a text with NUL between them.

Usage: tests/fuzz/seeds_tokenizer.py FOLDER. Needs Python alone.
"""
import json
import pathlib
import sys

TOKENS = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab", "ab</w>", "abb</w>", ",</w>", "Ã", "©</w>"]
VOCAB = json.dumps({token: i for i, token in enumerate(TOKENS)}, ensure_ascii=False)
MERGES = "#version: 0.2\na b\na b</w>\nab b</w>\n"
TEXTS = {
    "plain": "ab abb, a b's 12",
    "weights": r"(ab:1.2) [[b]] ((a:-0.5) \( x) BREAK (b",
    "specials": "<|ENDOFTEXT|>ab<|startoftext|>!<|endoftext|",
    "unicode": "É é e\u0327\u0301 İ Σς 가 \u3000½👩\u200d🚀",
    "commas": "a, " * 60 + "ab " * 30,
}


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        (folder / name).write_bytes("\0".join((VOCAB, MERGES, text)).encode())
    (folder / "twice").write_bytes("\0".join((VOCAB[:-1] + ',"a":2}', MERGES, "a")).encode())
    (folder / "gap").write_bytes("\0".join((VOCAB[:-1] + ',"x":99}', MERGES, "a")).encode())
    (folder / "stranger").write_bytes("\0".join((VOCAB, MERGES + "a x\n", "a")).encode())


if __name__ == "__main__":
    main()
