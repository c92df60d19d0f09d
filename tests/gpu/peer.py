"""peer - the same UNet in diffusers, timed in the same run as Safelight's: one JSON object a line, in the shape of tests/gpu/bench.c.

Weights are random; fp16, channels_last, scaled dot product attention; then with torch.compile, as long as there is time. Exit status 3: it cannot be
imported, and the last line says what is missing. Called by tests/gpu/check with the Python that has torch.

    peer.py SIZE BATCH...    pictures a step; each has two rows, for guidance
"""
import json
import statistics
import sys
import time

CONFIG = {  # Stable Diffusion 1.5
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}


def main():
    try:
        import diffusers
        import torch
    except ImportError as error:
        print(f"{sys.executable}: {error}")
        return 3
    if not torch.cuda.is_available():
        print(f"{sys.executable}: its torch {torch.__version__} sees no GPU")
        return 3
    size, batches = int(sys.argv[1]) // 8, [int(n) for n in sys.argv[2:]]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**CONFIG).to("cuda", torch.float16).to(memory_format=torch.channels_last).eval()

    def one(call, pictures):
        rows = 2 * pictures
        x = torch.randn(rows, 4, size, size, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
        text = torch.randn(rows, 77, 768, device="cuda", dtype=torch.float16)
        times = []
        with torch.inference_mode():
            for i in range(12):
                torch.cuda.synchronize()
                start = time.monotonic()
                out = call(x, 500, encoder_hidden_states=text, return_dict=False)[0]
                uncond, cond = out.chunk(2)
                out = uncond + 7.5 * (cond - uncond)
                torch.cuda.synchronize()
                if i >= 4:
                    times.append(time.monotonic() - start)
        return statistics.median(times)

    for form, call in (("eager", unet), ("compiled", None)):
        if call is None:
            call = torch.compile(unet, mode="max-autotune-no-cudagraphs" if torch.__version__ < "2.2" else "reduce-overhead")
        for pictures in batches if form == "eager" else batches[:1]:
            seconds = one(call, pictures)
            print(json.dumps({"line": "peer", "form": form, "size": 8 * size, "pictures": pictures, "ms": round(1e3 * seconds, 4),
                              "picture_steps_per_s": round(pictures / seconds, 2), "torch": torch.__version__,
                              "diffusers": diffusers.__version__}), flush=True)
    return 0


sys.exit(main())
