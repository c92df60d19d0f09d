"""`safelight adapter inspect` on the command line: files made here for the bundled model, and what is said of them."""
import hashlib
import json
import math
import pathlib
import struct
import subprocess

from conftest import BINARY, ENV, MODEL, PATIENCE

Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def run(*args):
    return subprocess.run([BINARY, "adapter", "inspect", *map(str, args)], capture_output=True, text=True, timeout=60 * PATIENCE, env=ENV)


def header_of(path):
    with open(path, "rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))


def write(path, tensors):
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        chunk = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(chunk)]}
        data += chunk
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def lora(key, width, r=2, alpha=4.0):
    """dW = alpha / r * 0.5 * 0.25 * r in every place."""
    return {f"{key}.lora_down.weight": ([r, width], [0.5] * (r * width)), f"{key}.lora_up.weight": ([width, r], [0.25] * (r * width)),
            f"{key}.alpha": ([], [alpha])}


def width_of_q():
    files = sorted((pathlib.Path(MODEL) / "unet").glob("*.safetensors"))
    return header_of(files[0])["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"]["shape"][0]


def test_a_good_file(tmp_path):
    width = width_of_q()
    path = write(tmp_path / "style.safetensors", lora(Q, width))
    answer = run(path, "--json", "--model", MODEL)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["accepted"] and report["name"] == "style" and report["format"] == "kohya"
    assert report["digest"] == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
    assert report["layers"] == 1 and report["params"] == 4 * width
    assert report["kinds"] == {"low-rank": {"layers": 1, "rank_min": 2, "rank_max": 2}}
    assert report["scale_rules"] == {"alpha": 1}
    assert report["coverage"]["attn1"]["touched"] == 1 < report["coverage"]["attn1"]["of"]
    assert all(c["touched"] == 0 for part, c in report["coverage"].items() if part != "attn1")
    assert math.isclose(report["norms"]["dW"], 0.5 * width, rel_tol=1e-6)
    assert report["norms"]["relative"] > 0
    text = run(path, "--model", MODEL)
    assert text.returncode == 0
    for says in ("kohya", report["digest"], "attn1 1/", "from alpha: 1", "of |W0|"):
        assert says in text.stdout, text.stdout


def test_a_refused_file_says_what_does_not_fit(tmp_path):
    wrong = Q.replace("attn1", "attn3")
    path = write(tmp_path / "wrong.safetensors", {**lora(Q, width_of_q()), **lora(wrong, 8)})
    answer = run(path, "--json")
    assert answer.returncode == 1
    report = json.loads(answer.stdout)
    assert not report["accepted"] and wrong in report["reason"]
    assert [k["key"] for k in report["unknown_keys"]] == [f"{wrong}.{s}" for s in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert {k["nearest"] for k in report["unknown_keys"]} <= {Q, Q.replace("attn1", "attn2")}
    text = run(path)
    assert text.returncode == 1 and "REFUSED" in text.stdout and "3 of 6 tensors" in text.stdout and wrong in text.stderr


def test_for_another_model(tmp_path):
    """The emoji model's layers are not SD1.5's; shapes are said."""
    path = write(tmp_path / "style.safetensors", lora(Q, width_of_q()))
    answer = run(path, "--arch", "sd15", "--json")
    assert answer.returncode == 1
    assert "shape" in json.loads(answer.stdout)["reason"]


def test_wrong_usage(tmp_path):
    for args in ([], ["a", "b"], ["--model"], ["--nonsense", "a"]):
        answer = run(*args)
        assert answer.returncode == 2 and "usage: safelight adapter inspect" in answer.stderr, args
    assert run("--help").returncode == 0
    for path in (tmp_path, tmp_path / "absent", "/dev/null"):
        answer = run(path)
        assert answer.returncode == 1 and not answer.stdout and answer.stderr, path
    assert run(tmp_path, "--model", tmp_path).returncode == 1
