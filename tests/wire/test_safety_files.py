"""Adapters and policies that are damaged, lie or lead elsewhere: the old generation keeps serving; without one nothing is drawn, and the reason is
told. Nothing that a disk or the memory can do to loading changes what is served."""
import json
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time

import numpy as np
import pytest

from adapters import NOTHING, Policy, attention_shapes, lora, write_safetensors
from conftest import BINARY, ENV, MODEL, PATIENCE, QUICK, ROOT, until
from test_safety_swap import reload, under

GOOD = lora(1, strength=0.8)


def first_pair():
    name = next(iter(attention_shapes()))
    return f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"


DOWN, UP = first_pair()


def without(name):
    return {k: v for k, v in GOOD.items() if k != name}


def with_nan(value):
    t = GOOD[UP].copy()
    t.flat[3] = value
    return {**GOOD, UP: t}


BROKEN = {  # what is wrong with it, and what the reason must name
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "safe"),
    "empty": (lambda f: f.write_bytes(b""), "safe"),
    "no file": (lambda f: f.unlink(), "safe"),
    "folder": (lambda f: (f.unlink(), f.mkdir()), "safe"),
    "header too long": (lambda f: f.write_bytes(struct.pack("<Q", 2**60) + f.read_bytes()[8:]), "safe"),
    "not a number": (lambda f: write_safetensors(f, with_nan(np.nan)), UP),
    "infinite": (lambda f: write_safetensors(f, with_nan(np.inf)), UP),
    "factor without partner": (lambda f: write_safetensors(f, without(UP)), DOWN.rpartition(".lora")[0]),
    "unknown key": (lambda f: write_safetensors(f, {**GOOD, "unet.nothing.lora.down.weight": GOOD[DOWN]}), "unet.nothing"),
    "wrong base": (lambda f: write_safetensors(f, {**GOOD, DOWN: np.zeros((4, GOOD[DOWN].shape[1] + 8), np.float32)}), DOWN.rpartition(".lora")[0]),
    "ranks differ": (lambda f: write_safetensors(f, {**GOOD, DOWN: np.zeros((5, GOOD[DOWN].shape[1]), np.float32)}), DOWN.rpartition(".lora")[0]),
    "too strong": (lambda f: write_safetensors(f, {k: v * np.float32(1e4) for k, v in GOOD.items()}), "safe"),
}


@pytest.fixture
def policy(tmp_path):
    return Policy(tmp_path / "policy").adapter("safe", GOOD).profile(required=["safe"]).write()


def refused_everywhere(d, *words):
    """Nothing is drawn, on any route, and every answer says so for machines and people."""
    ready = d.get("/readyz")
    assert ready.status == 503 and ready.error["code"] == "safety_unavailable", ready.body
    for answer in (d.post(QUICK), d.post(QUICK, Accept="image/png"), d.post({**QUICK, "n": 2}), d.post(b"{")):
        assert answer.status == 503 and answer.error["code"] == "safety_unavailable", answer.body
    for word in words:
        assert word in ready.error["message"], (word, ready.error["message"])
    assert d.get("/healthz").status == 200


@pytest.mark.parametrize("what", BROKEN)
def test_broken_at_start_and_mended(start, policy, what):
    """Nothing live: 503 everywhere with a reason that names what is wrong; a reload with a good file mends it."""
    spoil, names = BROKEN[what]
    spoil(policy.folder / "safe.safetensors")
    d = start(policy=policy.path, ready=False)
    d.wait_log("profile default is not live")
    refused_everywhere(d, "default", names)
    path = policy.folder / "safe.safetensors"
    if path.is_dir():
        path.rmdir()
    reload(d, policy.adapter("safe", GOOD))
    assert d.get("/readyz").status == 200 and under(d.post(QUICK, Accept="image/png"))


def test_broken_while_serving(start, policy):
    """Each kind of broken file in turn, under load: the old generation serves on, with the same bytes."""
    d = start(policy=policy.path)
    before = d.post(QUICK, Accept="image/png")
    over, wrong = threading.Event(), []

    def client():
        while not over.is_set():
            answer = d.post(QUICK, Accept="image/png")
            if answer.status != 200 or answer.body != before.body:
                wrong.append((answer.status, answer.headers.get("x-safelight-generation")))

    clients = [threading.Thread(target=client) for _ in range(2)]
    for c in clients:
        c.start()
    try:
        path = policy.folder / "safe.safetensors"
        for what, (spoil, names) in BROKEN.items():
            spoil(path)
            reload(d, policy, "everything stays as it was")
            assert names in d.log().rpartition("reload failed")[2], (what, d.log()[-500:])
            assert d.get("/readyz").status == 200
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write_safetensors(path, GOOD)
    finally:
        over.set()
        for c in clients:
            c.join()
    assert not wrong, wrong[:5]
    assert d.post(QUICK, Accept="image/png").headers["x-safelight-generation"] == before.headers["x-safelight-generation"]


@pytest.mark.parametrize("what, content, names", [
    ("not JSON", "{", "malformed JSON"), ("unknown field", {"tenant": {}}, "tenant"), ("no profile", {"profiles": {}}, "default"),
    ("nothing required", {"profiles": {"default": {}}}, "requires_nothing"),
    ("wrong digest", {"adapters": {"safe": {"path": "safe.safetensors", "digest": "0" * 64}}}, "digest"),
    ("outside", {"adapters": {"safe": {"path": "../outside.safetensors"}}}, "adapters.safe.path"),
    ("link outside", {"adapters": {"safe": {"path": "link.safetensors"}}}, "adapters.safe.path"),
    ("absolute", {"adapters": {"safe": {"path": "/etc/passwd"}}}, "adapters.safe.path"),
    ("no manifest", {"require_manifest": True}, "manifest"),
    ("light", {"profiles": {"default": {"required": [{"adapter": "safe", "weight": 0.1, "min_weight": 0.9}]}}}, "min_weight"),
])
def test_bad_policies(start, policy, what, content, names):
    """At a reload the old policy stays; at the start there is no server, or one that draws nothing."""
    write_safetensors(policy.folder.parent / "outside.safetensors", GOOD)
    (policy.folder / "link.safetensors").symlink_to("../outside.safetensors")
    d = start(policy=policy.path)
    before = d.post(QUICK, Accept="image/png")
    policy.path.write_text(content if isinstance(content, str) else json.dumps({**policy.content, **content}))
    d.process.send_signal(signal.SIGHUP)
    d.wait_log("everything stays as it was: .*" + names.replace(".", r"\."), 60)
    after = d.post(QUICK, Accept="image/png")
    assert after.body == before.body and d.get("/readyz").status == 200
    if what in ("wrong digest", "no manifest"):  # the policy is fine, the file is not
        start(policy=policy.path, ready=False).wait_log("is not live: .*" + names)
        return
    done = subprocess.run([BINARY, "serve", "--port", "0", "--threads", "1", "--model", MODEL, "--policy", str(policy.path), "--state",
                           str(policy.folder / "state")], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 1 and names in done.stderr and not done.stdout


def test_folders_are_read_by_the_rules_of_files(start, policy):
    """What `safelight adapter` refuses of a folder, the server refuses too; a good folder serves."""
    folder = policy.folder / "folder"
    folder.mkdir()
    diffusers, peft, config = (folder / n for n in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"))
    d = start(policy=policy.path)
    before = d.post(QUICK, Accept="image/png")
    policy.named("safe", "folder")

    def refused(says):
        reload(d, policy, "everything stays as it was")
        assert says in d.log().rpartition("everything stays as it was")[2], d.log()[-500:]
        done = subprocess.run([BINARY, "adapter", "inspect", str(folder), "--model", MODEL], cwd=ROOT, capture_output=True, text=True, timeout=60 * PATIENCE)
        assert done.returncode == 1 and done.stderr

    refused("neither")
    shutil.copy(policy.folder / "safe.safetensors", peft)
    refused("adapter_config.json")
    shutil.copy(policy.folder / "safe.safetensors", diffusers)
    refused("both")
    diffusers.unlink()
    config.write_bytes(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4}\0{"r": 1}')
    refused("zero byte")
    config.write_bytes(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4' + b" " * (1 << 20) + b"}")
    refused("at most")
    config.unlink()
    peft.rename(diffusers)
    reload(d, policy)
    assert d.post(QUICK, Accept="image/png").body == before.body  # the same file under another path is the same generation


def test_another_model_needs_a_policy(tmp_path):
    shutil.copytree(MODEL, tmp_path / "other", symlinks=True)
    done = subprocess.run([BINARY, "serve", "--port", "0", "--model", str(tmp_path / "other"), "--state", str(tmp_path / "state")], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 1 and "--policy" in done.stderr and '"requires_nothing": true' in done.stderr and not done.stdout


def test_a_file_that_is_replaced_while_it_is_read(start, policy):
    """Two good files that replace each other, and a torn one between, as fast as they can: what is live is always one of the two."""
    d = start(policy=policy.path)
    path = policy.folder / "safe.safetensors"
    other = policy.folder / "other.safetensors"
    write_safetensors(other, lora(2, strength=0.8))
    good = [path.read_bytes(), other.read_bytes()]
    allowed = {}
    for data in good:
        path.write_bytes(data)
        reload(d, policy)
        digest, rgb = under(d.post(QUICK, Accept="image/png"))
        allowed[digest] = rgb
    over = threading.Event()

    def replace():
        i = 0
        while not over.is_set():
            i += 1
            path.write_bytes(good[i % 2][:5000 * (i % 7) or None])  # in place: readers see it grow

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(12):
            d.process.send_signal(signal.SIGHUP)
            digest, rgb = under(d.post(QUICK, Accept="image/png"))
            assert allowed[digest] == rgb
            time.sleep(0.05)
    finally:
        over.set()
        writer.join()
    digest, rgb = under(d.post(QUICK, Accept="image/png"))
    assert allowed[digest] == rgb


def test_one_profile_fails_alone_at_the_start(start, tmp_path):
    """Whoever needs the broken adapter is refused; others are drawn for; /readyz says no."""
    policy = Policy(tmp_path / "policy").adapter("safe", GOOD).adapter("broken", without(UP))
    policy.profile(required=["safe"]).profile("school", required=["safe", "broken"]).tenant("school", "key", "school").write()
    d = start(policy=policy.path, ready=False)
    d.wait_log("profile school is not live")
    until(lambda: d.post(QUICK).status == 200, "pictures for the default profile", 30)
    answer = d.post(QUICK, Authorization="Bearer key")
    assert answer.status == 503 and answer.error["code"] == "safety_unavailable" and "school" in answer.error["message"]
    ready = d.get("/readyz")
    assert ready.status == 503 and "school" in ready.error["message"]


def test_a_key_that_is_taken_away(start, tmp_path):
    policy = Policy(tmp_path / "policy").adapter("safe", GOOD).profile(required=["safe"]).profile("lab", **NOTHING).tenant("lab", "key", "lab").write()
    d = start("--running", "1", policy=policy.path)  # the second one waits
    assert d.post(QUICK, Authorization="Bearer key").headers["x-safelight-profile"] == "lab"
    long = {**QUICK, "steps": 150, "size": "256x256"}
    running = d.send(long)
    d.wait_busy()
    waiting = threading.Thread(target=lambda: waited.append(d.post(QUICK, Authorization="Bearer key")))
    waited = []
    waiting.start()
    time.sleep(0.3)
    policy.tenant("lab", "another", "lab")
    reload(d, policy)
    running.close()
    waiting.join()
    assert waited[0].status == 503 and waited[0].error["code"] == "safety_unavailable"  # it waited under rights that are gone
    assert d.post(QUICK, Authorization="Bearer key").status == 401


def test_a_picture_that_cannot_be_recorded_does_not_leave(start, policy):
    """The disk of the state folder is full (a limit on file sizes stands for it): no picture, no activation, the same generation after."""
    d = start(policy=policy.path)
    before = d.post(QUICK, Accept="image/png")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (1, hard))
    answer = d.post(QUICK, Accept="image/png")
    assert answer.status == 503 and not answer.body.startswith(b"\x89PNG")
    write_safetensors(policy.folder / "safe.safetensors", lora(2))
    d.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: d.post(QUICK).status == 200, "pictures again", 60)
    after = d.post(QUICK, Accept="image/png")
    assert after.status == 200
    if after.headers["x-safelight-generation"] == before.headers["x-safelight-generation"]:
        assert after.body == before.body


def operate(d, *args):
    done = subprocess.run([BINARY, "admin", *args, "--state", str(d.state)], cwd=ROOT, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 0, done.stderr + done.stdout


def test_what_an_operator_activated_survives_a_restart(start, policy, tmp_path):
    state = tmp_path / "kept"
    other = policy.folder / "other.safetensors"
    write_safetensors(other, lora(2, strength=0.8))
    d = start(policy=policy.path, state=state)
    first = under(d.post(QUICK, Accept="image/png"))
    operate(d, "load", "safe", "other.safetensors")
    reload(d, policy)
    assert under(d.post(QUICK, Accept="image/png")) == first  # loaded is not activated, not by a reload either
    operate(d, "activate", "default")
    second = d.post(QUICK, Accept="image/png")
    assert under(second) != first
    reload(d, policy)
    assert d.post(QUICK, Accept="image/png").body == second.body
    d.stop()
    other.unlink()  # its bytes are kept
    d = start(policy=policy.path, state=state)
    again = d.post(QUICK, Accept="image/png")
    assert again.body == second.body and again.headers["x-safelight-generation"] == second.headers["x-safelight-generation"]
    d.stop()
    kept = next((state / "adapters").glob("*.safetensors"))
    data = kept.read_bytes()
    kept.write_bytes(data[:-8] + b"\0" * 8)  # what was kept is checked as if it came from outside
    d = start(policy=policy.path, state=state)
    assert under(d.post(QUICK, Accept="image/png")) == first and "cannot be used" in d.log()
    d.stop()
    kept.write_bytes(data)
    write_safetensors(policy.folder / "safe.safetensors", lora(3, strength=0.8))  # the policy has the last word
    d = start(policy=policy.path, state=state)
    assert under(d.post(QUICK, Accept="image/png")) not in (first, under(second))
