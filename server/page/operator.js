// The operator's page: asks the admin listener what is, shows it, and sends the changes that an operator confirms. Nothing is kept.

import { $, Refusal, element, readJson, rows, seconds } from "/common.js";

const EVERY_MS = 1000;     // between two looks at the activity
const SLOW_EVERY = 5;      // status and audit trail: every so many looks
const WINDOW_S = 300;      // what "now" means for latencies
const AUDIT_SHOWN = 30;
const past = [];           // activities of the window, oldest first
let token = "";
let status_at_head = "";   // the audit log's head when the trail was read last

const say = (text) => { $("status").textContent = text; };
const wait = (ms) => new Promise((wake) => setTimeout(wake, ms));

async function ask(path, method = "GET") {
  return readJson(await fetch(path, { method, headers: token ? { Authorization: "Bearer " + token } : {} }));
}

// ---- small parts ----

function cell(column, content, className = "") {
  const td = element("td", { className }, content instanceof Node ? content : String(content ?? ""));
  td.dataset.label = column;
  return td;
}

// A table's body, rebuilt only where it changed, so that neither focus nor a selection is lost. list: [key, [column, content, class]...].
function fillTable(body, list, empty) {
  const text = JSON.stringify(list.map(([, ...cells]) => cells.map(([, content]) => (content instanceof Node ? content.outerHTML : content))));
  if (body.dataset.shown === text) return;
  const focus = document.activeElement && body.contains(document.activeElement) ? document.activeElement.id : "";
  body.dataset.shown = text;
  body.replaceChildren(...list.map(([, ...cells]) => element("tr", {}, ...cells.map((c) => cell(...c)))));
  if (!list.length) body.append(element("tr", {}, element("td", { colSpan: 8, className: "hint", textContent: empty })));
  if (focus && $(focus)) $(focus).focus();
}

const short = (digest) => element("code", { textContent: digest ? digest.slice(0, 16) + "…" : "", title: digest || "" });
const when = (s) => (s ? new Date(s * 1000).toLocaleString() : "");

// The value below which a share q of a histogram's values lies, as far as its buckets tell; null when it is empty.
function quantile(h, counts, q) {
  const total = counts.reduce((a, b) => a + b, 0);
  let seen = 0;
  for (let i = 0; i < counts.length; i++) {
    if (counts[i] && seen + counts[i] >= q * total) {
      const low = i ? h.bounds[i - 1] : 0, high = i < h.bounds.length ? h.bounds[i] : low;
      return low + (high - low) * Math.max(0, q * total - seen) / counts[i];
    }
    seen += counts[i];
  }
  return null;
}

const duration = (s) => (s === null ? "" : s < 0.1 ? (s * 1000).toFixed(1) + " ms" : s < 1 ? Math.round(s * 1000) + " ms" : seconds(s));

// ---- activity ----

function showActivity(a) {
  past.push(a);
  while (past[0].now < a.now - WINDOW_S) past.shift();
  const before = past[0], count = (x, name, label = null) => x.counts.find((c) => c.name === name && c.label === label)?.value || 0;
  const time = a.now - before.now, rate = (name) => (time >= 1 ? (count(a, name) - count(before, name)) / time : 0);
  const batch = a.histograms.findIndex((h) => h.name === "batch_size"), made = since(a, before, batch), steps = made.counts.reduce((x, y) => x + y, 0);
  showTiles([
    ["Waiting", a.queue.waiting + " of " + a.queue.capacity], ["Running", a.running.pictures + " of " + a.running.capacity],
    ["Pictures per step", steps ? (made.sum / steps).toFixed(1) : "–"], ["Pictures / min", (rate("pictures") * 60).toFixed(1)],
    ["Steps / s", rate("steps").toFixed(1)], ["Connections", count(a, "connections")],
  ]);
  showJobs(a.jobs, a.active);
  showLatency(a, before);
  $("counts").replaceChildren(...rows([
    ["Pictures", count(a, "pictures")], ["Previews", count(a, "previews")],
    ["Refused", ofKind(a, "refusals")], ["Cancelled", ofKind(a, "cancelled")], ["Durable jobs", ofKind(a, "durable")],
    ["Planned memory", a.counts.filter((c) => c.name === "device_bytes").map((c) => c.label + " " + (c.value / 1e6).toFixed(0) + " MB").join(", ")],
  ]));
}

const ofKind = (a, name) => a.counts.filter((c) => c.name === name && c.value).map((c) => c.label.replace(/_/g, " ") + " " + c.value).join(", ") || "none";

function showTiles(list) {
  $("tiles").replaceChildren(...list.map(([term, text]) => element("div", {}, element("dt", { textContent: term }), element("dd", { textContent: text }))));
}

// Histogram i of a without what it counted before. One look alone has nothing before it: all since the start.
function since(a, before, i) {
  const h = a.histograms[i], old = before === a ? null : before.histograms[i];
  return { counts: h.counts.map((c, k) => c - (old ? old.counts[k] : 0)), sum: h.sum - (old ? old.sum : 0) };
}

function showLatency(a, before) {
  const names = { request_seconds: "requests, ", stage_seconds: "stage, ", step_seconds: "one step" };
  const list = [];
  a.histograms.forEach((h, i) => {
    const { counts } = since(a, before, i), n = counts.reduce((x, y) => x + y, 0);
    if (h.name in names && n) list.push([h.name + h.label, ["What", names[h.name] + (h.label || "")], ["Count", n, "number"],
      ...[0.5, 0.95, 0.99].map((q) => [q * 100 + " %", duration(quantile(h, counts, q)), "number"])]);
  });
  $("window").textContent = before === a ? "since the start" : "of the last " + seconds(a.now - before.now);
  fillTable($("latency"), list, "nothing happened");
}

function showJobs(jobs, active) {
  const list = jobs.map((j) => [j.id, ["Job", element("code", { textContent: j.id })], ["Who", j.caller], ["Profile", j.profile],
    ["State", j.position ? j.state + ", place " + j.position : j.state], ["Asks for", (j.pictures > 1 ? j.pictures + " × " : "") + j.width + "×" + j.height],
    ["Progress", element("span", {}, element("progress", { max: j.steps, value: j.steps_done, ariaLabel: "Progress of " + j.id }),
                         " " + j.steps_done + "/" + j.steps)],
    ["Age", seconds(j.age_s), "number"], ["To go", j.wait_s ? seconds(j.wait_s) : "", "number"]]);
  if (active > jobs.length && jobs.length) list.push(["more", ["Job", "and " + (active - jobs.length) + " more"]]);
  fillTable($("jobs"), list, "nobody waits, nothing is drawn");
}

// ---- safety ----

function showStatus(s) {
  $("model").textContent = "Safelight " + s.version;
  $("safety").textContent = s.status === "ready" ? "every profile's required set is live" : s.why;
  $("safety").classList.toggle("bad", s.status !== "ready");
  fillTable($("profiles"), s.profiles.map((p) => profileRow(p, s.generations.find((g) => g.current && g.id === p.generation))), "no profile is known yet");
  fillTable($("adapters"), s.adapters.map((a) => [a.name, ["Name", a.name],
    ["State", element("span", { className: a.state === "failed" ? "bad" : a.state === "live" ? "good" : "", textContent: a.state })], ["Format", a.format],
    ["Sites", a.sites || "", "number"], ["Rank", a.max_rank || "", "number"], ["Required by", a.required_by, "number"],
    ["Digest, why", a.why ? element("span", { className: "bad", textContent: a.why }) : short(a.digest)]]), "the policy names no adapters");
  fillTable($("generations"), s.generations.filter((g) => !g.current).map((g) => [g.id, ["Generation", g.id], ["Profile", g.profile],
    ["Digest", short(g.digest)], ["Drawing", g.pins, "number"], ["MB", (g.bytes / 1e6).toFixed(1), "number"]]), "none is in use");
  $("head").textContent = s.audit.records + " records, head " + s.audit.head.slice(0, 16) + "…" + (s.audit.lost ? ", " + s.audit.lost + " were lost" : "");
}

function profileRow(p, g) {
  const live = p.live ? (g && g.requires_nothing ? "live, requires nothing" : "live") : "not live: " + p.why;
  const change = (what, text) => element("button", { type: "button", id: what + "-" + p.name, textContent: text, ariaLabel: text + " " + p.name });
  return [p.name, ["Profile", p.name], ["State", element("span", { className: p.live && !(g && g.requires_nothing) ? "good" : "bad", textContent: live })],
    ["Generation", p.generation], ["Digest", short(g && g.digest)], ["Since", when(g && g.activated)], ["Drawing", g ? g.pins : "", "number"],
    ["Change", element("span", {}, change("activate", "Activate"), change("rollback", "Roll back"))]];
}

async function change(path, question, done) {
  if (!confirm(question)) return;
  say("working…");
  showError(null);
  try {
    const answer = await ask(path, "POST");
    say(done + (answer.generation ? ": generation " + answer.generation.id + " is live" : ""));
    await look(true);
  } catch (e) {
    say("");
    showError(e);
  }
}

$("profiles").addEventListener("click", (e) => {
  const [, what, profile] = (e.target.id || "").match(/^(activate|rollback)-(.+)$/) || [];
  const path = "/v1/admin/profiles/" + profile + "/" + what;
  if (what === "activate") change(path, "Build, verify and publish profile " + profile + " with the adapters that are verified now?", "activated");
  if (what === "rollback") change(path, "Publish what was live before in profile " + profile + "?", "rolled back");
});
$("reload").addEventListener("click", () => change("/v1/admin/reload", "Read the policy file again and rebuild what changed?", "the policy was read again"));

// ---- audit trail ----

async function showAudit(head) {
  if (head === status_at_head) return;
  const { records } = await ask("/v1/admin/audit?n=" + AUDIT_SHOWN);
  status_at_head = head;
  fillTable($("audit"), records.map((r) => [r.seq, ["No.", r.seq, "number"], ["Time", new Date(r.time).toLocaleString()], ["Kind", r.kind],
    ["Who", r.tenant || ""], ["Verdict", r.verdict], ["What", whatOf(r)]]), "nothing is written down");
}

function whatOf(r) {
  return [r.profile && "profile " + r.profile, r.generation_id && "generation " + r.generation_id, r.request_id,
          r.seed !== undefined && "seed " + r.seed, r.reason].filter(Boolean).join(", ");
}

// ---- looking ----

async function look(is_all) {
  showActivity(await ask("/v1/admin/activity"));
  if (!is_all) return;
  const s = await ask("/v1/admin/status");
  showStatus(s);
  await showAudit(s.audit.head);
}

// Looks until the token is refused. A page that nobody sees asks for nothing.
async function watch() {
  for (let i = 0; ; i++, await wait(EVERY_MS)) {
    if (document.hidden && i) continue;
    try {
      await look(i % SLOW_EVERY === 0);
      $("board").hidden = false;
      $("login").hidden = true;
      if ($("error").dataset.isLost) showError(null);
    } catch (e) {
      showError(e);
      if (e.status === 401) return login();
      $("error").dataset.isLost = "yes";
    }
  }
}

function login() {
  token = "";
  $("login").hidden = false;
  $("board").hidden = true;
  $("model").textContent = "";
  $("token").focus();
}

function showError(e) {
  delete $("error").dataset.isLost;
  $("error").hidden = !e;
  $("error").textContent = e ? (e instanceof Refusal ? e.message : "the server does not answer: " + e.message) : "";
}

$("login").addEventListener("submit", (e) => {
  e.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  showError(null);
  watch();
});

// Over a port the server says with its page that it wants a token; over a socket it knows who comes.
const page = await fetch("/", { method: "HEAD", cache: "no-store" });
if (page.headers.get("www-authenticate")) login();
else watch();
