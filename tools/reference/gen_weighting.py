"""Goldens of prompt weights and long prompts (prompt_weights.py) with the sd15 and sd21 text encoders.

Writes weighting.json and weighting.safetensors.
"""
import copy
import json
import os

import checkpoints
import common
import prompt_weights
import torch
import vocabulary

TAGS = "masterpiece, best quality, a red car, a yellow sunflower, blue background, highly detailed, cinematic lighting, "
PROMPTS = [
    "a red car",
    "a (red:1.3) car and a [blue] sunflower",
    "((glowing)) (tiny) castle, (a:0.5) [[dull]] (sky : 1.25 )",
    "a (very (deeply (nested:1.2) thing)) here",
    r"emoticon \(smile\) and \[square\] and back\\slash and \other",
    "a cat BREAK a (dog:1.4) BREAK",
    "(a cat BREAK a dog:1.4) outside",
    TAGS * 4 + "the end",
    "(" + TAGS * 4 + ":1.15), (last words:0.8)",
    "word " * 80,
    "unclosed (round [and square",
    "closing ) and ] and :1.5) are text",
    "time 12:30, ratio 16:9, (odd:1.2.3), (:1.2), (colon:)",
    "(negative:-0.5) (plus:+1.5) (dot:.5) (one:1.)",
    "",
    "()",
    "[a:b:0.5] AND [c|d]",
    "BREAKFAST at BREAK, xBREAK BREAK_",
    "BREAK BREAK",
    "(a:1.1)(b:1.1) (c)",
    "a" + ", b" * 37 + " c d e",
    ", " * 76 + "tail",
    "mixed (ünïcödé 🍎:1.2) \u3000 (東京:0.9)",
    "x , " + "very " * 60 + "long without commas " * 8,
]
CONTEXTS = (0, 1, 2, 3, 5, 6, 8, 13, 17)  # of these also the hidden states


def encode(model, chunks, dtype):
    rows = []
    for ids, weights in chunks:
        torch.set_default_dtype(dtype)
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
        torch.set_default_dtype(torch.float32)
        rows.append(hidden if all(w == 1.0 for w in weights) else prompt_weights.emphasise(hidden, weights))
    return torch.cat(rows)


def main():
    out = common.GoldenFile("weighting.safetensors", "context tensors of weighted and long prompts, text encoder of ckpt/sd15", prompts=CONTEXTS)
    tokenizer = vocabulary.fast()
    model = checkpoints.load_text_encoder("sd15")
    exact = copy.deepcopy(model).double()

    def tokenize(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    comma = tokenize(",")[0]
    entries = []
    for i, prompt in enumerate(PROMPTS):
        segments = prompt_weights.parse(prompt)
        chunks = prompt_weights.chunk(segments, tokenize, start, end, end, comma)
        entries.append({"prompt": prompt, "segments": segments, "chunks": [{"ids": a, "weights": b} for a, b in chunks]})
        if i in CONTEXTS:
            out.add(f"p{i}.context", encode(model, chunks, torch.float32), encode(exact, chunks, torch.float64))
    with open(os.path.join(common.GOLDEN, "weighting.json"), "w", encoding="utf-8", newline="\n") as f:
        f.write("[\n" + ",\n".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries) + "\n]\n")
    common.record("weighting.json", "prompts, their weighted segments, and the chunks of 77 ids and weights", prompts=len(PROMPTS))
    out.close()


if __name__ == "__main__":
    main()
