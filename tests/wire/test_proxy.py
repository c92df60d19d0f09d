"""The daemon behind nginx with deploy/nginx/safelight.conf as it is, but for ports and certificate: TLS, what passes, what does not."""
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess

import pytest

from conftest import QUICK, ROOT, Answer, until

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed")


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, daemon):
    """The port of a proxy before the common daemon, and the client's side of its certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    plain, tls = free_ports(2)
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
                    "-subj", "/CN=safelight.example", "-addext", "subjectAltName=DNS:safelight.example"], check=True, capture_output=True)
    site = (ROOT / "deploy/nginx/safelight.conf").read_text()
    for pattern, new in [
        (r"server 127\.0\.0\.1:8080;", f"server 127.0.0.1:{daemon.port};"),
        (r"listen \[::\].*;", ""),
        (r"listen 80;", f"listen 127.0.0.1:{plain};"),
        (r"listen 443 ssl http2;", f"listen 127.0.0.1:{tls} ssl http2;"),
        (r"ssl_certificate     \S+;", f"ssl_certificate {cert};"),
        (r"ssl_certificate_key \S+;", f"ssl_certificate_key {key};"),
    ]:
        site, n = re.subn(pattern, new, site)
        assert n, pattern
    temp = "".join(f"{what}_temp_path {folder}/{what};\n" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "site.conf").write_text(site)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temp}include {folder}/site.conf;\n}}\n")
    command = [NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert "warn" not in check.stderr, check.stderr
    process = subprocess.Popen(command)

    def listens():
        assert process.poll() is None, (folder / "error.log").read_text()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", tls)) == 0

    until(listens, "nginx to listen", 20)
    yield plain, tls, ssl.create_default_context(cafile=cert)
    process.terminate()
    process.wait(20)


class Through:
    def __init__(self, proxy):
        self.plain, self.tls, self.context = proxy

    def __call__(self, method, path, body=None, **headers):
        raw = self.context.wrap_socket(socket.create_connection(("127.0.0.1", self.tls), timeout=120), server_hostname="safelight.example")
        connection = http.client.HTTPConnection("safelight.example", self.tls)
        connection.sock = raw
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            return Answer(connection.getresponse())
        finally:
            connection.close()


def test_pictures_and_headers_pass(proxy, daemon):
    through = Through(proxy)
    body = json.dumps(QUICK)
    answer = through("POST", "/v1/images/generations", body, Content_Type="application/json", Accept="image/png", x_request_id="by-the-proxy")
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    assert answer.body == daemon.png()
    assert answer.headers["x-request-id"] == "by-the-proxy"
    assert answer.headers["strict-transport-security"]
    assert through("GET", "/readyz").status == 200
    assert through("GET", "/").status == 200


def test_errors_are_the_daemons_own(proxy):
    through = Through(proxy)
    assert through("POST", "/v1/images/generations", b"{", Content_Type="application/json").error["type"] == "invalid_request_error"
    too_long = through("POST", "/v1/images/generations", b"x" * (1 << 20), Content_Type="application/json")
    assert too_long.status == 413 and "bytes" in too_long.error["message"]


def test_the_operators_numbers_stay_inside(proxy, daemon):
    through = Through(proxy)
    assert daemon.get("/metrics").status == 200
    assert through("GET", "/metrics").status == 404
    assert through("GET", "/v1/admin/status").status == 404


def test_plain_http_is_sent_to_tls(proxy):
    connection = http.client.HTTPConnection("127.0.0.1", proxy[0], timeout=30)
    connection.request("GET", "/x?y=1", headers={"Host": "safelight.example"})
    answer = Answer(connection.getresponse())
    connection.close()
    assert answer.status == 301 and answer.headers["location"] == "https://safelight.example/x?y=1"
