"""A checkpoint that is damaged, lies or lacks something: the daemon refuses to start and names the file and the tensor."""
import json
import pathlib
import shutil
import struct
import subprocess

import pytest

from conftest import BINARY, ENV, MODEL, PATIENCE, POLICY

UNET = "unet/diffusion_pytorch_model.safetensors"
TENSOR = "conv_in.weight"


def start_with(model):
    return subprocess.run([BINARY, "serve", "--port", "0", "--threads", "1", "--model", str(model), "--policy", POLICY], cwd=model.parent, env=ENV,
                          capture_output=True, text=True, timeout=60 * PATIENCE)


def refused(model, *words):
    done = start_with(model)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("safelight: ") and "ready:" not in done.stdout
    for word in words:
        assert word in last, last


@pytest.fixture
def model(tmp_path):
    """A copy of the checkpoint: links, but for the UNet's file, which tests change."""
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy, copy_function=lambda a, b: pathlib.Path(b).symlink_to(pathlib.Path(a).resolve()))
    (copy / UNET).unlink()
    shutil.copyfile(pathlib.Path(MODEL) / UNET, copy / UNET)
    return copy


def read(model):
    """The UNet's header as a dict, and the offset of the data."""
    with open(model / UNET, "rb") as f:
        length, = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(length)), 8 + length


def rewrite(model, header):
    """The header replaced; padded to the length it had, so that the data stays where it was."""
    path = model / UNET
    data = path.read_bytes()
    length, = struct.unpack("<Q", data[:8])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])


def test_truncated(model):
    path = model / UNET
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    refused(model, "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_hardly_a_file(model, size):
    path = model / UNET
    path.write_bytes(path.read_bytes()[:size])
    refused(model, "diffusion_pytorch_model.safetensors")


def test_header_longer_than_the_file(model):
    path = model / UNET
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    refused(model, "diffusion_pytorch_model.safetensors")


def test_missing_file(model):
    (model / UNET).unlink()
    refused(model, "unet", "diffusion_pytorch_model")


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "nothing")


def test_missing_tensor(model):
    header, _ = read(model)
    header["renamed"] = header.pop(TENSOR)
    rewrite(model, header)
    refused(model, "diffusion_pytorch_model.safetensors", TENSOR)


def test_wrong_shape(model):
    header, _ = read(model)
    shape = header[TENSOR]["shape"]
    header[TENSOR]["shape"] = [shape[1], shape[0], *shape[2:]]
    rewrite(model, header)
    refused(model, "diffusion_pytorch_model.safetensors", TENSOR)


def test_shape_and_bytes_disagree(model):
    header, _ = read(model)
    header[TENSOR]["shape"][0] *= 2
    rewrite(model, header)
    refused(model, "diffusion_pytorch_model.safetensors", TENSOR)


def test_overlap(model):
    header, _ = read(model)
    victim = "conv_out.bias"
    begin, end = header[victim]["data_offsets"]
    shift = 2 if begin == 0 else -2
    header[victim]["data_offsets"] = [begin + shift, end + shift]
    rewrite(model, header)
    refused(model, "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["nan", "infinity"])
def test_not_finite(model, bits):
    header, start = read(model)
    assert header[TENSOR]["dtype"] == "F16"
    at = start + header[TENSOR]["data_offsets"][0] + 10
    with open(model / UNET, "r+b") as f:
        f.seek(at)
        f.write(struct.pack("<H", bits))
    refused(model, "diffusion_pytorch_model.safetensors", TENSOR)


def test_broken_config(model):
    config = model / "unet/config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text[:len(text) // 2])
    refused(model, "unet/config.json")


@pytest.mark.parametrize("text, says", [('{"pad_token": "<|endoftext|>"', "line 1"), ('{"pad_token": 3}', "pad_token"), ('{"pad_token": "no such token"}', "vocabulary")])
def test_broken_pad_token(model, text, says):
    path = model / "tokenizer/special_tokens_map.json"
    path.unlink()
    path.write_text(text)
    refused(model, "special_tokens_map.json", says)


def test_the_copy_itself_is_fine(model):
    """The control: the same copy, untouched, starts (and is ended by the time limit of a check that it serves)."""
    process = subprocess.Popen([BINARY, "serve", "--port", "0", "--threads", "1", "--model", str(model), "--policy", POLICY], cwd=model.parent, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("ready: "):
                break
        else:
            pytest.fail(process.stderr.read())
    finally:
        process.terminate()
        process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 0
