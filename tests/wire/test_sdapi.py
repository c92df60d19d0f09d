"""/sdapi/v1 as A1111's clients use it: sdwebuiapi as it is, and the requests of Open WebUI and SillyTavern as they send them."""
import base64
import concurrent.futures
import hashlib
import io
import json
import re

import numpy as np
import pytest
import webuiapi
from PIL import Image

from adapters import Policy, lora
from conftest import LONG, Daemon, until
from test_audit import records
from test_edits import file, picture, pixels

SMALL = {"prompt": "a red apple", "width": 64, "height": 64, "steps": 2, "seed": 1}
SLOW = {"prompt": "a red apple", "width": 256, "height": 256, "steps": 150, "seed": 1}
KEYS = {"anna": "anna-key-0123456789", "bert": "bert-key-0123456789"}


def post(d, name, fields, **headers):
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return d.request("POST", f"/sdapi/v1/{name}", json.dumps(fields), headers)


def basic(key):
    return "Basic " + base64.b64encode(f"someone:{key}".encode()).decode()


def api(d, **more):
    return webuiapi.WebUIApi(baseurl=d.url + "/sdapi/v1", **more)


def images(answer):
    assert answer.status == 200, answer.body
    return [Image.open(io.BytesIO(base64.b64decode(b))) for b in answer.json["images"]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two tenants with keys, one with a style; whoever has none draws too."""
    folder = tmp_path_factory.mktemp("sdapi")
    policy = Policy(folder / "policy").adapter("safe", lora(1)).adapter("ink", lora(9, strength=0.3), pin=True)
    policy.profile(required=["safe"]).profile("inked", required=["safe"], styles=["ink"], max_style_norm_ratio=50)
    policy.tenant("anna", KEYS["anna"], "inked").tenant("bert", KEYS["bert"], "default").write()
    d = Daemon(folder, policy=policy.path)
    yield d
    try:
        d.stop()
    finally:
        d.kill()


# ---- sdwebuiapi ----

def test_txt2img(daemon):
    """sdwebuiapi with its own defaults; the picture is that of the same request in OpenAI's words."""
    result = api(daemon).txt2img(prompt="a red apple", negative_prompt="blue", seed=1, steps=2, width=64, height=64)
    assert result.image.size == (64, 64) and len(result.images) == 1
    assert result.info["seed"] == 1 and result.info["all_seeds"] == [1] and result.info["steps"] == 2
    assert result.info["sampler_name"] == "Euler a" and result.info["cfg_scale"] == 7
    assert result.parameters["prompt"] == "a red apple" and result.parameters["seed"] == 1
    assert result.info["infotexts"] == [result.image.info["parameters"]]
    same = daemon.png(prompt="a red apple", negative_prompt="blue", sampler="euler_a", guidance_scale=7)
    assert (pixels(result.image) == pixels(Image.open(io.BytesIO(same)))).all()


def test_batches_are_seeds_counting_up(daemon):
    result = api(daemon, sampler="DDIM").txt2img(prompt="a red apple", seed=5, steps=2, width=64, height=64, batch_size=2, n_iter=2, eta=0)
    assert len(result.images) == 4 and result.info["all_seeds"] == [5, 6, 7, 8]
    assert len({im.tobytes() for im in result.images}) == 4
    third = api(daemon, sampler="DDIM").txt2img(prompt="a red apple", seed=7, steps=2, width=64, height=64, eta=0)
    assert third.image.tobytes() == result.images[2].tobytes()


def test_img2img(daemon):
    """Near the picture with little denoising, and what OpenAI's form draws from it."""
    a = api(daemon)
    args = {"images": [picture()], "prompt": "a red apple", "seed": 1, "steps": 8, "width": 64, "height": 64}
    results = [a.img2img(denoising_strength=s, **args) for s in (0.25, 1)]
    near, far = (pixels(r.image) for r in results)
    first = pixels(picture())
    assert "Denoising strength: 0.25, " in results[0].info["infotexts"][0] and results[0].info["denoising_strength"] == 0.25
    assert np.abs(near - first).mean() < np.abs(far - first).mean()


def test_inpainting(daemon):
    """What is black in the mask comes back as it was."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    result = api(daemon).img2img(images=[picture()], mask_image=mask, mask_blur=0, inpaint_full_res=False, inpainting_fill=1, prompt="a red apple", seed=1,
                                 steps=4, width=64, height=64)
    got, first = pixels(result.image), pixels(picture())
    assert (got[:, 32:] == first[:, 32:]).all() and (got[:, :32] != first[:, :32]).any()


def square(w, h, box):
    mask = Image.new("L", (w, h), 0)
    mask.paste(255, box)
    return mask


def test_only_masked(daemon):
    """sdwebuiapi's own default with a mask. Where the part is as large as what is drawn, it is what drawing that part by itself gives, and the rest of the
    picture has not changed by a bit; the answer is as large as the picture."""
    a, first = api(daemon), picture(200, 150)
    args = {"prompt": "a red apple", "seed": 1, "steps": 4, "width": 64, "height": 64, "mask_blur": 0, "inpainting_fill": 1}
    whole = a.img2img(images=[first], mask_image=square(200, 150, (70, 50, 102, 82)), inpaint_full_res=True, inpaint_full_res_padding=16, **args)
    box = (54, 34, 118, 98)
    part = a.img2img(images=[first.crop(box)], mask_image=square(64, 64, (16, 16, 48, 48)), inpaint_full_res=False, **args)
    want = first.copy()
    want.paste(part.image, box)
    assert whole.image.size == (200, 150) and (pixels(whole.image) == pixels(want)).all() and (pixels(whole.image) != pixels(first)).any()
    assert whole.info["width"] == 64 and "Size: 64x64, " in whole.image.info["parameters"]  # as A1111: of what was drawn
    masks = {"mask_blur": 4, "inpainting_fill": 0}
    defaults = a.img2img(images=[first], mask_image=square(200, 150, (70, 50, 102, 82)), prompt="a red apple", seed=1, steps=4, width=128, height=64, **masks)
    got = pixels(defaults.image) != pixels(first)
    assert defaults.image.size == (200, 150) and got[60:70, 80:90].any() and not got[:40].any() and not got[92:].any() and not got[:, :60].any()


def base64_of(image):
    return base64.b64encode(file(image)).decode()


def test_only_masked_is_recorded_as_it_leaves(daemon):
    """The audit log has the digest of the picture that the client got, not of the part that was drawn."""
    fields = {**SMALL, "init_images": [base64_of(picture(96, 80))], "mask": base64_of(square(96, 80, (8, 8, 40, 40)))}
    [image] = images(post(daemon, "img2img", fields, x_request_id="masked"))
    [row] = [r for r in records(daemon, "image") if r["request_id"] == "masked"]
    assert image.size == (96, 80) and row["image_digest"] == hashlib.blake2b(image.convert("RGB").tobytes(), digest_size=32).hexdigest()


@pytest.mark.parametrize("more, words", [
    ({"init_images": [base64_of(Image.new("RGB", (2100, 2000)))]}, "2100x2000"), ({"mask": base64_of(Image.new("L", (64, 64)))}, "covers nothing"),
    ({"mask": "bm8gcGljdHVyZQ=="}, "mask: the picture is neither"), ({"inpaint_full_res_padding": -1}, "inpaint_full_res_padding"),
    ({"inpainting_fill": 3}, "inpainting_fill"), ({"resize_mode": 3}, "latent upscale"),
])
def test_only_masked_refusals(daemon, more, words):
    answer = post(daemon, "img2img", {**SMALL, "init_images": [base64_of(picture())], "mask": base64_of(square(64, 64, (8, 8, 40, 40))), **more})
    assert answer.status == 400 and words in answer.json["detail"], answer.body


def test_send_images(daemon):
    answer = post(daemon, "txt2img", {**SMALL, "send_images": False})
    assert answer.status == 200 and answer.json["images"] == [] and json.loads(answer.json["info"])["seed"] == 1


def test_samples_format(daemon):
    for name, form in (("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")):
        [image] = images(post(daemon, "txt2img", {**SMALL, "override_settings": {"samples_format": name}}))
        assert image.format == form and image.size == (64, 64)


def test_png_info(daemon):
    a = api(daemon)
    drawn = a.txt2img(prompt="a red apple, (green:1.2)", seed=1, steps=2, width=64, height=64)
    assert a.png_info(Image.new("RGB", (8, 8))).info == ""
    [b64] = post(daemon, "txt2img", SMALL).json["images"]
    told = post(daemon, "png-info", {"image": "data:image/png;base64," + b64})
    assert told.status == 200 and told.json["info"].startswith("a red apple\n") and told.json["parameters"]["Seed"] in (1, "1")
    assert drawn.info["infotexts"][0].startswith("a red apple, (green:1.2)\n")
    refused = post(daemon, "png-info", {"image": base64.b64encode(b"no picture").decode()})
    assert refused.status == 400 and "PNG" in refused.json["detail"]


def test_lists(shared):
    """Everything that sdwebuiapi reads of a server, for who has a style and for who has none."""
    a = api(shared, username="someone", password=KEYS["anna"])
    assert a.util_get_sampler_names() == ["DDIM", "DPM++ 2M", "Euler", "Euler a"]
    assert set(a.util_get_scheduler_names()) == {"automatic", "uniform", "karras"}
    [model] = a.get_sd_models()
    assert a.util_get_current_model() == model["title"] and model["model_name"] == "emoji"
    assert [x["name"] for x in a.get_loras()] == ["ink"]
    assert api(shared).get_loras() == api(shared, username="x", password=KEYS["bert"]).get_loras() == []
    assert [x["name"] for x in a.get_upscalers()] == ["None"]
    assert a.get_embeddings() == {"loaded": {}, "skipped": {}} and a.get_scripts() == {"txt2img": [], "img2img": []}
    for empty in (a.get_latent_upscale_modes, a.get_sd_vae, a.get_hypernetworks, a.get_face_restorers, a.get_realesrgan_models, a.get_prompt_styles):
        assert empty() == []
    assert a.get_cmd_flags()["api"] is True
    ram = a.get_memory()["ram"]
    assert 0 < ram["used"] < ram["total"] and ram["free"] + ram["used"] == ram["total"]
    assert a.refresh_checkpoints() is None
    assert post(shared, "refresh-loras", {}).json is None
    a.util_set_model("emoji")
    a.util_wait_for_ready()


def test_style_tags(shared):
    """A tag adds a style where the profile has it: the same picture as OpenAI's field, and the tag stands in what is told again."""
    answer = post(shared, "txt2img", {**SMALL, "prompt": "a red apple<lora:ink:0.5>"}, Authorization=basic(KEYS["anna"]))
    [image] = images(answer)
    body = {"prompt": "a red apple", "size": "64x64", "steps": 2, "seed": 1, "loras": [{"name": "ink", "scale": 0.5}]}
    same = shared.post(body, Authorization="Bearer " + KEYS["anna"], Accept="image/png")
    assert same.status == 200, same.body
    assert (pixels(image) == pixels(Image.open(io.BytesIO(same.body)))).all()
    assert "<lora:ink:0.5>" in json.loads(answer.json["info"])["prompt"]
    [plain] = images(post(shared, "txt2img", SMALL, Authorization=basic(KEYS["anna"])))
    assert (pixels(plain) != pixels(image)).any()
    refused = post(shared, "txt2img", {**SMALL, "prompt": "a red apple<lora:ink:0.5>"}, Authorization=basic(KEYS["bert"]))
    assert refused.status == 400 and "ink" in refused.json["detail"]


# ---- keys and errors ----

def test_keys(shared):
    assert api(shared, username="x", password=KEYS["anna"]).txt2img(prompt="", steps=2, width=64, height=64).image
    with pytest.raises(RuntimeError) as refused:
        api(shared, username="x", password="wrong").txt2img(prompt="", steps=2, width=64, height=64)
    assert refused.value.args[0] == 401
    for value in ("Basic", "Basic " + base64.b64encode(KEYS["anna"].encode()).decode(), "Basic " + KEYS["anna"], "Basic " + "QQ==" * 200, "Digest x",
                  "Basic " + base64.b64encode(b"x:" + KEYS["anna"].encode() + b"\0").decode()):
        for name in ("progress", "loras", "options"):
            assert shared.get(f"/sdapi/v1/{name}", Authorization=value).status == 401, value
        assert post(shared, "interrupt", {}, Authorization=value).status == 401
        assert post(shared, "txt2img", SMALL, Authorization=value).status == 401
    assert shared.get("/v1/jobs/none", Authorization=basic(KEYS["anna"])).status == 404  # the other surfaces take it too


@pytest.mark.parametrize("name, fields, words", [
    ("txt2img", {**SMALL, "steps": 0}, "steps"), ("txt2img", {**SMALL, "width": 60}, "width"), ("txt2img", {**SMALL, "enable_hr": True}, "enable_hr"),
    ("txt2img", {**SMALL, "sampler_name": "LMS"}, "sampler"), ("txt2img", {**SMALL, "nonsense": 1}, "nonsense"),
    ("txt2img", {**SMALL, "script_name": "x/y plot"}, "script_name"), ("img2img", SMALL, "init_images"),
    ("img2img", {**SMALL, "init_images": ["bm8gcGljdHVyZQ=="]}, "init_images"), ("options", {"sd_model_checkpoint": "other"}, "sd_model_checkpoint"),
    ("options", {"CLIP_stop_at_last_layers": 2}, "override_settings"), ("txt2img", [], "object"),
])
def test_refusals(daemon, name, fields, words):
    answer = post(daemon, name, fields)
    assert answer.status == 400, answer.body
    assert words in answer.json["detail"] and answer.json["errors"] == answer.json["detail"] and answer.json["body"] == ""


def test_paths_and_methods(daemon):
    for path in ("/sdapi/v1/sd-modules/x", "/sdapi/v1/", "/sdapi/v1/progress/"):
        answer = daemon.request("POST", path, "{}", {"Content-Type": "application/json"})
        assert answer.status == 404 and "detail" in answer.json
    for path, methods in (("txt2img", "POST"), ("progress", "GET, HEAD"), ("options", "GET, HEAD, POST")):
        answer = daemon.request("DELETE", f"/sdapi/v1/{path}")
        assert answer.status == 405 and answer.headers["allow"] == methods and "detail" in answer.json


def test_what_is_absent_says_so(shared):
    """Clients have buttons for it: each is told why not, in A1111's shape, also with a picture in the body; who shows a wrong key hears of that."""
    a = api(shared, username="x", password=KEYS["anna"])
    for ask, word in ((lambda: a.interrogate(picture()), "interrogator"), (lambda: a.extra_single_image(picture(), upscaler_1="R-ESRGAN 4x+"), "upscalers"),
                      (lambda: a.extra_batch_images([picture(), picture()]), "face restorers")):
        with pytest.raises(RuntimeError) as refused:
            ask()
        assert refused.value.args[0] == 501 and word in refused.value.args[1]
    for name in ("interrogate", "extra-single-image", "extra-batch-images"):
        answer = post(shared, name, {"image": "A" * 3000000})
        assert answer.status == 501 and set(answer.json) == {"error", "detail", "body", "errors", "param"}, answer.body
        assert post(shared, name, {}, Authorization=basic("wrong")).status == 401
    assert re.search(r'requests_total\{surface="sdapi",status="501"\} 6', shared.get("/metrics").body.decode())


def test_krita(shared, slow):
    """What cyanic-sd-krita asks when it starts (krita_comm.py: it is there when /queue/status is an object), what its status bar shows, and what it draws."""
    queue = shared.get("/queue/status").json
    assert queue["queue_size"] == 0 and queue["queue_eta"] == 0 and queue["msg"] == "estimation"
    names = ("options", "sd-models", "sd-vae", "samplers", "schedulers", "upscalers", "face-restorers", "prompt-styles", "scripts", "loras", "embeddings",
             "hypernetworks", "progress", "extensions")
    told = {name: shared.get(f"/sdapi/v1/{name}") for name in names}
    assert all(answer.status == 200 for answer in told.values()) and told["options"].json["img2img_color_correction"] is False and told["extensions"].json == []
    status = shared.get("/sdapi/v1/system-info/status").json
    assert status["version"]["app"] == "safelight" and re.fullmatch(r"\d+:\d\d:\d\d", status["uptime"]) and status["state"] is status["memory"] is None
    full = shared.get("/sdapi/v1/system-info/status?full=true&refresh=true", Authorization=basic(KEYS["anna"])).json
    assert set(full) == set(status) and full["state"]["job_count"] == 0 and 0 < full["memory"]["ram"]["used"] < full["memory"]["ram"]["total"] < 1 << 14
    slow("anna")
    until(lambda: shared.get("/sdapi/v1/system-info/status?state=true", Authorization=basic(KEYS["anna"])).json["state"]["sampling_step"], "a step", 60)
    assert shared.get("/sdapi/v1/system-info/status?state=true").json["state"]["job_count"] == 0  # of the caller's own alone
    for name in ("refresh-vae", "refresh-embeddings"):
        assert post(shared, name, {}).json is None
    assert shared.get("/queue/status", Authorization=basic("wrong")).status == shared.get("/sdapi/v1/system-info/status", Authorization=basic("x")).status == 401
    body = {"prompt": "a red apple", "negative_prompt": "", "seed": -1, "steps": 2, "cfg_scale": 7, "sampler_name": "Euler a", "width": 64, "height": 64,
            "batch_size": 1, "n_iter": 1, "denoising_strength": 0.75, "mask_blur": 4, "inpainting_fill": 1, "inpaint_full_res": True,
            "inpaint_full_res_padding": 8, "init_images": [base64_of(picture(90, 70))], "mask": base64_of(square(90, 70, (20, 20, 50, 50))),
            "override_settings": {"sd_model_checkpoint": told["options"].json["sd_model_checkpoint"], "sd_vae": "Automatic", "img2img_color_correction": False},
            "override_settings_restore_afterwards": False}
    [image] = images(post(shared, "img2img", body))
    assert image.size == (90, 70)


# ---- progress, interrupt, skip ----

IDLE = {"progress": 0, "eta_relative": 0, "current_image": None, "textinfo": None}


def progress(d, key, query=""):
    answer = d.get(f"/sdapi/v1/progress{query}", Authorization=basic(KEYS[key]))
    assert answer.status == 200, answer.body
    return answer.json


def is_idle(p):
    return all(p[k] == v for k, v in IDLE.items()) and p["state"]["job_count"] == 0 and p["state"]["job"] == ""


@pytest.fixture
def slow(shared):
    """slow(key) begins a picture that takes long, and returns what will be its answer."""
    pool = concurrent.futures.ThreadPoolExecutor(4)
    yield lambda key, **more: pool.submit(post, shared, "txt2img", {**SLOW, **more}, Authorization=basic(KEYS[key]))
    for key in KEYS.values():
        until(lambda: post(shared, "interrupt", {}, Authorization=basic(key)).status == 200, "interrupt")
    pool.shutdown()


def test_progress_with_a_picture_of_the_caller_alone(shared, slow):
    assert is_idle(progress(shared, "anna"))
    slow("anna")
    p = until(lambda: (p := progress(shared, "anna"))["current_image"] and p, "a preview", 60)
    assert 0 < p["progress"] < 1 and p["state"]["job_count"] == 1 and p["state"]["sampling_steps"] == 150
    assert 1 <= p["state"]["sampling_step"] <= 150 and p["state"]["job_no"] == 0 and len(p["state"]["job_timestamp"]) == 14
    preview = Image.open(io.BytesIO(base64.b64decode(p["current_image"])))
    assert preview.size == (256, 256)
    assert progress(shared, "anna", "?skip_current_image=true")["current_image"] is None
    refused = shared.get("/sdapi/v1/progress?skip_current_image=null")
    assert refused.status == 400 and refused.json["param"] == "skip_current_image"
    assert is_idle(progress(shared, "bert")) and is_idle(shared.get("/sdapi/v1/progress").json)


def test_interrupt_stops_the_callers_own(shared, slow):
    """The interrupted requests are answered with the pictures as they are, under their generation and recorded; another tenant's goes on."""
    anna, bert = [slow("anna"), slow("anna", seed=2)], slow("bert")
    until(lambda: progress(shared, "anna")["progress"] > 0.02 and progress(shared, "bert")["progress"], "both to be drawn", 60)
    until(lambda: metric(shared, "pictures_running") == 3, "all three to be begun", 60)
    began = metric(shared, "steps_total")
    until(lambda: metric(shared, "steps_total") > began + 30, "each to have had its turn", 60)
    assert post(shared, "interrupt", {}, Authorization=basic(KEYS["anna"])).json == {}
    for answer in anna:
        answer = answer.result(60)
        [image] = images(answer)
        info = json.loads(answer.json["info"])
        step = int(re.search(r"Steps: 150, .*Interrupted at step: (\d+), ", image.info["parameters"]).group(1))
        assert image.size == (256, 256) and 0 < step < 150 and pixels(image).std() > 1
        assert info["seed"] in (1, 2) and info["infotexts"] == [image.info["parameters"]] and answer.json["parameters"]["steps"] == 150
        [record] = [r for r in records(shared, "image") if r["request_id"] == answer.headers["x-request-id"] and r["verdict"] != "preview"]
        assert record["verdict"] == "interrupted, served as it was" and record["seed"] == info["seed"]
        assert record["image_digest"] == hashlib.blake2b(image.convert("RGB").tobytes(), digest_size=32).hexdigest()
        assert record["generation_id"] == answer.headers["x-safelight-generation"] and f"Generation: {record['generation_id']}, " in image.info["parameters"]
    assert not bert.done() and progress(shared, "bert")["progress"] > 0
    assert is_idle(progress(shared, "anna"))


def test_progress_says_how_the_request_ends(start):
    """Until it is answered; a skip until the next picture begins. The question comes with the word, so that the daemon has both before a step is over."""
    d = start("--running", "1")

    def word_and_look(word):
        with d.socket() as sock:
            sock.sendall(f"POST /sdapi/v1/{word} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
                         "GET /sdapi/v1/progress?skip_current_image=true HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while piece := sock.recv(65536):
                data += piece
        return state(json.loads(data[data.rindex(b"\r\n\r\n"):]))

    def state(p):
        return p["state"]["skipped"], p["state"]["interrupted"]

    def look():
        return d.get("/sdapi/v1/progress").json

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(post, d, "txt2img", {**SLOW, "n_iter": 2})
        until(lambda: look()["progress"] > 0.02, "it to be drawn", 60)
        assert state(look()) == (False, False)
        assert word_and_look("skip") == (True, False)
        until(lambda: state(look()) == (False, False), "the second picture to begin", 60)
        assert word_and_look("interrupt") == (False, True)
        assert drawn.result(60).status == 200
    assert state(look()) == (False, False)


def metric(d, name):
    return int(re.search(rf"^safelight_{name}(?:{{device=\"0\"}})? (\d+)$", d.get("/metrics").body.decode(), re.M).group(1))


def counted(d):
    """Jobs that ended before they were done, by who ended them."""
    return {k: int(v) for k, v in re.findall(r'jobs_cancelled_total\{by="(\w+)"\} (\d+)', d.get("/metrics").body.decode())}


def test_interrupt_ends_what_waits(start):
    """Without a picture: nothing was begun. One that has all its pictures already keeps them."""
    d = start("--running", "1")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(post, d, "txt2img", {**SLOW, "batch_size": 3})
        until(lambda: d.get("/sdapi/v1/progress").json["progress"] > 0.02, "it to be drawn", 60)
        two = pool.submit(post, d, "txt2img", SLOW)
        until(lambda: metric(d, "jobs_queued") == 1, "the second to wait")
        assert post(d, "interrupt", {}).json == {}
        assert len(images(one.result(60))) == 1 and two.result(60).json["images"] == []
    assert json.loads(one.result().json["info"])["all_seeds"] == [1, 2, 3] and json.loads(two.result().json["info"])["infotexts"] == []
    assert counted(d) == {"client": 2, "disconnect": 0, "deadline": 0, "shutdown": 0}
    assert len(images(post(d, "txt2img", SMALL))) == 1


def test_interrupt_of_a_part(daemon):
    """Only what is masked: the whole picture comes back, with the part as it is."""
    fields = {**SLOW, "init_images": [base64_of(picture(200, 150))], "mask": base64_of(square(200, 150, (70, 50, 102, 82))), "denoising_strength": 1}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(post, daemon, "img2img", fields)
        until(lambda: daemon.get("/sdapi/v1/progress").json["progress"] > 0.02, "it to be drawn", 60)
        assert api(daemon).interrupt() == {}
        [image] = images(drawn.result(60))
    got = pixels(image) != pixels(picture(200, 150))
    assert image.size == (200, 150) and got.any() and not got[:36].any()


def test_interrupt_leaves_other_surfaces_alone(shared):
    key = {"Authorization": "Bearer " + KEYS["anna"]}
    body = json.dumps({**LONG, "steps": 60})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(shared.request, "POST", "/v1/images/generations", body, {"Content-Type": "application/json", **key})
        until(lambda: 'safelight_pictures_running{device="0"} 1' in shared.get("/metrics").body.decode(), "the picture to be drawn", 60)
        assert post(shared, "interrupt", {}, **key).json == {}
        assert drawn.result(120).status == 200
    assert is_idle(progress(shared, "anna"))


def test_skip_ends_the_pictures_at_hand(start):
    """Those that were begun, as they are; the rest of the request is drawn, each with the bytes that it has alone."""
    d = start("--running", "1")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(post, d, "txt2img", {**SLOW, "steps": 40, "n_iter": 2})
        until(lambda: d.get("/sdapi/v1/progress").json["progress"] > 0.02, "it to be drawn", 60)
        assert api(d).skip() is None
        first, second = images(drawn.result(120))
    assert "Interrupted at step: " in first.info["parameters"] and "Interrupted" not in second.info["parameters"]
    [alone] = images(post(d, "txt2img", {**SLOW, "steps": 40, "seed": 2}))
    assert alone.tobytes() == second.tobytes()
    assert counted(d)["client"] == 1
    assert api(d).skip() is None  # nothing is at hand


# ---- Open WebUI and SillyTavern, request by request ----

@pytest.mark.parametrize("auth", ["", basic(KEYS["anna"])])
def test_open_webui(shared, auth):
    """Its admin page looks at the options, sends the whole object back, lists models; then it draws (routers/images.py). Without a key the header is empty."""
    options = shared.get("/sdapi/v1/options", Authorization=auth)
    assert options.status == 200 and options.json["sd_model_checkpoint"].startswith("emoji")
    models = shared.get("/sdapi/v1/sd-models", Authorization=auth).json
    assert [(m["title"].split(" ")[0], m["model_name"]) for m in models] == [("emoji", "emoji")]
    changed = post(shared, "options", {**options.json, "sd_model_checkpoint": models[0]["title"]}, Authorization=auth)
    assert changed.status == 200 and changed.json is None
    body = {"prompt": "a red apple", "batch_size": 1, "width": 64, "height": 64, "steps": 2, "negative_prompt": "blue", "cfg_scale": 7.0,
            "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    [image] = images(post(shared, "txt2img", body, Authorization=auth))
    assert image.size == (64, 64)


def test_sillytavern(shared):
    """What src/endpoints/stable-diffusion.js asks, and what it sends to draw; then the interrupt of a browser that has left."""
    auth = basic(KEYS["anna"])
    for name in ("options", "upscalers", "latent-upscale-modes", "sd-vae", "samplers", "schedulers", "sd-models", "progress"):
        assert shared.get(f"/sdapi/v1/{name}", Authorization=auth).status == 200, name
    body = {"prompt": "a red apple", "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "Automatic", "steps": 2, "cfg_scale": 7, "width": 64,
            "height": 64, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1, "hr_additional_modules": [],
            "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": -1, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic",
            "forge_additional_modules": []}, "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
            "do_not_save_grid": False, "do_not_save_samples": False}
    answer = post(shared, "txt2img", body, Authorization=auth)
    assert len(images(answer)) == 1
    assert post(shared, "interrupt", {}, Authorization=auth).json == {}


def test_examples_of_drawing_twice_are_the_same(daemon):
    one, two = (post(daemon, "txt2img", SMALL).json["images"] for _ in range(2))
    assert one == two


def test_first_picture_as_file_and_as_data_url(daemon):
    data = base64.b64encode(file(picture())).decode()
    body = {**SMALL, "steps": 4, "denoising_strength": 0.5}
    one, two = (post(daemon, "img2img", {**body, "init_images": [b64]}).json["images"] for b64 in (data, "data:image/png;base64," + data))
    assert one == two and one != post(daemon, "txt2img", {**SMALL, "steps": 4}).json["images"]
