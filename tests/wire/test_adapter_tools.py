"""`safelight adapter merge` and `extract` over real files: what they write is computed again here with numpy, and bad input of every kind is refused
without leaving a file."""
import json
import re
import subprocess

import numpy as np
import pytest

from adapters import UNET, attention_shapes, digest, lora, read_safetensors, write_safetensors
from conftest import BINARY, ENV, MODEL, PATIENCE, ROOT

MODULES = ("mid_block", "down_blocks.1")
EXPERTS = {"one": lora(1, modules=MODULES), "two": lora(2, rank=2, modules=MODULES), "three": lora(3, modules=MODULES[:1])}


def adapter(*args, status=0):
    done = subprocess.run([BINARY, "adapter", *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300 * PATIENCE)
    assert done.returncode == status, done
    return done.stderr if status else done.stdout


def product(tensors):
    """dW by the name of the site, from either naming of diffusers' factors, in fp64."""
    out = {}
    for name, t in tensors.items():
        for down, up in (("lora.down", "lora.up"), ("lora_A", "lora_B")):
            if name.endswith(f".{down}.weight"):
                site = name.removesuffix(f".{down}.weight")
                out[site] = tensors[f"{site}.{up}.weight"].astype(np.float64) @ t.astype(np.float64)
    return out


def far(a, b):
    """Largest relative distance, Frobenius, over the sites of both."""
    assert a.keys() == b.keys()
    return max(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k]) for k in b)


def total(weights):
    """sum of w_e dW_e."""
    out = {}
    for name, w in weights.items():
        for site, d in product(EXPERTS[name]).items():
            out[site] = out.get(site, 0) + w * d
    return out


def cut(dw, rank):
    """The best approximation of that rank, site by site."""
    out = {}
    for site, d in dw.items():
        u, s, v = np.linalg.svd(d, full_matrices=False)
        out[site] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return out


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for name, tensors in EXPERTS.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)
    return {name: folder / f"{name}.safetensors" for name in EXPERTS}


@pytest.fixture
def merge(experts, tmp_path):
    """merge(method, *options): what the command wrote, its metadata and its words."""
    def run(method, *more):
        out = tmp_path / "out.safetensors"
        said = adapter("merge", "--method", method, "--out", out, "--model", MODEL, *more, *experts.values())
        header, tensors = read_safetensors(out)
        return product(tensors), header["__metadata__"], said

    return run


def test_concat_is_the_exact_sum(merge, experts):
    got, about, said = merge("concat", "--weight", "two=-0.5", "--scale", "2")
    assert far(got, total({"one": 2, "two": -1, "three": 2})) < 1e-6
    assert "exact" in said and about["safelight.method"] == "concat" and about["format"] == "pt"
    for name, path in experts.items():
        assert f"{name} {digest(path)} {'-0.5' if name == 'two' else '1'}" in about["safelight.inputs"]
    again, _, _ = merge("concat", "--weight", "two=-0.5", "--scale", "2")
    assert all((again[k] == got[k]).all() for k in got)


def test_weighted_and_mean_are_cut_to_a_rank(merge):
    whole = total({"one": 1, "two": 3, "three": 1})
    got, _, said = merge("weighted", "--weight", "two=3", "--rank", "3")
    assert far(got, cut(whole, 3)) < 1e-4
    held = sum(np.linalg.norm(d) ** 2 for d in cut(whole, 3).values()) / sum(np.linalg.norm(d) ** 2 for d in whole.values())
    assert abs(float(re.search(r"the rank holds ([\d.]+)", said).group(1)) - held) < 1e-3
    got, _, _ = merge("mean", "--rank", "12")
    assert far(got, total(dict.fromkeys(EXPERTS, 1 / 3))) < 1e-5


def test_ties(merge):
    """Trim, elect, mean of those that agree; at a rank that cuts nothing."""
    keep, want = 0.25, {}
    for site, d in total(dict.fromkeys(EXPERTS, 1)).items():
        each = []
        for tensors in EXPERTS.values():
            dw = product(tensors).get(site)
            if dw is None:
                continue
            least = np.sort(np.abs(dw), axis=None)[::-1][int(np.ceil(keep * dw.size)) - 1]
            each.append(np.where(np.abs(dw) >= least, dw, 0))
        sign = np.sign(sum(each))
        agree = [np.where(np.sign(e) == sign, e, 0) for e in each]
        want[site] = sum(agree) / np.maximum(1, sum((a != 0).astype(int) for a in agree))
    got, about, _ = merge("ties", "--keep", str(keep), "--rank", "192")
    assert "keep 0.25" in about["safelight.options"]
    # which of two nearly equal numbers is the last to be kept may differ; nothing else may
    assert far(got, want) < 0.02


def test_co_merge_of_one_is_that_one(tmp_path, experts):
    """Every weight that wins anywhere is kept at keep 1, and the mean over one keeper is itself."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# not this one\na red apple\r\na bomb\n")
    for method, limit in (("co-merge", 1e-6), ("co-merge-rows", 1e-3)):
        out = tmp_path / f"{method}.safetensors"
        said = adapter("merge", "--method", method, "--keep", "1", "--steps", "1", "--prompts", prompts, "--backend", "ref", "--out", out, "--model", MODEL,
                       experts["one"])
        header, tensors = read_safetensors(out)
        assert far(product(tensors), product(EXPERTS["one"])) < limit, method
        assert "2 prompts" in said and "seed 1, backend ref" in header["__metadata__"]["safelight.options"]


def test_bad_input_for_merge(tmp_path, experts):
    out, one = tmp_path / "out.safetensors", experts["one"]
    torn, empty, prompts = tmp_path / "torn.safetensors", tmp_path / "empty.txt", tmp_path / "prompts.txt"
    torn.write_bytes(one.read_bytes()[:-3])
    empty.write_text("# nothing\n")
    prompts.write_text("a cat\n")
    whole = {k.replace("lora.down.weight", "diff"): np.zeros(attention_shapes()[k.removeprefix("unet.").removesuffix(".lora.down.weight")], np.float32)
             for k in EXPERTS["one"] if k.endswith("lora.down.weight")}
    write_safetensors(tmp_path / "full.safetensors", whole)
    for args, status, says in (
            (["--method", "average", one], 2, "average"), (["--method", "concat"], 2, "at least one expert"), ([one], 2, "--method"),
            (["--method", "mean", "--rank", "0", one], 2, "--rank"), (["--method", "ties", "--keep", "1.5", one], 2, "--keep"),
            (["--method", "concat", "--scale", "nan", one], 2, "--scale"), (["--method", "co-merge", one], 2, "--prompts"),
            (["--method", "co-merge", "--unkept", "one", one], 2, "--unkept"), (["--method", "concat", "--nonsense", one], 2, "unknown option"),
            (["--method", "concat", "--weight", "one", one], 1, "NAME=0.5"), (["--method", "concat", "--weight", "four=1", one], 1, "no expert"),
            (["--method", "concat", "--weight", "one=much", one], 1, "--weight"), (["--method", "concat", torn], 1, "torn"),
            (["--method", "concat", tmp_path / "none.safetensors"], 1, "none"), (["--method", "concat", "--model", tmp_path, one], 1, "model_index.json"),
            (["--method", "co-merge", "--prompts", tmp_path / "none.txt", one], 1, "none.txt"),
            (["--method", "co-merge", "--prompts", empty, one], 1, "holds no prompt"),
            (["--method", "co-merge", "--prompts", prompts, one, experts["three"]], 1, "differs from one"),
            (["--method", "concat", tmp_path / "full.safetensors", one], 1, "full"), (["--method", "ties", one, tmp_path / "full.safetensors"], 1, "full")):
        said = adapter("merge", "--out", out, *args, status=status)
        assert says in said and not out.exists(), (args, said)
        assert ("usage: safelight adapter merge" in said) == (status == 2)
    assert "no/out" in adapter("merge", "--method", "concat", "--out", tmp_path / "no/out.safetensors", one, status=1)


# ---- extract ----

def tuned_unet(path, change):
    """The bundled UNet with change[site] added, in fp32."""
    _, tensors = read_safetensors(UNET)
    tensors = {k: t.astype(np.float32) for k, t in tensors.items()}
    for site, d in change.items():
        tensors[f"{site.removeprefix('unet.')}.weight"] = tensors[f"{site.removeprefix('unet.')}.weight"] + d.astype(np.float32)
    write_safetensors(path, tensors)
    return tensors


def test_extract_finds_what_was_added(tmp_path):
    """A change of rank 4 comes back at rank 4, as a file, as a UNet folder and as a checkpoint folder; at rank 1 its best approximation does."""
    change = product(EXPERTS["three"])
    folder = tmp_path / "tuned" / "unet"
    folder.mkdir(parents=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    tuned_unet(file, change)
    out = tmp_path / "out.safetensors"
    for tuned in (file, folder, folder.parent):
        said = adapter("extract", "--base", MODEL, "--tuned", tuned, "--rank", "4", "--out", out)
        header, tensors = read_safetensors(out)
        assert far(product(tensors), change) < 1e-4
        assert float(re.search(r"captured ([\d.]+) of \|dW\|\^2 at these sites, ([\d.]+) of all", said).group(2)) > 0.9999
        assert header["__metadata__"]["safelight.method"] == "extract" and "do not differ" in said
    adapter("extract", "--base", MODEL, "--tuned", file, "--rank", "1", "--out", out, "--quiet")
    assert far(product(read_safetensors(out)[1]), cut(change, 1)) < 1e-3
    said = adapter("extract", "--base", MODEL, "--tuned", file, "--rank", "4", "--energy", "0.3", "--out", out)
    ranks = [t.shape[0] for k, t in read_safetensors(out)[1].items() if k.endswith("lora_A.weight")]
    assert min(ranks) >= 1 and sum(ranks) < 4 * len(ranks)
    assert json.loads(adapter("inspect", out, "--json"))["accepted"]


def test_bad_input_for_extract(tmp_path):
    out = tmp_path / "out.safetensors"
    shapes, lacks = tmp_path / "shapes.safetensors", tmp_path / "lacks.safetensors"
    tensors = tuned_unet(shapes, {})
    site = next(iter(attention_shapes())) + ".weight"
    write_safetensors(shapes, {**tensors, site: np.zeros((8, 8), np.float32)})
    write_safetensors(lacks, {k: t for k, t in tensors.items() if k != site})
    common = ["--base", MODEL, "--out", out]
    for args, status, says in (
            ([*common, "--tuned", UNET], 2, "--rank"), ([*common, "--rank", "4"], 2, "--tuned"), ([*common, "--tuned", UNET, "--rank", "x"], 2, "--rank"),
            ([*common, "--tuned", UNET, "--rank", "4", "--sites", "few"], 2, "--sites"),
            ([*common, "--tuned", UNET, "--rank", "4", "--energy", "0"], 2, "--energy"), ([*common, "--tuned", UNET, "--rank", "4", "more"], 2, "give --base"),
            ([*common, "--tuned", tmp_path / "none", "--rank", "4"], 1, "none"), ([*common, "--tuned", tmp_path, "--rank", "4"], 1, "safetensors"),
            ([*common, "--tuned", shapes, "--rank", "4"], 1, site), ([*common, "--tuned", lacks, "--rank", "4"], 1, site),
            ([*common, "--tuned", UNET, "--rank", "4"], 1, "differ"),
            (["--base", tmp_path, "--out", out, "--tuned", UNET, "--rank", "4"], 1, "model_index.json")):
        said = adapter("extract", *args, status=status)
        assert says in said and not out.exists(), (args, said)
