"""CLIP's vocabulary and merges, and the two tokenizers that transformers builds from them.

Who uses it: every script that needs token ids. The files are those of weights/emoji/tokenizer; where they are missing, they
are derived from bpe_simple_vocab_16e6.txt.gz of the open_clip_torch package (MIT licence) in a temporary folder, the way
OpenAI's and Hugging Face's code does: 256 byte symbols, the same with </w>, 48,894 merges, two special tokens.
"""
import functools
import glob
import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import common
from transformers import CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
PACKAGE = "open_clip_torch==2.32.0"


def settings(name):
    """tokenizer_config.json and special_tokens_map.json as SD1.x and SD2.x ship them. SD2.x pads with "!", id 0."""
    pad = "!" if name == "sd21" else END

    def special(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    mapping = {"bos_token": special(START), "eos_token": special(END), "pad_token": pad, "unk_token": special(END)}
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **special(START)},
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **special(END)},
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **special(END)},
    }
    return {"tokenizer_config.json": config, "special_tokens_map.json": mapping}


def derive(folder):
    """Write vocab.json and merges.txt into `folder`."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True
    )
    wheel = glob.glob(os.path.join(folder, "*.whl"))[0]
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode("utf-8").split("\n")
    merges = lines[1 : MERGES + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges] + [START, END]
    with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as out:
        json.dump({token: i for i, token in enumerate(tokens)}, out, ensure_ascii=False, separators=(",", ":"))
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as out:
        out.write("#version: 0.2\n" + "\n".join(merges) + "\n")


@functools.lru_cache
def folder():
    bundled = os.path.join(common.BUNDLED, "tokenizer")
    if os.path.exists(os.path.join(bundled, "vocab.json")) and os.path.exists(os.path.join(bundled, "merges.txt")):
        return bundled
    made = os.path.join(tempfile.gettempdir(), "safelight-vocabulary")
    if not os.path.exists(os.path.join(made, "merges.txt")):
        os.makedirs(made, exist_ok=True)
        derive(made)
    return made


def _load(cls, name):
    pad = "!" if name == "sd21" else END
    return cls(
        os.path.join(folder(), "vocab.json"), os.path.join(folder(), "merges.txt"), pad_token=pad, model_max_length=77
    )


def slow(name="sd15"):
    """CLIPTokenizer, what StableDiffusionPipeline loads. ftfy is not installed, so it cleans text with BasicTokenizer."""
    return _load(CLIPTokenizer, name)


def fast(name="sd15"):
    """CLIPTokenizerFast: the specification of the C tokenizer."""
    return _load(CLIPTokenizerFast, name)
