"""What computes: the daemon says in one line why it is the CPU, one that was told to use a GPU ends where there is none, and a restart finds its plans (on a
card); and what `safelight compile` says before it has loaded anything."""
import io
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from conftest import BINARY, ENV, PATIENCE, QUICK, ROOT
from test_metrics import scrape

HAS_GPU = any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "dxg"))
H200 = ["--device", str(ROOT / "deploy/devices/h200.json")]


def run(*args, binary=BINARY):
    return subprocess.run([str(binary), "compile", *args], capture_output=True, text=True, timeout=60 * PATIENCE, env=ENV, cwd=ROOT)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_auto_says_why(start):
    d = start()
    said = [line for line in d.log().splitlines() if "the CPU computes" in line]
    assert len(said) == 1 and "this machine has no NVIDIA GPU, or its driver is not loaded" in said[0]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_cuda_without_a_gpu(start):
    d = start("--backend", "cuda", ready=False)
    assert d.wait() == 1
    assert re.findall(r"(?m)^safelight: .*$", d.log()) == ["safelight: this machine has no NVIDIA GPU, or its driver is not loaded"]


def test_cpu_needs_no_reason(start):
    assert "the CPU computes" not in start("--backend", "cpu").log()


def test_activations(start):
    """fp32 is what be_ref draws, but for roundings; bf16, where the processor has it, is further away. Measured: 1 and 11 of 255."""
    drawn, said = {}, {}
    for name, args in {"ref": ("--backend", "ref"), "fp32": ("--backend", "cpu", "--activations", "fp32"), "auto": ("--backend", "cpu")}.items():
        d = start(*args)
        drawn[name] = np.asarray(Image.open(io.BytesIO(d.png(**QUICK))).convert("RGB")).astype(int)
        said[name], = [s.labels["backend"] for s in scrape(d)["safelight_model_info"].samples]
        d.stop()
    off = {name: np.abs(drawn[name] - drawn["ref"]).max() for name in ("fp32", "auto")}
    assert "fp32 activations" in said["fp32"] and off["fp32"] <= 4 * 1, off
    if "bf16 activations" in said["auto"]:
        assert off["auto"] > 4 * 1, off
    else:
        assert "fp32 activations" in said["auto"] and (drawn["auto"] == drawn["fp32"]).all()


@pytest.mark.parametrize("backend, word", [("cpu", "fp16"), ("ref", "fp16"), ("ref", "bf16")])
def test_activations_that_the_backend_has_not(start, backend, word):
    d = start("--backend", backend, "--activations", word, ready=False)
    assert d.wait() == 1
    assert re.findall(r"(?m)^safelight: .*$", d.log())[0].startswith(f"safelight: activations cannot be {word} with the backend {backend} here: ")
    assert "model" not in d.log()


@pytest.mark.skipif("cuda" not in os.environ.get("SAFELIGHT_ARGS", ""), reason="not the CUDA backend")
def test_a_restart_compiles_nothing(start):
    state, said = None, []
    for _ in range(2):
        d = start(state=state)
        state = d.state
        d.png()
        d.stop()
        found, compiled = re.findall(r"plans for GPU 0 since the start: (\d+) found in .*/plans, (\d+) compiled", d.log())[-1]
        said.append((int(found), int(compiled)))
    assert said[0][1] > 0 and said[1][0] > 0 and said[1][1] == 0, said


@pytest.mark.parametrize("args, words", [
    ([], "--device NAME is missing"),
    ([*H200, "--model", "x", "--arch", "sd15"], "--model and --arch exclude each other"),
    ([*H200, "--state", "x", "--out", "y"], "--state and --out exclude each other"),
    ([*H200, "--arch", "sd15", "--chunks", "2"], "--chunks needs --model"),
    ([*H200, "--size", "0"], "--size must be pixels"),
    ([*H200, "--size", "512x"], "--size must be pixels"),
    ([*H200, "--size", "x512"], "--size must be pixels"),
    ([*H200, "--size", "512x512x512"], "--size must be pixels"),
    ([*H200, "--size", "512,"], "--size must be pixels"),
    ([*H200, "--size", "512;768"], "--size must be pixels"),
    ([*H200, "--size", "99999999999999999999"], "--size must be pixels"),
    ([*H200, "--size", "4097"], "up to 4096"),
    ([*H200, "--size", ",".join(["64"] * 65)], "more than 64 sizes"),
    ([*H200, "--batch", "0"], "--batch must be a whole number from 1 to 64"),
    ([*H200, "--batch", "65"], "--batch must be a whole number from 1 to 64"),
    ([*H200, "--batch", "2x"], "--batch must be a whole number"),
    ([*H200, "--chunks", "17"], "--chunks must be a whole number from 1 to 16"),
    ([*H200, "--activations", "fp32"], "--activations must be auto, bf16 or fp16"),
    ([*H200, "--driver", "13"], "--driver must be a version of CUDA"),
    ([*H200, "--driver", "13.0.1"], "--driver must be a version of CUDA"),
    ([*H200, "--driver", "13.-1"], "--driver must be a version of CUDA"),
    ([*H200, "-j", "0"], "--threads must be a whole number from 1 to 256"),
    ([*H200, "--device"], "without its value"),
    ([*H200, "--sizes", "512"], "unknown option"),
    ([*H200, "sd15"], 'what is "sd15"?'),
])
def test_compile_usage(args, words):
    done = run(*args)
    assert done.returncode == 2 and words in done.stderr and "usage: safelight compile" in done.stderr and not done.stdout


def test_compile_help():
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: safelight compile --device NAME") and not done.stderr


def test_compile_knows_gpus_by_name(tmp_path):
    """In a checkout, and where the images have the program: a description that was found is not what is missing."""
    known = ", ".join(sorted(path.stem for path in (ROOT / "deploy/devices").iterdir()))
    subprocess.run([ROOT / "deploy/program-files", os.path.dirname(BINARY), tmp_path / "usr"], check=True)
    installed = tmp_path / "usr/bin/safelight"
    for name in ("safelight-cuda.so", "safelight-no-driver.so"):
        installed.with_name(name).unlink(missing_ok=True)
    link = tmp_path / "safelight"
    link.symlink_to(installed)
    for binary in (BINARY, installed, link):
        done = run("--device", "h100", "--list", binary=binary)
        assert done.returncode == 1 and f'no GPU with the name "h100": known are {known}; a path such as ./h100.json' in done.stderr
        done = run("--device", "./h100.json", "--list", binary=binary)
        assert done.returncode == 1 and f"cannot read ./h100.json: No such file or directory; by name known are {known}\n" in done.stderr
    for binary in (installed, link):
        done = run("--device", "h200", "--list", binary=binary)
        assert done.returncode == 1 and f"{tmp_path}/usr/bin/safelight-no-driver.so: `make cuda`" in done.stderr
    (tmp_path / "usr/share").rename(tmp_path / "share")
    done = run("--device", "h200", "--list", binary=installed)
    assert done.returncode == 1 and 'no GPU with the name "h200": no description lies where the program was installed' in done.stderr


def test_compile_without_libraries(tmp_path):
    """Each file that is missing beside the program is named, with what builds it."""
    alone = tmp_path / "safelight"
    shutil.copy(BINARY, alone)
    done = run(*H200, binary=alone)
    assert done.returncode == 1 and f"{tmp_path}/safelight-no-driver.so: `make cuda`" in done.stderr
    (tmp_path / "safelight-no-driver.so").write_bytes(b"no library")
    done = run(*H200, binary=alone)
    assert done.returncode == 1 and "stands in for the driver is damaged" in done.stderr
    (tmp_path / "nothing.c").write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "safelight-no-driver.so"), str(tmp_path / "nothing.c")], check=True)
    done = run(*H200, binary=alone)
    assert done.returncode == 1 and f"{tmp_path}/safelight-cuda.so is missing: `make cuda` builds it" in done.stderr
