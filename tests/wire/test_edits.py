"""POST /v1/images/edits and the forms of an answer (files, addresses, formats, streams), as the openai client and plain forms ask for them."""
import asyncio
import base64
import concurrent.futures
import io
import json
import time
import urllib.request
import uuid

import numpy as np
import openai
import pytest
from PIL import Image

from conftest import PATIENCE, QUICK, until

SMALL = {"size": "64x64", "extra_body": {"steps": 2, "seed": 1}}
PROMPT = "a red apple"


def client(daemon, kind=openai.OpenAI):
    return kind(base_url=daemon.url + "/v1", api_key="none", max_retries=0, timeout=120 * PATIENCE)


def picture(w=64, h=64):
    """Something with structure, and different in its quarters."""
    y, x = np.mgrid[0:h, 0:w]
    return Image.fromarray(np.stack([x * 255 // w, y * 255 // h, (x + y) % 256], 2).astype(np.uint8))


def hole(w=64, h=64):
    """OpenAI's mask: the left half is transparent."""
    mask = np.zeros((h, w, 4), np.uint8)
    mask[:, w // 2:, 3] = 255
    return Image.fromarray(mask)


def file(image, form="PNG", **more):
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


def upload(image, name="image.png"):
    return (name, file(image), "image/png")


def opened(b64):
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def form(fields, files):
    """A multipart body and its Content-Type."""
    line = uuid.uuid4().hex
    body = b""
    for name, value in fields.items():
        body += f'--{line}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    for name, data in files.items():
        body += f'--{line}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\nContent-Type: image/png\r\n\r\n'.encode()
        body += data + b"\r\n"
    return body + f"--{line}--\r\n".encode(), f"multipart/form-data; boundary={line}"


def send_form(daemon, fields, files, **headers):
    body, kind = form(fields, files)
    return daemon.request("POST", "/v1/images/edits", body, {"Content-Type": kind, **headers})


FIELDS = {"prompt": PROMPT, "size": "64x64", "steps": 2, "seed": 1}


# ---- edits ----

def test_openai_client_edits(daemon):
    """Its own picture is where an edit starts; more strength goes further away from it; the same request again is the same picture."""
    c = client(daemon)

    def edit(strength):
        body = {"steps": 8, "seed": 1, "strength": strength}
        answer = c.images.edit(image=upload(picture()), prompt=PROMPT, size="64x64", extra_body=body)
        assert len(answer.data) == 1 and answer.data[0].b64_json
        return pixels(opened(answer.data[0].b64_json))

    near, far = edit(0.25), edit(1)
    assert near.shape == far.shape == (64, 64, 3)
    first = pixels(picture())
    assert np.abs(near - first).mean() < np.abs(far - first).mean()
    assert (edit(0.25) == near).all()
    drawn = pixels(opened(c.images.generate(prompt=PROMPT, **SMALL).data[0].b64_json))
    assert (drawn != near).any()


def test_openai_async_client_edits(daemon):
    async def both():
        c = client(daemon, openai.AsyncOpenAI)
        return await asyncio.gather(*(c.images.edit(image=upload(picture()), prompt=PROMPT, n=2, **SMALL) for _ in range(2)))

    one, two = asyncio.run(both())
    assert [d.b64_json for d in one.data] == [d.b64_json for d in two.data]
    assert one.data[0].b64_json != one.data[1].b64_json


def test_mask_keeps_what_is_opaque(daemon):
    answer = client(daemon).images.edit(image=upload(picture()), mask=upload(hole()), prompt=PROMPT, **SMALL)
    got, first = pixels(opened(answer.data[0].b64_json)), pixels(picture())
    assert (got[:, 32:] == first[:, 32:]).all()
    assert (got[:, :32] != first[:, :32]).any()


def test_n_edits_are_seed_after_seed(daemon):
    """Each is that of a request of its own, though the first picture is encoded once for all of them."""
    files = {"image": file(picture()), "mask": file(hole())}
    data = send_form(daemon, {**FIELDS, "n": 4, "sampler": "euler_a", "strength": 0.8, "steps": 3}, files).json["data"]
    assert len({d["b64_json"] for d in data}) == 4
    for i, d in enumerate(data):
        alone = send_form(daemon, {**FIELDS, "seed": 1 + i, "sampler": "euler_a", "strength": 0.8, "steps": 3}, files, Accept="image/png")
        assert base64.b64decode(d["b64_json"]) == alone.body


def test_edit_is_the_job_with_the_same_picture(daemon):
    """The same request as a durable job has the same picture: no surface forgets where it starts."""
    data = file(picture())
    png = send_form(daemon, {**FIELDS, "strength": 0.5}, {"image": data}, Accept="image/png")
    assert png.status == 200, png.body
    body = json.dumps({**FIELDS, "strength": 0.5, "image": base64.b64encode(data).decode()})
    job = daemon.request("POST", "/v1/jobs", body, {"Content-Type": "application/json", "Accept": "image/png"})
    assert job.status == 202, job.body
    path = f"/v1/jobs/{job.json['id']}"
    until(lambda: daemon.get(path).json["status"] not in ("queued", "running"), "the job to end", 60)
    assert daemon.get(path + "/pictures/0").body == png.body


def test_streamed_edit(daemon):
    c = client(daemon)
    body = {"steps": 8, "seed": 1}
    events = list(c.images.edit(image=upload(picture()), prompt=PROMPT, size="64x64", stream=True, partial_images=1, n=2, extra_body=body))
    done = [e for e in events if e.type == "image_edit.completed"]
    assert len(done) == 2 and {e.type for e in events} <= {"image_edit.partial_image", "image_edit.completed"}
    whole = c.images.edit(image=upload(picture()), prompt=PROMPT, size="64x64", n=2, extra_body=body)
    assert [e.b64_json for e in done] == [d.b64_json for d in whole.data]


@pytest.mark.parametrize("fields, files, param, words", [
    ({}, {"image": b"no picture"}, "image", "image"),
    ({}, {}, "image", "required"),
    ({"strength": 0}, {"image": file(picture())}, "strength", "strength"),
    ({"strength": 0.1}, {"image": file(picture())}, "strength", "no step"),
    ({"size": "60x64"}, {"image": file(picture())}, "size", "multiple"),
    ({}, {"image": file(picture()), "mask": file(picture())}, "mask", "transparent"),
    ({}, {"image": file(picture())[:-40]}, "image", "image"),
    ({"safety": "off"}, {"image": file(picture())}, "safety", "safety"),
], ids=["no picture", "none", "strength 0", "no step", "size", "opaque mask", "cut off", "safety"])
def test_bad_edits(daemon, fields, files, param, words):
    answer = send_form(daemon, {**FIELDS, **fields}, files)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param and words in answer.error["message"]


def large(form="PNG"):
    """Bytes that take long to read, and are refused at the end of it: the file is cut off."""
    y, x = np.mgrid[0:4096, 0:4096]
    return file(Image.fromarray(np.stack([(x * 7 + y) % 256, y * 3 % 256, x * y % 251], 2).astype(np.uint8)), form)[:-200]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_others_do_not_wait_for_a_picture(daemon, form):
    """Reading a picture takes its time, and nobody else's: the worst of many answers meanwhile (measured: 3 to 45 ms) is far from all the time that it takes."""
    data, worst = large(form), 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        answer = pool.submit(send_form, daemon, FIELDS, {"image": data})
        while not answer.done():
            asked = time.monotonic()
            assert daemon.get("/healthz").status == 200
            worst = max(worst, time.monotonic() - asked)
        took = time.monotonic() - began
    assert answer.result().status == 400 and answer.result().error["param"] == "image" and "cut off" in answer.result().error["message"]
    assert worst < took / 3, (worst, took)


def test_refused_before_a_stream_begins(daemon):
    """What cannot be read is a plain 400, also of who wanted a stream, and of a job, which is not accepted then."""
    answer = send_form(daemon, {**FIELDS, "stream": "true"}, {"image": file(picture())[:-40]})
    assert answer.status == 400 and answer.error["param"] == "image" and answer.headers["content-type"] == "application/json"
    body = json.dumps({**FIELDS, "image": base64.b64encode(file(picture())[:-40]).decode()})
    answer = daemon.request("POST", "/v1/jobs", body, {"Content-Type": "application/json", "Idempotency-Key": "cut-off"})
    assert answer.status == 400 and answer.error["param"] == "image"
    whole = json.dumps({**FIELDS, "strength": 0.5, "image": base64.b64encode(file(picture())).decode()})
    assert daemon.request("POST", "/v1/jobs", whole, {"Content-Type": "application/json", "Idempotency-Key": "cut-off"}).status == 202


def test_a_bomb_is_refused(daemon):
    """Sides and pixels are judged by the file's head."""
    for w, h in ((8193, 8), (8192, 8192)):
        answer = send_form(daemon, FIELDS, {"image": file(Image.new("L", (w, h)))})
        assert answer.status == 400 and answer.error["param"] == "image" and f"{w}x{h}" in answer.error["message"], answer.body


def test_who_leaves_while_his_picture_is_read(start):
    """The job goes with him, and the next one is served."""
    d = start()
    body, kind = form(FIELDS, {"image": large()})
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    sock = d.socket()
    sock.sendall(head.encode() + body)
    until(lambda: "safelight_jobs_queued 1" in d.get("/metrics").body.decode(), "the picture to be read")
    sock.close()
    until(lambda: 'cancelled_total{by="disconnect"} 1' in d.get("/metrics").body.decode(), "it to be seen")
    until(lambda: "safelight_jobs_queued 0" in d.get("/metrics").body.decode(), "nobody to wait")
    assert send_form(d, FIELDS, {"image": file(picture())}).status == 200


def test_json_is_no_form(daemon):
    answer = daemon.request("POST", "/v1/images/edits", b"{}", {"Content-Type": "application/json"})
    assert answer.status == 415 and "multipart/form-data" in answer.error["message"]


# ---- forms of the answer ----

@pytest.mark.parametrize("name, form", [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_format(daemon, name, form):
    c = client(daemon)
    small, large = (base64.b64decode(c.images.generate(prompt=PROMPT, output_format=name, output_compression=q, **SMALL).data[0].b64_json) for q in (5, 95))
    plain = pixels(opened(c.images.generate(prompt=PROMPT, **SMALL).data[0].b64_json))
    for data in (small, large):
        image = Image.open(io.BytesIO(data))
        assert image.format == form and image.size == (64, 64)
    assert len(small) < len(large)
    worse, better = (np.abs(pixels(Image.open(io.BytesIO(d))) - plain).mean() for d in (small, large))
    assert better < worse and better < 8


def test_accept_excludes(daemon):
    for more, param in (({"stream": True}, "stream"), ({"response_format": "url"}, "response_format"), ({"n": 2}, "n")):
        answer = daemon.post({**QUICK, **more}, Accept="image/webp")
        assert answer.status == 400 and answer.error["param"] == param


def test_urls(daemon):
    """What stands at the address is what the answer would have carried, under the name that the client calls this server."""
    c = client(daemon)
    told = c.images.generate(prompt=PROMPT, n=2, response_format="url", output_format="webp", **SMALL)
    whole = c.images.generate(prompt=PROMPT, n=2, output_format="webp", **SMALL)
    assert len({d.url for d in told.data}) == 2
    for d, w in zip(told.data, whole.data):
        assert d.b64_json is None and d.url.startswith(f"{daemon.url}/v1/files/") and d.url.endswith(".webp")
        with urllib.request.urlopen(d.url) as answer:
            assert answer.headers["Content-Type"] == "image/webp"
            assert answer.read() == base64.b64decode(w.b64_json)
    edited = c.images.edit(image=upload(picture()), prompt=PROMPT, response_format="url", **SMALL)
    with urllib.request.urlopen(edited.data[0].url) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (64, 64)


def test_host_header_is_not_trusted(daemon):
    body = json.dumps({**QUICK, "response_format": "url"})
    for host, begins in (("pictures.example:81", "http://pictures.example:81/"), ('a"b', daemon.url + "/"), ("a b", daemon.url + "/")):
        answer = daemon.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json", "Host": host})
        assert answer.status == 200, answer.body
        assert answer.json["data"][0]["url"].startswith(begins + "v1/files/")


def test_public_url(start):
    d = start("--public-url", "https://pictures.example/draw")
    url = d.post({**QUICK, "response_format": "url"}).json["data"][0]["url"]
    assert url.startswith("https://pictures.example/draw/v1/files/")
    assert d.get(url.removeprefix("https://pictures.example/draw")).status == 200


def test_files_expire(start):
    """After its time a file is gone, and so is what lies in the folder."""
    d = start("--results-s", "1")
    path = d.post({**QUICK, "response_format": "url"}).json["data"][0]["url"].removeprefix(d.url)
    until(lambda: d.get(path).status == 404, "the file to expire", 30)
    assert d.get("/v1/files/" + "0" * 32 + ".png").status == 404


def test_urls_that_cannot_be_kept(start):
    """The request says so, without the server's paths; the log says why; nothing else minds."""
    d = start()
    (d.state / "results").rmdir()
    answer = d.post({**QUICK, "response_format": "url"})
    assert answer.status in (500, 507), answer.body
    assert "b64_json" in answer.error["message"] and str(d.state) not in answer.body.decode()
    d.wait_log("a picture behind an address cannot be kept")
    assert d.post(QUICK).status == 200
