"""/metrics as Prometheus' own parser reads it: the format, what each family says after known work, and that counters only grow."""
import json
import math
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import QUICK, ROOT, until


def scrape(daemon):
    answer = daemon.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {f.name: f for f in text_string_to_metric_families(answer.body.decode())}


def value(families, family, name=None, **labels):
    found = [s.value for s in families[family].samples if s.name == (name or family) and s.labels == labels]
    assert len(found) <= 1
    return found[0] if found else 0


def requests(families, surface, status):
    return value(families, "safelight_requests", "safelight_requests_total", surface=surface, status=str(status))


def test_format(daemon):
    families = scrape(daemon)
    for name, f in families.items():
        assert name.startswith(("safelight_", "process_")) and f.documentation.endswith("."), name
        assert f.type in ("counter", "gauge", "histogram"), name
        assert len({(s.name, tuple(sorted(s.labels.items()))) for s in f.samples}) == len(f.samples), name
        for s in f.samples:
            assert not math.isnan(s.value), s
        if f.type == "histogram":
            for labels in {tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) for s in f.samples}:
                these = [s for s in f.samples if tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) == labels]
                buckets = [s for s in these if s.name == name + "_bucket"]
                bounds, counts = [float(s.labels["le"]) for s in buckets], [s.value for s in buckets]
                assert bounds == sorted(bounds) and bounds[-1] == math.inf and counts == sorted(counts)
                assert [s.value for s in these if s.name == name + "_count"] == counts[-1:]
                assert len([s for s in these if s.name == name + "_sum"]) == 1


def test_what_happened_is_counted(start):
    d = start()
    before = scrape(d)
    assert value(before, "safelight_ready") == 1
    for what in ("weights", "activations"):
        assert value(before, "safelight_device_memory_planned_bytes", what=what, device="0") > 1 << 20, what
    assert value(before, "safelight_device_memory_planned_bytes", what="pictures", device="0") > 1 << 20
    assert value(before, "safelight_queue_capacity") == 64
    assert requests(before, "openai", 200) == 0
    assert d.post({**QUICK, "n": 2}).status == 200
    assert d.post({"prompt": 1}).status == 400
    assert d.post(QUICK, Authorization="Bearer nobody").status in (200, 401)
    assert d.get("/nowhere").status == 404
    after = until(lambda: (f := scrape(d)) and requests(f, "other", 404) and f, "the request that was answered last")
    assert requests(after, "openai", 200) >= 1 and requests(after, "openai", 400) == 1
    assert value(after, "safelight_refusals", "safelight_refusals_total", reason="bad_request") == 1
    assert value(after, "safelight_pictures", "safelight_pictures_total") >= 2
    assert value(after, "safelight_steps", "safelight_steps_total", device="0") >= 2 * QUICK["steps"]
    for stage in ("queue", "text", "unet", "vae", "encode", "audit"):
        assert value(after, "safelight_stage_seconds", "safelight_stage_seconds_count", stage=stage) >= 1, stage
    batches = value(after, "safelight_batch_size", "safelight_batch_size_count", device="0")
    assert batches == value(after, "safelight_step_seconds", "safelight_step_seconds_count", device="0") > 0
    assert value(after, "safelight_jobs_queued") == value(after, "safelight_pictures_running", device="0") == 0
    assert {s.labels["device"] for s in after["safelight_pictures_running"].samples} == {"0"}  # those that are there, no more
    assert value(after, "safelight_request_seconds", "safelight_request_seconds_count", surface="openai") == 3
    assert value(after, "safelight_requests_in_flight") >= 1  # this one
    assert value(after, "safelight_connections") >= 1
    assert value(after, "process_resident_memory_bytes") > 1 << 20
    for name, family in before.items():  # nothing that counts went back
        if family.type != "gauge":
            for s in family.samples:
                now = [t.value for t in after[name].samples if (t.name, t.labels) == (s.name, s.labels)]
                assert now and now[0] >= s.value, s


def test_the_live_generation_is_named(daemon):
    answer = daemon.post(QUICK)
    info = scrape(daemon)["safelight_generation_info"].samples
    assert {s.labels["profile"] for s in info} == {"default"} and all(s.value == 1 for s in info)
    assert info[0].labels["id"] == answer.headers["x-safelight-generation"]
    assert info[0].labels["digest"] == answer.headers["x-safelight-generation-digest"]
    assert info[0].labels["requires_nothing"] == "yes"
    model = scrape(daemon)["safelight_model_info"].samples
    assert len(model) == 1 and len(model[0].labels["digest"]) == 64


@pytest.mark.parametrize("path", ["grafana/safelight.json", "prometheus/alerts.yml"])
def test_dashboards_and_alerts_name_what_there_is(daemon, path):
    """A family that was renamed would leave a panel empty and an alert silent, and nobody would notice."""
    text = (ROOT / "deploy" / path).read_text()
    used = set(re.findall(r"\b((?:safelight|process)_[a-z_]+)\b", text)) - {"safelight_requests_total"}
    families = scrape(daemon)
    known = {s.name for f in families.values() for s in f.samples} | {"safelight_requests_total"}
    assert len(used) >= 8 and used <= known, used - known
    for labels in re.findall(r"by \(([a-z, ]+)\)", text):
        for label in re.split(", ?", labels):
            assert label in {"instance", "le", "surface", "status", "stage", "reason", "by", "what", "device"}, label
    if path.endswith(".json"):
        panels = json.loads(text)["panels"]
        assert len({p["id"] for p in panels}) == len(panels) and all(p["targets"] for p in panels)
