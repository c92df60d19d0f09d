#!/usr/bin/python3
"""Writes the seeds of fuzz_adapter into a folder: a small file of every family of factors, in several namings, for the layers of that target.

Usage: tests/fuzz/seeds_adapter.py FOLDER. Needs Python alone.
"""
import json
import pathlib
import struct
import sys

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
ONE = {"F32": struct.pack("<f", 0.5), "F16": b"\x00\x38", "BF16": b"\x00\x3f", "I64": struct.pack("<q", 2)}


def image(tensors, metadata=None, config=""):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = {"lora_adapter_metadata": json.dumps(metadata)}
    for name, (dtype, *shape) in tensors.items():
        count = 1
        for n in shape:
            count *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count * SIZES[dtype]]}
        data += ONE[dtype] * count
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data + config.encode() + bytes([len(config)])


def seeds():
    q, out = "unet.a.attn1.to_q", "unet.a.attn1.to_out.0"
    k, conv = "lora_unet_a_attn1_to_q", "lycoris_conv_in"
    peft = "base_model.model.a.attn1.to_q"
    yield "diffusers", image({f"{q}.lora.down.weight": ("F32", 2, 8), f"{q}.lora.up.weight": ("F32", 4, 2),
                              f"{out}.lora_A.weight": ("F16", 2, 8), f"{out}.lora_B.weight": ("F16", 8, 2), f"{out}.lora_B.bias": ("F16", 8)},
                             {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}})
    yield "processor", image({"unet.a.attn1.processor.to_out_lora.down.weight": ("F32", 1, 8),
                              "unet.a.attn1.processor.to_out_lora.up.weight": ("F32", 8, 1)})
    yield "peft", image({f"{peft}.lora_A.weight": ("F32", 2, 8), f"{peft}.lora_B.weight": ("F32", 4, 2),
                         f"{peft}.lora_magnitude_vector": ("F32", 4)}, config='{"r":2,"lora_alpha":4,"use_dora":true,"alpha_pattern":{"to_[qk]":3}}')
    yield "kohya", image({f"{k}.lora_down.weight": ("BF16", 2, 8), f"{k}.lora_up.weight": ("BF16", 4, 2), f"{k}.alpha": ("I64",),
                          f"{k}.dora_scale": ("F32", 1, 8), "lora_te_t_self_attn_q_proj.lora_down.weight": ("F32", 1, 8),
                          "lora_te_t_self_attn_q_proj.lora_up.weight": ("F32", 8, 1), "lora_te_t_self_attn_q_proj.scale": ("F32",)})
    yield "sgm", image({"lora_unet_input_blocks_0_0.lora_down.weight": ("F32", 2, 4, 1, 1), "lora_unet_input_blocks_0_0.lora_up.weight": ("F32", 8, 2, 1, 1),
                        "lora_unet_input_blocks_0_0.lora_mid.weight": ("F32", 2, 2, 3, 3), "lora_unet_out_2.diff_b": ("F32", 4)})
    yield "loha", image({f"{conv}.hada_w1_a": ("F32", 2, 8), f"{conv}.hada_w1_b": ("F32", 2, 4), f"{conv}.hada_t1": ("F32", 2, 2, 3, 3),
                         f"{conv}.hada_w2_a": ("F32", 2, 8), f"{conv}.hada_w2_b": ("F32", 2, 4), f"{conv}.hada_t2": ("F32", 2, 2, 3, 3),
                         f"{conv}.alpha": ("F32",)})
    yield "lokr", image({f"{conv}.lokr_w1": ("F32", 2, 2), f"{conv}.lokr_w2_a": ("F32", 4, 1), f"{conv}.lokr_w2_b": ("F32", 1, 18),
                         f"{conv}.alpha": ("F32",)})
    yield "lokr_core", image({f"{conv}.lokr_w1_a": ("F32", 2, 2), f"{conv}.lokr_w1_b": ("F32", 2, 2), f"{conv}.lokr_w2_a": ("F32", 2, 4),
                              f"{conv}.lokr_w2_b": ("F32", 2, 2), f"{conv}.lokr_t2": ("F32", 2, 2, 3, 3)})
    yield "overlay", image({"a.attn1.to_q.weight": ("F16", 4, 8), "norm.weight": ("F32", 8), "norm.bias": ("F32", 8), "conv_out.weight": ("BF16", 4, 8, 3, 3)})


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
