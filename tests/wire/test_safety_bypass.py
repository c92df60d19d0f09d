"""Every way around the safety that is known from other systems, tried through the real daemon: the picture is the one with the required set, byte
for byte, or the request is refused; and what named an adapter is in the audit log."""
import base64
import io
import json
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from adapters import Policy, lora
from conftest import BINARY, QUICK, Daemon, until

ASKED = {**QUICK, "steps": 4}
LAB_KEY = "lab-key-0123456789"


def pixels(answer):
    assert answer.status == 200, answer.body
    data = answer.body if answer.headers["content-type"] == "image/png" else base64.b64decode(answer.json["data"][0]["b64_json"])
    image = Image.open(io.BytesIO(data))
    image.load()
    return image.tobytes()


def scaled(tensors, factor):
    """The same adapter with dW times factor, by its up factors."""
    return {k: (v * np.float32(factor) if ".up." in k else v) for k, v in tensors.items()}


def rotated(tensors, factor):
    """The same dW times factor from other factors: (up Q)(Q^-1 down)."""
    rng = np.random.default_rng(77)
    out = dict(tensors)
    for name, down in tensors.items():
        if ".down." in name:
            up_name = name.replace(".down.", ".up.")
            q = rng.standard_normal((down.shape[0],) * 2)
            out[name] = np.linalg.solve(q, down).astype(np.float32)
            out[up_name] = (factor * tensors[up_name] @ q).astype(np.float32)
    return out


def padded(tensors, factor):
    """The same dW times factor at twice the rank, half of it zeros."""
    out = {}
    for name, t in scaled(tensors, factor).items():
        out[name] = np.concatenate([t, np.zeros_like(t)], axis=0 if ".down." in name else 1)
    return out


def renamed(tensors, factor):
    """The same dW times factor under kohya's names, with an alpha that halves and factors that double."""
    out = {}
    for name, t in scaled(tensors, factor).items():
        module, _, rest = name.removeprefix("unet.").partition(".lora.")
        key = "lora_unet_" + module.replace(".", "_")
        out[f"{key}.lora_{rest}"] = t * np.float32(2) if ".up." in name else t
        if ".down." in name:
            out[f"{key}.alpha"] = np.array(t.shape[0] / 2, np.float32)
    return out


def full(tensors, factor):
    """The same dW times factor as a full difference."""
    out = {}
    for name, down in tensors.items():
        if ".down." in name:
            module = name.removeprefix("unet.").partition(".lora.")[0]
            up = tensors[name.replace(".down.", ".up.")]
            out[f"lora_unet_{module.replace('.', '_')}.diff"] = (factor * up @ down).astype(np.float32)
    return out


SAFE = lora(1, strength=0.8)
TRICKS = {  # each takes the safety back when it is added with this scale
    "negated": (scaled(SAFE, -1), 1), "copy": (scaled(SAFE, 1.0001), -1), "half": (scaled(SAFE, -0.5), 1), "rotated": (rotated(SAFE, -1), 1),
    "padded": (padded(SAFE, -1), 1), "renamed": (renamed(SAFE, -1), 1), "full": (full(SAFE, -1), 1), "weak": (scaled(SAFE, -0.01), 1.5 / 0.01),
    "one-layer": ({k: v for k, v in scaled(SAFE, -1).items() if "mid_block" in k}, 1),
    "hidden": ({k: v + lora(5, strength=0.8)[k] * np.float32(".up." in k) for k, v in scaled(SAFE, -1).items()}, 1),
}
SMALL = [f"small{i}" for i in range(8)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One daemon with a required adapter and styles that an operator was talked into allowing; one without safety; pictures of both."""
    folder = tmp_path_factory.mktemp("bypass")
    policy = Policy(folder / "policy").adapter("safe", SAFE).adapter("ink", lora(9, strength=0.3), pin=True)
    for name, (tensors, _) in TRICKS.items():
        policy.adapter(name, tensors, pin=True)
    for i, name in enumerate(SMALL):  # each alone is below the threshold
        policy.adapter(name, scaled(SAFE, -0.06 - i * 1e-4), pin=True)
    styles = ["ink", *TRICKS, *SMALL]
    policy.profile(required=["safe"], styles=styles, max_style_weight=8, max_style_norm_ratio=50)
    policy.profile("lab", requires_nothing=True).tenant("lab", LAB_KEY, "lab").write()
    d = Daemon(folder, policy=policy.path)
    d.folder = folder
    d.safe = pixels(d.post(ASKED))
    answer = d.post(ASKED, Authorization=f"Bearer {LAB_KEY}")
    d.bare = pixels(answer)
    assert answer.headers["x-safelight-safety"] == "unsafe-evaluation" and answer.headers["x-safelight-profile"] == "lab"
    assert d.safe != d.bare
    yield d
    try:
        d.stop()
    finally:
        d.kill()


def records(d):
    done = subprocess.run([BINARY, "audit", "show", "--state", str(d.state), "--n", "500", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recorded(d, request_id):
    """The audit records of a request: a refusal is written beside its answer, so it may come a moment later."""
    return until(lambda: [r for r in records(d) if request_id in json.dumps(r)], f"a record of {request_id}")


def tried(d, fields, **headers):
    """Sends it under an id of its own: refused, or the picture of the required set; either way it is in the audit log."""
    request_id = f"try-{time.monotonic_ns()}"
    answer = d.post({**ASKED, **fields}, x_request_id=request_id, **headers)
    if answer.status == 200:
        assert pixels(answer) == d.safe and answer.headers["x-safelight-profile"] == "default"
    else:
        assert 400 <= answer.status < 500, answer.body
    found = recorded(d, request_id)
    assert any(("served" if answer.status == 200 else "refused") in json.dumps(r) for r in found), found
    return answer, found


@pytest.mark.parametrize("field, value", [
    ("safety", False), ("safety_checker", None), ("enable_safety_checker", False), ("disable_safety_checker", True), ("safety_tolerance", 6),
    ("sld_guidance_scale", 0), ("cross_attention_kwargs", {"scale": 0}), ("attention_kwargs", {"scale": 0}), ("adapters", []),
    ("adapter", "none"), ("lora", []), ("lora_scale", 0), ("lora_weights", "x"), ("override_settings", {"sd_lora": "None"}), ("alwayson_scripts", {}),
    ("profile", "lab"), ("tenant", "lab"), ("policy", "lab"), ("generation", "1-00000000"), ("requires_nothing", True), ("prompt_embeds", []),
    ("negative_prompt_embeds", []), ("latents", []), ("image", "x"), ("init_images", ["x"]), ("strength", 0), ("mask", "x"), ("refiner", "x"),
    ("textual_inversion", "x"), ("controlnet", {}), ("unet", "x"), ("vae", "x"), ("timesteps", [1]), ("sigmas", [1]), ("denoising_start", 0.9),
    ("nsfw", True), ("moderation", "none"), ("extra_body", {"safety": False}), ("__proto__", {"safety": False}), ("Safety", 0), ("loras ", []),
])
def test_fields(served, field, value):
    """Fields by which other servers are told to draw without: refused by name."""
    answer, _ = tried(served, {field: value})
    assert answer.status == 400 and answer.error["param"] == field


def test_fields_that_are_allowed_change_nothing_of_the_safety(served):
    for fields in ({"moderation": "low"}, {"user": "lab"}, {"metadata": {"profile": "lab", "safety": "off"}}, {"quality": "low"},
                   {"loras": []}, {"loras": None}, {"loras": [{"name": "ink", "scale": 0}]}, {"loras": [{"name": "negated", "scale": 0}]}):
        answer, _ = tried(served, fields)
        assert answer.status == 200, answer.body


@pytest.mark.parametrize("name, value", [
    ("X-Safelight-Profile", "lab"), ("X-Safelight-Generation", "1-00000000"), ("X-Safelight-Safety", "none"), ("X-Safety", "off"),
    ("X-Forwarded-User", "lab"), ("X-Tenant", "lab"), ("Cookie", "profile=lab"), ("X-API-Key", LAB_KEY), ("api-key", LAB_KEY), ("Proxy-Authorization",
    f"Bearer {LAB_KEY}"),
])
def test_headers(served, name, value):
    answer, _ = tried(served, {}, **{name: value})
    assert answer.status == 200


@pytest.mark.parametrize("value", ["Bearer wrong", "Bearer ", "Bearer", f"Basic {LAB_KEY}", LAB_KEY, f"Bearer {LAB_KEY}x", f"Bearer {LAB_KEY[:-1]}",
                                   f"Bearer {LAB_KEY.upper()}", "Bearer lab"])
def test_keys(served, value):
    answer, _ = tried(served, {}, Authorization=value)
    assert answer.status == 401 and answer.error["code"] == "invalid_api_key"


def test_query_and_path(served):
    for path, status in (("/v1/images/generations?profile=lab&safety=off", 200), ("/v1/images/generations/", 404), ("/v1//images/generations", 404),
                         ("/v1/images/edits", 415), ("/v1/images/variations", 404), ("/sdapi/v1/txt2img", 400), ("/sdapi/v1/generations", 404),
                         ("/generate", 404)):
        answer = served.request("POST", path, json.dumps(ASKED).encode(), {"Content-Type": "application/json"})
        assert answer.status == status
        if status == 200:
            assert pixels(answer) == served.safe


@pytest.mark.parametrize("tag", ["<lora:safe:-1>", "<lora:safe:0>", "<lora:negated:1>", "<lyco:safe:-1>", "<safe:-1>", "<hypernet:safe:-1>"])
def test_prompt_tags_are_words(served, tmp_path, tag):
    """A tag in a prompt is text like any other: a server where the adapter has another name, and no other is there, draws the same picture."""
    policy = Policy(tmp_path / "policy").adapter("other", SAFE).profile(required=["other"]).write()
    d = Daemon(tmp_path, policy=policy.path)
    try:
        for fields in ({"prompt": f"a red apple {tag}"}, {"negative_prompt": tag}):
            assert pixels(d.post({**ASKED, **fields})) == pixels(served.post({**ASKED, **fields}))
        d.stop()
    finally:
        d.kill()


@pytest.mark.parametrize("entry", [
    {"name": "safe", "scale": 1}, {"name": "safe", "scale": -1}, {"name": "safe", "scale": 0}, {"name": "safe.safetensors", "scale": -1},
    {"name": "../policy/safe", "scale": -1}, {"name": "policy.json"}, {"name": "/etc/passwd"}, {"name": "SAFE", "scale": -1},
    {"name": "safe ", "scale": -1}, {"name": "", "scale": -1}, {"name": "nothing"}, {"name": "ink", "scale": 8.001}, {"name": "ink", "scale": -100},
    {"name": "ink", "scale": 101}, {"name": "ink", "scale": 1e39}, {"name": "ink", "scale": -1e308}, {"name": "ink", "scale": "1"},
    {"name": "ink", "scale": None}, {"name": "ink", "scale": True}, {"name": "ink", "weight": 1}, {"name": "ink", "scale": 1, "required": False},
    {"name": "ink", "path": "safe.safetensors"}, {"path": "safe.safetensors", "scale": -1}, "safe", None, 1, ["safe", -1],
], ids=str)
def test_style_entries(served, entry):
    answer, _ = tried(served, {"loras": [entry]})
    assert answer.status == 400 and answer.error["param"].startswith("loras[0]")


@pytest.mark.parametrize("body", [b'"scale": NaN', b'"scale": Infinity', b'"scale": -Infinity', b'"scale": 1e400', b'"scale": 1, "scale": -1'])
def test_scales_that_are_no_numbers(served, body):
    answer = served.post(b'{"prompt": "a red apple", "loras": [{"name": "ink", ' + body + b"}]}")
    assert answer.status == 400


def test_many_entries(served):
    assert tried(served, {"loras": [{"name": "ink", "scale": 0.1}] * 9})[0].status == 400
    assert tried(served, {"loras": [{"name": "ink", "scale": 0.1}] * 2})[0].error["param"] == "loras[1].name"
    assert tried(served, {"loras": {"name": "ink"}})[0].status == 400


@pytest.mark.parametrize("trick", TRICKS)
def test_styles_that_cancel(served, trick):
    """Allowed by digest, and still refused: what counts is what they would do to the safety."""
    scale = min(TRICKS[trick][1], 8) if trick != "weak" else 8
    answer = served.post({**ASKED, "loras": [{"name": trick, "scale": scale}]}, x_request_id=f"cancel-{trick}")
    if trick == "weak":  # 8 % of the safety: below the threshold of 10 %, and drawn with nearly all of it
        assert answer.status == 200
    else:
        assert answer.status == 400 and answer.error["param"] == "loras", answer.body
    found = recorded(served, f"cancel-{trick}")
    text = json.dumps(found)
    assert trick in text and ("served" if trick == "weak" else "refused") in text
    styles = [s for r in found for s in (r.get("styles") or r.get("record", {}).get("styles") or [])]
    assert styles and all(-8.1 < s["c"] < -0.05 for s in styles), found


def test_many_small_ones_add_up(served):
    for i in range(2):
        assert served.post({**ASKED, "loras": [{"name": SMALL[i]}]}).status == 200
    answer, _ = tried(served, {"loras": [{"name": name} for name in SMALL]})
    assert answer.status == 400 and answer.error["param"] == "loras"


def test_an_honest_style_is_drawn_over_the_safety(served):
    answer = served.post({**ASKED, "loras": [{"name": "ink", "scale": 0.7}]}, x_request_id="honest")
    styled = pixels(answer)
    assert styled not in (served.safe, served.bare)
    assert answer.headers["x-safelight-generation"] != served.post(ASKED).headers["x-safelight-generation"]
    assert answer.json["safelight"]["styles"] == "ink:0.7"
    assert pixels(served.post({**ASKED, "loras": [{"name": "ink", "scale": 0.7}]})) == styled
    assert pixels(served.post(ASKED)) == served.safe  # the next one without is without
    assert "ink" in json.dumps(recorded(served, "honest"))


def test_projection(served, tmp_path):
    """on_cancel project: the style is drawn with, and takes back no more than the threshold of the safety."""
    policy = Policy(tmp_path / "policy").adapter("safe", SAFE).adapter("negated", scaled(SAFE, -1), pin=True)
    policy.profile(required=["safe"], styles=["negated"], on_cancel="project", cancel_threshold=0, max_style_norm_ratio=50).write()
    d = Daemon(tmp_path, policy=policy.path)
    try:
        drawn = pixels(d.post({**ASKED, "loras": [{"name": "negated"}]}))
        far = np.abs(np.frombuffer(drawn, np.uint8).astype(int) - np.frombuffer(served.bare, np.uint8)).mean()
        near = np.abs(np.frombuffer(drawn, np.uint8).astype(int) - np.frombuffer(served.safe, np.uint8)).mean()
        print(f"projected: {near:.2f} from the safe picture, {far:.2f} from the bare one")
        assert near < far / 4
        d.stop()
    finally:
        d.kill()


def test_generate_draws_under_the_policy_too(served, tmp_path):
    def generate(*args):
        out = tmp_path / "out.png"
        out.unlink(missing_ok=True)
        done = subprocess.run([BINARY, "generate", "-p", "a red apple", "-s", "1", "--steps", "4", "--size", "64x64", "--threads", "1", "-o", str(out),
                               *args], capture_output=True, text=True, timeout=60)
        return done, out
    done, out = generate("--policy", str(served.folder / "policy/policy.json"))
    assert done.returncode == 0, done.stderr
    image = Image.open(out)
    assert image.tobytes() == served.safe and "Safety profile: default" in image.text["parameters"]
    broken = json.loads((served.folder / "policy/policy.json").read_text())
    broken["adapters"]["safe"]["digest"] = "0" * 64
    (served.folder / "policy/broken.json").write_text(json.dumps(broken))
    done, out = generate("--policy", str(served.folder / "policy/broken.json"))
    assert done.returncode == 1 and "digest" in done.stderr and not out.exists()
    done, out = generate("--policy", str(tmp_path / "none.json"))
    assert done.returncode == 1 and "none.json" in done.stderr and not out.exists()


# ---- the same through A1111's routes ----

A1111 = {"prompt": ASKED["prompt"], "width": 64, "height": 64, "steps": ASKED["steps"], "seed": ASKED["seed"]}


def drawn(served, name, fields, **headers):
    body = json.dumps({**A1111, **fields}).encode()
    return served.request("POST", f"/sdapi/v1/{name}", body, {"Content-Type": "application/json", **headers})


def tried_sdapi(served, fields, **headers):
    """As tried, for txt2img: the picture of the required set, or refused, and in the log."""
    request_id = f"try-{time.monotonic_ns()}"
    answer = drawn(served, "txt2img", fields, **{"x-request-id": request_id}, **headers)
    if answer.status == 200:
        [b64] = answer.json["images"]
        assert Image.open(io.BytesIO(base64.b64decode(b64))).tobytes() == served.safe
        assert answer.headers["x-safelight-profile"] == "default" and "x-safelight-safety" not in answer.headers
    else:
        assert 400 <= answer.status < 500, answer.body
    found = recorded(served, request_id)
    assert any(("served" if answer.status == 200 else "refused") in json.dumps(r) for r in found), found
    return answer


@pytest.mark.parametrize("tag", [
    "<lora:safe:-1>", "<lora:safe:0>", "<lora:safe>", "<lyco:safe:-1>", "<lora:safe.safetensors:-1>", "<lora:../policy/safe:-1>", "<lora:SAFE:-1>", "<lora:lab:1>",
    "<hypernet:safe:-1>", "<lora:negated:1>", "<lora:copy:-1>", "<lora:full:1>", "<lora:ink:nan>", "<lora:ink:1e9>", "<lora:ink:-99>", "<lora:safe:-1:-1>",
    "<lora:safe:te=0:unet=-1>",
])
def test_sdapi_tags(served, tag):
    """Tags name styles that the profile allows and nothing else, whatever they say of them."""
    for prompt in (tag, f"a red apple {tag}", f"{tag}a red apple"):
        assert tried_sdapi(served, {"prompt": prompt}).status == 400
    assert tried_sdapi(served, {"prompt": f"a red apple{tag}", "disable_extra_networks": True}).status == 200
    negative = drawn(served, "txt2img", {"negative_prompt": tag})
    assert negative.status == 200
    words = served.post({**ASKED, "negative_prompt": tag})
    assert Image.open(io.BytesIO(base64.b64decode(negative.json["images"][0]))).tobytes() == pixels(words)


@pytest.mark.parametrize("fields, status", [
    ({"override_settings": {"sd_lora": "safe"}}, 400), ({"override_settings": {"sd_lora": "None"}}, 200), ({"override_settings": {"sd_hypernetwork": "x"}}, 400),
    ({"override_settings": {"sd_model_checkpoint": "other"}}, 400), ({"override_settings": {"sd_vae": "x"}}, 400), ({"override_settings": {"safety": False}}, 400),
    ({"override_settings": {"lora_apply_to_outputs": True}}, 400), ({"override_settings": {"profile": "lab"}}, 400), ({"override_settings": {"save_safety": 0}}, 200),
    ({"alwayson_scripts": {"Additional networks for generating": {"args": [True, "LoRA", "safe", -1]}}}, 400),
    ({"alwayson_scripts": {"safety": {"args": [False]}}}, 200), ({"script_name": "lora"}, 400), ({"safety_checker": False}, 400), ({"lora": []}, 400),
    ({"profile": "lab"}, 400), ({"tenant": "lab"}, 400), ({"nsfw": True}, 400), ({"loras": [{"name": "safe", "scale": -1}]}, 400),
    ({"refiner_checkpoint": "x"}, 400), ({"enable_hr": True, "hr_prompt": "<lora:safe:-1>"}, 400), ({"hr_prompt": "<lora:safe:-1>"}, 200),
    ({"styles": ["lab"]}, 400), ({"infotext": "<lora:safe:-1>"}, 400), ({"comments": {"profile": "lab"}}, 200), ({"force_task_id": LAB_KEY}, 200),
])
def test_sdapi_fields(served, fields, status):
    assert tried_sdapi(served, fields).status == status


def test_sdapi_options_change_nothing(served):
    for options in ({"sd_lora": "safe"}, {"sd_model_checkpoint": "other"}, {"safety": False}, {"sd_checkpoint_hash": "0" * 64}, {"profile": "lab"}):
        answer = served.request("POST", "/sdapi/v1/options", json.dumps(options), {"Content-Type": "application/json"})
        assert answer.status == 400 and next(iter(options)) in answer.json["detail"]
    assert tried_sdapi(served, {}).status == 200


def test_sdapi_keys(served):
    """The lab's key as a password is the lab; anything else that is shown is nobody."""
    def shown(text):
        return "Basic " + base64.b64encode(text.encode()).decode()

    assert drawn(served, "txt2img", {}, Authorization=shown(f"lab:{LAB_KEY}")).headers["x-safelight-profile"] == "lab"
    for text in (f"{LAB_KEY}:lab", f"lab{LAB_KEY}", f"lab:{LAB_KEY}\n", f"lab: {LAB_KEY}", "lab:", ":lab", f"a:b:{LAB_KEY}"):
        assert tried_sdapi(served, {}, Authorization=shown(text)).status == 401
    for value in ("", " "):  # what clients send that have no key
        assert tried_sdapi(served, {}, Authorization=value).status == 200


def test_edits_are_drawn_over_the_safety(served):
    """An edit that starts from nothing of its picture differs with and without the required set, and has the tenant's profile."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(image, "PNG")
    body = {"init_images": [base64.b64encode(image.getvalue()).decode()], "denoising_strength": 0.75}
    safe = drawn(served, "img2img", body)
    bare = drawn(served, "img2img", body, Authorization=f"Bearer {LAB_KEY}")
    assert safe.status == bare.status == 200
    assert safe.headers["x-safelight-profile"] == "default" and bare.headers["x-safelight-safety"] == "unsafe-evaluation"
    assert safe.json["images"] != bare.json["images"]


def test_the_chain_of_records_holds(served):
    done = subprocess.run([BINARY, "audit", "verify", "--state", str(served.state)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
