"""Pictures: as JSON, as PNG, with their recipe, the same bytes for the same request whatever else runs, and the openai client."""
import base64
import concurrent.futures
import io
import re
import xml.etree.ElementTree as ElementTree

import openai
import pytest
from PIL import Image

from conftest import QUICK, read_answer


def open_png(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG" and image.mode == "RGB"
    return image


def test_b64_json(daemon):
    answer = daemon.post(QUICK)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    json = answer.json
    assert len(json["data"]) == 1
    picture = json["data"][0]
    assert picture["url"] is None and picture["revised_prompt"] is None and picture["seed"] == 1
    assert open_png(base64.b64decode(picture["b64_json"], validate=True)).size == (64, 64)
    assert (json["background"], json["output_format"], json["size"]) == ("opaque", "png", "64x64")
    assert isinstance(json["created"], int) and json["created"] > 1_700_000_000
    usage = json["usage"]
    assert usage["input_tokens"] == usage["input_tokens_details"]["text_tokens"] == 3  # a, red, apple
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_tokens"] > 0
    recipe = json["safelight"]
    assert recipe["seed"] == 1 and recipe["steps"] == 2 and recipe["sampler"] == "dpmpp_2m" and recipe["karras"] is False
    assert recipe["request_id"] == answer.headers["x-request-id"]
    times = recipe["times"]
    assert times["unet_ms"] > 0 and times["vae_ms"] > 0 and times["png_ms"] > 0
    assert times["total_ms"] >= times["text_ms"] + times["unet_ms"] + times["vae_ms"] + times["png_ms"]


def test_raw_png_and_its_headers(daemon):
    answer = daemon.post({**QUICK, "sampler": "euler", "karras": True, "guidance_scale": 4.5}, Accept="image/png")
    assert answer.status == 200
    h = answer.headers
    assert h["content-type"] == "image/png" and h["x-safelight-seed"] == "1" and h["x-safelight-steps"] == "2"
    assert h["x-safelight-sampler"] == "euler karras" and h["x-safelight-guidance"] == "4.5" and h["x-safelight-model"] == "emoji"
    assert re.fullmatch(r"queue;dur=[\d.]+, text;dur=[\d.]+, unet;dur=[\d.]+, vae;dur=[\d.]+, png;dur=[\d.]+, total;dur=[\d.]+",
                        h["server-timing"])
    assert open_png(answer.body).size == (64, 64)
    assert answer.body == base64.b64decode(daemon.post({**QUICK, "sampler": "euler", "karras": True, "guidance_scale": 4.5})
                                           .json["data"][0]["b64_json"])


def exif_comment(image):
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_formats(daemon, name):
    """A format's file is the PNG's picture, with the recipe and the provenance, by Accept and by output_format, the same bytes each time."""
    png = open_png(daemon.png())
    answer = daemon.post({**QUICK, "output_compression": 100}, Accept=f"image/{name}")
    assert answer.status == 200 and answer.headers["content-type"] == f"image/{name}"
    assert answer.headers["content-disposition"].endswith(f'.{name}"')
    image = Image.open(io.BytesIO(answer.body))
    image.load()
    assert image.format == name.upper() and image.mode == "RGB" and image.size == png.size
    apart = max(abs(a - b) for a, b in zip(image.tobytes(), png.tobytes()))
    assert apart == 0 if name == "webp" else apart < 16  # WebP of quality 100 loses nothing
    assert exif_comment(image) == png.info["parameters"]
    assert image.info["xmp"].decode() == png.info["XML:com.adobe.xmp"]
    json = daemon.post({**QUICK, "output_format": name, "output_compression": 100}).json
    assert json["output_format"] == name
    assert base64.b64decode(json["data"][0]["b64_json"], validate=True) == answer.body
    sizes = [len(daemon.post({**QUICK, "output_compression": q}, Accept=f"image/{name}").body) for q in (0, 60, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("accept, png", [
    ("image/png", True), ("image/png;q=0.9, application/json;q=0.5", True), ("image/*", False), ("*/*", False),
    ("application/json, image/png", False), ("application/json;q=0.1, image/png", True), ("image/png;q=0", False),
    ("image/pngx", False), ("", False), ("IMAGE/PNG", True),
])
def test_accept(daemon, accept, png):
    answer = daemon.post(QUICK, Accept=accept)
    assert answer.headers["content-type"] == ("image/png" if png else "application/json")


def test_parameters_text(daemon):
    text = open_png(daemon.png(guidance_scale=3)).text["parameters"]
    lines = text.split("\n")
    assert lines[0] == "a red apple"
    assert re.fullmatch(r"Steps: 2, Sampler: DPM\+\+ 2M, CFG scale: 3, Seed: 1, Size: 64x64, Model hash: [0-9a-f]{10}, "
                        r"Model: emoji, Generation: 1-[0-9a-f]{8}, Generation digest: [0-9a-f]{64}, Safety profile: default, "
                        r"Safety: unsafe-evaluation, Version: safelight \d+\.\d+\.\d+", lines[1]), lines[1]
    text = open_png(daemon.png(prompt="a 🍎 on\nred", negative_prompt="blur", clip_skip=2, sampler="Euler a", seed=7)).text["parameters"]
    assert text.startswith("a 🍎 on\nred\nNegative prompt: blur\nSteps: 2, Sampler: Euler a, CFG scale: ")
    assert ", Seed: 7, " in text and ", Clip skip: 2, " in text
    assert open_png(daemon.png(prompt="un café")).text["parameters"].startswith("un café\n")  # Latin-1: tEXt


def provenance(data):
    """The attributes of the XMP description in a picture, by Python's XML parser."""
    packet = open_png(data).text["XML:com.adobe.xmp"]
    assert isinstance(packet, str) and packet.startswith("<?xpacket begin=\"\ufeff\"")
    root = ElementTree.fromstring(packet.encode())
    (found,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return {key.rsplit("}", 1)[1]: value for key, value in found.attrib.items()}


def test_provenance(daemon):
    found = provenance(daemon.png(prompt="a secret wish"))
    assert found["DigitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert found["CreatorTool"].startswith("safelight ") and found["Model"] == "emoji"
    assert re.fullmatch("[0-9a-f]{64}", found["ModelDigest"])
    recipe = daemon.post(QUICK).json["safelight"]
    assert found["ModelDigest"] == recipe["model_digest"]
    assert found.get("GenerationId") == recipe["generation_id"] and found.get("GenerationDigest") == recipe["generation_digest"]
    assert "secret" not in str(found)


@pytest.mark.parametrize("metadata", ["no_prompts", "provenance"])
def test_metadata_without_prompts(start, metadata):
    d = start("--metadata", metadata, "--name", "a<b & \"c\" é\t🍎")
    data = d.png(prompt="a secret wish", negative_prompt="another secret")
    text = open_png(data).text
    assert b"secret" not in data and ("parameters" in text) == (metadata == "no_prompts")
    assert "parameters" not in text or text["parameters"].startswith("Steps: 2, ")
    assert provenance(data)["Model"] == "a<b & \"c\" é\t🍎"


def test_what_decides_a_picture(daemon):
    """Same request, same bytes; each of these fields matters."""
    base = daemon.png()
    assert daemon.png() == base
    others = [daemon.png(**f) for f in (
        {"seed": 2}, {"prompt": "a blue car"}, {"steps": 3}, {"guidance_scale": 1}, {"negative_prompt": "red"},
        {"size": "64x72"}, {"sampler": "ddim"}, {"sampler": "euler", "steps": 4}, {"clip_skip": 2},
        {"sampler": "euler", "steps": 4, "karras": True})]  # two steps are the ends of the range, with Karras or without
    pixels = {open_png(p).tobytes() for p in others + [base]}
    assert len(pixels) == len(others) + 1


def test_seed_is_drawn_and_reported(daemon):
    fields = {k: v for k, v in QUICK.items() if k != "seed"}
    one, two = daemon.post(fields).json, daemon.post({**fields, "seed": -1}).json
    seeds = [j["safelight"]["seed"] for j in (one, two)]
    assert seeds[0] != seeds[1] and all(0 <= s < 2**32 for s in seeds)
    assert base64.b64decode(one["data"][0]["b64_json"]) == daemon.png(seed=seeds[0])


@pytest.mark.parametrize("flags", [(), ("--running", "2")])
def test_n_pictures_are_seed_after_seed(daemon, start, flags):
    """Each is that of a request of its own, though prompts are encoded once for all of them; also where some are drawn before others begin."""
    crowded = start(*flags) if flags else daemon
    for fields in ({}, {"prompt": "a (red:1.3) apple BREAK a [blue] car", "negative_prompt": "a dog", "sampler": "euler_a"}, {"guidance_scale": 1}):
        data = crowded.post({**QUICK, "n": 4, "seed": 40, **fields}).json["data"]
        assert [d["seed"] for d in data] == [40, 41, 42, 43]
        assert len({d["b64_json"] for d in data}) == 4
        for d in data:
            assert base64.b64decode(d["b64_json"]) == daemon.png(seed=d["seed"], **fields)


def test_shapes(daemon):
    assert open_png(daemon.png(size="64x96")).size == (64, 96)
    answer = daemon.post({"prompt": "a red apple", "steps": 1, "seed": 1, "width": 96, "height": 64}, Accept="image/png")
    assert open_png(answer.body).size == (96, 64)
    limits = daemon.get("/v1/models").json["data"][0]["safelight"]
    answer = daemon.post({"prompt": "a red apple", "steps": 1, "size": "auto"}, Accept="image/png")
    assert open_png(answer.body).size == (limits["default_size"],) * 2


@pytest.mark.parametrize("flags", [(), ("--running", "3")])
def test_same_bytes_under_load(daemon, start, flags):
    """Eight clients at once, each picture as when drawn alone; also when pictures are drawn in turn, step by step."""
    requests = [{"seed": i, "steps": 2 + i % 3, "sampler": ("ddim", "euler_a", "dpmpp_2m")[i % 3]} for i in range(12)]
    alone = [daemon.png(**r) for r in requests]
    crowded = start(*flags) if flags else daemon
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda r: crowded.png(**r), requests)) == alone
        many = crowded.post({**QUICK, "n": 4, "seed": 0, "steps": 2, "sampler": "ddim"}).json["data"]
    assert base64.b64decode(many[0]["b64_json"]) == alone[0]


def test_keep_alive_and_pipelining(daemon):
    connection = daemon.connect()
    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}\n'
    connection.close()
    with daemon.socket() as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert data.count(b"HTTP/1.1 200 OK\r\n") == 3


def test_request_ids(daemon):
    assert daemon.get("/healthz", **{"x-request-id": "My-id_1.2"}).headers["x-request-id"] == "My-id_1.2"
    drawn = {daemon.get("/healthz").headers["x-request-id"] for _ in range(5)}
    assert len(drawn) == 5 and all(re.fullmatch(r"req_[0-9a-f]{24}", i) for i in drawn)
    for bad in ("a b", "x" * 65, 'a"b', "é".encode("latin-1").decode("latin-1")):
        assert re.fullmatch(r"req_[0-9a-f]{24}", daemon.get("/healthz", **{"x-request-id": bad}).headers["x-request-id"])


def test_openai_client(daemon):
    client = openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0)
    assert [m.id for m in client.models.list()] == ["emoji"]
    result = client.images.generate(model="emoji", prompt="a red apple", n=1, size="64x64", quality="high", background="opaque",
                                    output_format="png", user="me", extra_body={"seed": 1, "steps": 2})
    assert base64.b64decode(result.data[0].b64_json) == daemon.png()
    assert result.created > 0 and result.size == "64x64" and result.usage.total_tokens > 0
    raw = client.images.with_raw_response.generate(prompt="a red apple", size="64x64", extra_body={"steps": 1},
                                                   extra_headers={"x-request-id": "seen"})
    assert raw.request_id == "seen" if hasattr(raw, "request_id") else raw.headers["x-request-id"] == "seen"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red apple", size="1024x1024")
    assert refused.value.param == "size" and refused.value.code == "invalid_value" and "256" in str(refused.value)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(model="dall-e-3", prompt="a red apple")
    assert unknown.value.code == "model_not_found"


def test_two_connections_interleave(daemon):
    """An answer goes to the connection that asked, also when they finish in another order than they were read."""
    socks = [daemon.send({**QUICK, "seed": s}, f"id-{s}") for s in range(5)]
    for s in reversed(range(5)):
        answer = read_answer(socks[s])
        assert answer.headers["x-request-id"] == f"id-{s}" and answer.json["safelight"]["seed"] == s
        socks[s].close()
