"""Writes CLIP's vocab.json and merges.txt from the published BPE list.

python tokenizer.py --out DIR     bpe_simple_vocab_16e6.txt.gz comes from the
PyPI package open_clip_torch (MIT licence, OpenAI); pass --bpe FILE otherwise.
"""
import argparse
import gzip
import json
import os


def bytes_to_unicode():
    """CLIP's printable stand-ins for the 256 byte values, in CLIP's order."""
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars, extra = keep[:], 0
    for b in range(256):
        if b not in keep:
            keep.append(b)
            chars.append(256 + extra)
            extra += 1
    return [chr(c) for c in chars]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--bpe")
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    path = a.bpe
    if not path:
        import importlib.util
        base = os.path.dirname(importlib.util.find_spec("open_clip").origin)
        path = os.path.join(base, "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1:49152 - 256 - 2 + 1]
    base = bytes_to_unicode()
    vocab = base + [c + "</w>" for c in base] + ["".join(m.split()) for m in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    assert len(vocab) == 49408 and len(set(vocab)) == 49408
    os.makedirs(a.out, exist_ok=True)
    dump = lambda name, v: json.dump(v, open(os.path.join(a.out, name), "w"), ensure_ascii=False, separators=(",", ":"))
    dump("vocab.json", {t: i for i, t in enumerate(vocab)})
    with open(os.path.join(a.out, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "\n".join(merges) + "\n")
    token = lambda s: {"content": s, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"),
               "pad_token": "<|endoftext|>", "unk_token": token("<|endoftext|>")}
    dump("special_tokens_map.json", special)
    dump("tokenizer_config.json", {"add_prefix_space": False, "do_lower_case": True, "errors": "replace",
                                   "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
                                   "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                                   "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})


if __name__ == "__main__":
    main()
