"""Bad input: each is a 4xx in the OpenAI error shape that names the field and the bound, and leaves the daemon as it was."""
import json
import socket
import time

import pytest

from conftest import QUICK

P = {"prompt": "a red apple"}


@pytest.mark.parametrize("fields, param, says", [
    ({}, "prompt", "required"),
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": 7}, "prompt", "string"),
    ({"prompt": ["a"]}, "prompt", "string"),
    ({"prompt": "x" * 16385}, "prompt", "16384 bytes"),
    ({**P, "negative_prompt": "x" * 16385}, "negative_prompt", "16384 bytes"),
    ({"prompt": "red apple " * 900}, "prompt", "1"),  # within the bytes, more chunks of tokens than the bound
    ({**P, "size": "100x100"}, "size", "multiple of 8"),
    ({**P, "size": "64x100"}, "size", "multiple of 8"),
    ({**P, "size": "1024x1024"}, "size", "256"),
    ({**P, "size": "0x0"}, "size", "between"),
    ({**P, "size": "big"}, "size", "WIDTHxHEIGHT"),
    ({**P, "size": 64}, "size", "WIDTHxHEIGHT"),
    ({**P, "width": 64}, "height", "together"),
    ({**P, "steps": 0}, "steps", "between 1 and 150"),
    ({**P, "steps": 151}, "steps", "between 1 and 150"),
    ({**P, "steps": -1}, "steps", "between 1 and 150"),
    ({**P, "steps": 1.5}, "steps", "whole"),
    ({**P, "steps": "20"}, "steps", "integer"),
    ({**P, "steps": 10**30}, "steps", "between 1 and 150"),
    ({**P, "n": 0}, "n", "between 1 and 10"),
    ({**P, "n": 11}, "n", "between 1 and 10"),
    ({**P, "guidance_scale": -0.1}, "guidance_scale", "between 0 and 30"),
    ({**P, "guidance_scale": 30.5}, "guidance_scale", "between 0 and 30"),
    ({**P, "guidance_scale": "high"}, "guidance_scale", "number"),
    ({**P, "seed": -2}, "seed", "between"),
    ({**P, "seed": 2**64}, "seed", "between"),
    ({**P, "seed": 0.5}, "seed", "whole"),
    ({**P, "sampler": "plms"}, "sampler", "euler_a"),
    ({**P, "sampler": ""}, "sampler", "euler_a"),
    ({**P, "sampler": 3}, "sampler", "string"),
    ({**P, "sampler": "ddim", "karras": True}, "karras", "ddim"),
    ({**P, "karras": "yes"}, "karras", "true or false"),
    ({**P, "clip_skip": 13}, "clip_skip", "between 1 and 12"),
    ({**P, "response_format": "b64"}, "response_format", "b64_json"),
    ({**P, "response_format": "url", "stream": True}, "response_format", "b64_json"),
    ({**P, "output_format": "gif"}, "output_format", "webp"),
    ({**P, "output_format": "webp", "output_compression": 101}, "output_compression", "100"),
    ({**P, "background": "transparent"}, "background", "opaque"),
    ({**P, "quality": "best"}, "quality", "standard"),
    ({**P, "safety_checker": False}, "safety_checker", "policy"),
    ({**P, "lora": "x"}, "lora", "policy"),
    ({**P, "override_settings": {}}, "override_settings", "policy"),
    ({**P, "cfg_scale": 7}, "cfg_scale", "guidance_scale"),
    ({**P, "enable_hr": True}, "enable_hr", "unknown field"),
])
def test_fields(daemon, fields, param, says):
    answer = daemon.post(fields)
    assert answer.status == 400, answer.body
    error = answer.error
    assert error["param"] == param and says in error["message"] and error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_unknown_model(daemon):
    answer = daemon.post({**P, "model": "dall-e-3"})
    assert answer.status == 404 and answer.error["param"] == "model" and "emoji" in answer.error["message"]
    assert answer.error["code"] == "model_not_found"


def test_png_is_one_picture(daemon):
    answer = daemon.post({**QUICK, "n": 2}, Accept="image/png")
    assert answer.status == 400 and answer.error["param"] == "n"


@pytest.mark.parametrize("body, param", [
    (b"", None), (b"{", None), (b"null", None), (b"[]", None), (b'"prompt"', None), (b'{"prompt":"a"}}', None),
    (b'{"prompt":"a","prompt":"b"}', None), (b'{"prompt":"a\x00"}', None), (b'{"prompt":"\\ud800"}', None),
    (b'{"prompt":"a\xff"}', "prompt"), (b'{"prompt":"a","negative_prompt":"\xc0\xaf"}', "negative_prompt"),
    (b"\xff\xfe{\x00}\x00", None), (b"[" * 200000, None), (b'{"prompt":' * 1000, None), (b"{'prompt':'a'}", None),
    (b'{"prompt":"a","steps":NaN}', None), (b'{"prompt":"a","guidance_scale":1e999}', None),
])
def test_bodies(daemon, body, param):
    answer = daemon.post(body)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param


def test_wrong_paths_and_methods(daemon):
    for path in ("/v1/images", "/v1/images/generations/", "/v1", "/nothing", "/../etc/passwd", "/%00", "/index.htm"):
        answer = daemon.get(path)
        assert answer.status == 404 and answer.error["code"] == "not_found", path
    for method, path, allow in (("GET", "/v1/images/generations", "POST"), ("HEAD", "/v1/images/generations", "POST"),
                                ("PUT", "/v1/images/generations", "POST"), ("DELETE", "/v1/models", "GET, HEAD"),
                                ("POST", "/healthz", "GET, HEAD"), ("POST", "/", "GET, HEAD"), ("FOO", "/readyz", "GET, HEAD")):
        answer = daemon.request(method, path)
        assert answer.status == 405 and answer.headers["allow"] == allow, (method, path)
        if method != "HEAD":
            assert answer.error["code"] == "method_not_allowed"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data"])
def test_content_type(daemon, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    answer = daemon.request("POST", "/v1/images/generations", json.dumps(QUICK), headers)
    assert answer.status == 415 and "application/json" in answer.error["message"]


def test_content_type_with_parameters(daemon):
    answer = daemon.request("POST", "/v1/images/generations", json.dumps(QUICK), {"Content-Type": "Application/JSON; charset=utf-8"})
    assert answer.status == 200


def test_compressed_body(daemon):
    assert daemon.post(QUICK, Content_Encoding="gzip").status == 415


def test_too_large(daemon):
    body = b'{"prompt":"' + b"x" * (300 << 10) + b'"}'
    answer = daemon.post(body)
    assert answer.status == 413 and str(256 << 10) in answer.error["message"]
    # The connection is still good: the body was read to its end.
    connection = daemon.connect()
    for _ in range(2):
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 413
        response.read()
    connection.close()


def test_too_large_in_chunks(daemon):
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    pieces = [b"x" * 10000] * 40
    answer = daemon.request("POST", "/v1/images/generations", iter(pieces), headers, encode_chunked=True)
    assert answer.status == 413
    body = json.dumps(QUICK).encode()
    answer = daemon.request("POST", "/v1/images/generations", iter([body[:5], body[5:]]), headers, encode_chunked=True)
    assert answer.status == 200


def test_far_too_large_is_not_read(daemon):
    with daemon.socket() as sock:
        sock.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 99999999999\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def head(length, more=""):
    return ("POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
            f"Content-Length: {length}\r\n{more}\r\n").encode()


def test_expect_continue(daemon):
    body = json.dumps(QUICK).encode()
    with daemon.socket() as sock:
        sock.sendall(head(len(body)))
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    with daemon.socket() as sock:  # refused before the body is asked for
        sock.sendall(head(1 << 20))
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("raw", [b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n",
                                 b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
                                 b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                                 b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100000 + b"\r\n\r\n"])
def test_not_http(daemon, raw):
    """Whatever comes, the connection gets a 4xx or 5xx, or is closed, or is left to its clock; the next client is served."""
    with daemon.socket() as sock:
        sock.settimeout(1)
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            data = sock.recv(65536)
            assert data == b"" or data.split()[1][:1] in b"45", data
        except OSError:  # closed before all of it was sent, or still waiting for the rest of a request line
            pass
    assert daemon.get("/healthz").status == 200


def test_half_a_request_then_gone(daemon):
    for cut in (b"POST /v1/images/gen", b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{\"prompt\":"):
        with daemon.socket() as sock:
            sock.sendall(cut)
            time.sleep(0.05)
    assert daemon.png()


def test_refusals_do_not_fill_the_queue(daemon):
    for _ in range(200):  # more than queue and array hold
        assert daemon.post({**P, "steps": 0}).status == 400
    assert daemon.png()
