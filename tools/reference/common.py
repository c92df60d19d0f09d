"""Where goldens go: paths, the safetensors writer and the manifest.

Who uses it: every gen_*.py and bundled.py. Each script owns the manifest entries of the files it writes, so that one of them
can be run again alone. Not thread safe: run one script at a time.
"""
import hashlib
import json
import os
import platform
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import numpy
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

diffusers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
# The C engine's reference is plain arithmetic: no bf16 or TF32 shortcuts inside torch either.
torch.set_float32_matmul_precision("highest")

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(REPO, "tests", "golden")
CKPT = os.path.join(GOLDEN, "ckpt")
MANIFEST = "manifest.json"
BUNDLED = os.path.join(REPO, "weights", "emoji")


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ftfy": "not installed",
    }


def record(name, what, manifest=MANIFEST, **entry):
    """Put one file's entry into the manifest, replacing an older one."""
    manifest_path = os.path.join(GOLDEN, manifest)
    manifest = {}
    if os.path.exists(manifest_path):
        with open(manifest_path, encoding="utf-8") as f:
            manifest = json.load(f)
    manifest["about"] = "Golden data made by tools/reference. tests/golden/README.md says what each tensor is."
    if name != "bundled.safetensors":
        manifest["ckpt"] = "weights of ckpt/*: formula of tools/reference/synth.py, every value rounded to fp16 and widened to fp32"
    path = os.path.join(GOLDEN, name)
    with open(path, "rb") as f:
        data = f.read()
    files = manifest.setdefault("files", {})
    files[name] = {
        "what": what,
        "made_by": "tools/reference/" + os.path.basename(sys.argv[0]),
        "versions": versions(),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **entry,
    }
    manifest["files"] = dict(sorted(files.items()))
    with open(manifest_path, "w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=1, ensure_ascii=False)
        f.write("\n")
    print(f"{name}: {len(data)} bytes")


class GoldenFile:
    """A safetensors file in the making. Tensors keep torch's layout (NCHW)."""

    def __init__(self, name, what, manifest=MANIFEST, **params):
        self.name, self.what, self.manifest, self.params = name, what, manifest, params
        self.tensors, self.stats = {}, {}

    def add(self, name, value, exact=None):
        """Store `value`. `exact` is the same quantity computed in fp64: its distance from the fp32 result goes into the
        manifest, because no comparison against the golden can mean more than the golden's own error."""
        value = value.detach().clone().contiguous()
        if value.dtype == torch.float64:
            value = value.float()
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{self.name}: {name} is not finite")
        if name in self.tensors:
            raise ValueError(f"{self.name}: {name} twice")
        self.tensors[name] = value
        if exact is not None:
            error = (value.double() - exact.double()).abs().max().item()
            self.stats[name] = {
                "max_abs": float(f"{value.abs().max().item():.5g}"),
                "rms": float(f"{value.double().square().mean().sqrt().item():.5g}"),
                "fp32_error": float(f"{error:.3g}"),
            }

    def close(self):
        save_file(self.tensors, os.path.join(GOLDEN, self.name))
        entry = dict(self.params)
        if self.stats:
            entry["stats"] = self.stats
        record(self.name, self.what, self.manifest, **entry)


def draw_normal(seed, *shape):
    """Test input from torch's own generator: the same numbers on every machine up to rounding, and stored anyway."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
