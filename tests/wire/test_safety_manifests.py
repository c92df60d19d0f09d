"""Manifests that are signed by somebody else, forged, missing or for another model: refused with a reason that names the field, by the command line,
by a start, by a reload and by an operator's load; the old generation keeps serving."""
import json
import pathlib
import shutil
import subprocess

import pytest

from adapters import Policy, digest, lora, write_safetensors
from conftest import BINARY, ENV, MODEL, PATIENCE, QUICK, ROOT
from test_admin import Admin
from test_safety_swap import reload

GOOD = lora(1, strength=0.8)


def adapter(*args, status=0):
    """`safelight adapter ...`: its standard output, or its standard error when it has to fail."""
    done = subprocess.run([BINARY, "adapter", *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300 * PATIENCE)
    assert done.returncode == status, done
    return done.stderr if status else done.stdout


def another_model(folder):
    """The bundled model but for one number of its UNet: the same shapes, another fingerprint."""
    folder.mkdir()
    for path in sorted(pathlib.Path(MODEL).rglob("*")):
        at = folder / path.relative_to(MODEL)
        if path.is_dir():
            at.mkdir()
        elif path.name != "diffusion_pytorch_model.safetensors" or path.parent.name != "unet":
            at.symlink_to(path)
        else:
            data = bytearray(path.read_bytes())
            data[-2] ^= 1
            at.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two key pairs, an adapter, and its manifests: by either key, unsigned, and signed for another model."""
    folder = tmp_path_factory.mktemp("made")
    keys = {name: adapter("keygen", "--out", folder / name).strip() for name in ("ours", "theirs")}
    file = folder / "safe.safetensors"
    write_safetensors(file, GOOD)
    other = another_model(folder / "other")
    manifests = {}
    for name, more in {"good": ["--secret-key", folder / "ours"], "another key": ["--secret-key", folder / "theirs"], "no signature": [],
                       "another model": ["--secret-key", folder / "ours", "--model", other]}.items():
        out = folder / f"{name}.json"
        adapter("sign", file, "--prompt", "a red apple", "--out", out, *(more if "--model" in more else [*more, "--model", MODEL]))
        manifests[name] = json.loads(out.read_text())
    good = manifests["good"]
    flipped = good["signature"][:9] + ("0" if good["signature"][9] != "0" else "1") + good["signature"][10:]
    manifests["forged signature"] = {**good, "signature": flipped}
    manifests["changed after signing"] = {**good, "note": "approved"}
    manifests["another adapter"] = {**good, "digest": "0" * 64}
    return file, keys, manifests


FIELDS = {"another key": "public_key", "no signature": "signature", "another model": "base.digest", "forged signature": "signature",
          "changed after signing": "signature", "another adapter": "signature"}


def put(folder, manifest):
    (folder / "safe.manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def policy(made, tmp_path):
    file, keys, manifests = made
    p = Policy(tmp_path / "policy", require_manifest=True, require_signature=True, public_key=keys["ours"])
    shutil.copy(file, p.folder / "safe.safetensors")
    put(p.folder, manifests["good"])
    return p.named("safe", "safe.safetensors").profile(required=["safe"]).write()


def test_the_old_generation_serves_on(start, policy, made):
    """A reload and an operator's load of each bad manifest fail with the field's name; pictures and generation stay."""
    _, _, manifests = made
    d = start(policy=policy.path)
    admin = Admin(d)
    before = d.post(QUICK, Accept="image/png")
    for what, field in FIELDS.items():
        put(policy.folder, manifests[what])
        reload(d, policy, "everything stays as it was")
        assert field in d.log().rpartition("everything stays as it was")[2], (what, d.log()[-500:])
        answer = admin.post("/v1/admin/adapters/safe", {"path": "safe.safetensors"})
        assert answer.status == 400 and field in answer.error["message"], (what, answer.body)
        states = {a["state"]: a for a in admin.status()["adapters"] if a["name"] == "safe"}
        assert set(states) == {"live", "failed"} and field in states["failed"]["why"], (what, states)
        after = d.post(QUICK, Accept="image/png")
        assert after.body == before.body and d.get("/readyz").status == 200, what
        assert after.headers["x-safelight-generation"] == before.headers["x-safelight-generation"]
    failed = [r["reason"] for r in admin.records("adapter") if r["verdict"] == "failed"]
    assert len(failed) == 2 * len(FIELDS) and all(any(f in r for r in failed) for f in FIELDS.values())
    put(policy.folder, manifests["good"])
    reload(d, policy)
    assert d.post(QUICK, Accept="image/png").body == before.body


@pytest.mark.parametrize("what", ["another key", "another model"])
def test_nothing_is_drawn_at_the_start(start, policy, made, what):
    put(policy.folder, made[2][what])
    d = start(policy=policy.path, ready=False)
    d.wait_log("profile default is not live: .*" + FIELDS[what])
    for answer in (d.get("/readyz"), d.post(QUICK)):
        assert answer.status == 503 and answer.error["code"] == "safety_unavailable" and FIELDS[what] in answer.error["message"]
    put(policy.folder, made[2]["good"])
    reload(d, policy)
    assert d.get("/readyz").status == 200


# ---- the command line ----

def test_keygen(tmp_path):
    key = tmp_path / "key"
    public = adapter("keygen", "--out", key).strip()
    assert len(public) == 64 and key.stat().st_mode & 0o777 == 0o600
    secret = key.read_text().strip()
    assert len(secret) == 128 and secret.endswith(public)
    assert "File exists" in adapter("keygen", "--out", key, status=1) and key.read_text().strip() == secret
    assert "cannot be made" in adapter("keygen", "--out", tmp_path / "no" / "key", status=1)
    assert adapter("keygen", "--out", tmp_path / "second").strip() != public
    for wrong in ([], ["--out"], ["file", "--out", tmp_path / "third"], ["--secret-key", key]):
        assert "usage: safelight adapter keygen" in adapter("keygen", *wrong, status=2)


def test_sign_and_verify(made, tmp_path):
    """What sign writes, verify takes, with the key and without; the file says what it is about."""
    file, keys, manifests = made
    good = manifests["good"]
    assert good["digest"] == digest(file) and good["public_key"] == keys["ours"] and good["targets"]["count"] == len(GOOD) // 2
    assert good["max_rank"] == 4 and good["params"] == sum(t.size for t in GOOD.values())
    assert [p["prompt"] for p in good["canary"]["probes"]] == ["a red apple"]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(good))
    said = adapter("verify", file, "--manifest", path, "--public-key", keys["ours"], "--model", MODEL)
    assert "signed with the key" in said and said.splitlines()[-1] == "verified"
    for what, field in FIELDS.items():
        path.write_text(json.dumps(manifests[what]))
        said = adapter("verify", file, "--manifest", path, "--public-key", keys["ours"], "--model", MODEL, status=1)
        assert field in said, what


def test_verify_finds_what_is_not_in_effect(made, tmp_path):
    """The canary is computed, in both forms: expectations of another adapter do not pass."""
    file, _, manifests = made
    other = tmp_path / "other.safetensors"
    write_safetensors(other, {k: v * (0.5 if ".up." in k else 1) for k, v in GOOD.items()})
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**manifests["no signature"], "digest": digest(other)}))
    assert "what the manifest says" in adapter("verify", other, "--manifest", path, "--model", MODEL, status=1)


def test_bad_input_for_sign_and_verify(made, tmp_path):
    file, keys, _ = made
    out = tmp_path / "out.json"
    short = tmp_path / "short"
    short.write_text("0" * 127)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:-10])
    mute = tmp_path / "mute.safetensors"
    write_safetensors(mute, {k: v * 0 for k, v in GOOD.items()})
    for args, says in ((["--secret-key", short], "128 hexadecimal digits"), (["--secret-key", tmp_path / "none"], "cannot be read"),
                       (["--model", tmp_path], "model_index.json"), (["--backend", "gpu9"], "backend")):
        said = adapter("sign", file, "--out", out, *args, status=1)
        assert says in said and not out.exists(), (args, said)
    for path, says in ((torn, "torn"), (tmp_path / "none.safetensors", "none.safetensors"), (mute, "")):
        said = adapter("sign", path, "--out", out, "--prompt", "x", status=1)
        assert says in said and not out.exists(), said
    for command, wrong in (("sign", []), ("sign", [file, file]), ("sign", [file, "--public-key", keys["ours"]]), ("verify", []),
                           ("verify", [file, "--public-key", "abc"]), ("verify", [file, "--secret-key", short])):
        assert f"usage: safelight adapter {command}" in adapter(command, *wrong, status=2), (command, wrong)
    empty = tmp_path / "empty.json"
    for text, says in (("", "JSON"), ("{}", "format"), ('{"format": "safelight-manifest-9"}', "format")):
        empty.write_text(text)
        assert says in adapter("verify", file, "--manifest", empty, status=1)
    assert "none.json" in adapter("verify", file, "--manifest", tmp_path / "none.json", status=1)
