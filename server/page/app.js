// The page's program: asks the server for a picture, shows it with its recipe, remembers this visit. No framework.
"use strict";

const $ = (id) => document.getElementById(id);
const pictures = [];      // {url, prompt, recipe}, oldest first
const KEEP = 60;
let running = null;       // AbortController of the request under way

async function loadModel() {
  for (;;) {
    try {
      const list = await (await fetch("/v1/models")).json();
      if (list.data.length) return showModel(list.data[0].safelight, list.data[0].id);
      $("model").textContent = "the model is loading…";
    } catch (e) {
      $("model").textContent = "the server does not answer";
    }
    await new Promise((wake) => setTimeout(wake, 700));
  }
}

function showModel(m, name) {
  $("model").textContent = name + ", Safelight " + m.version;
  for (const id of ["width", "height"]) {
    Object.assign($(id), { min: m.size_multiple, max: m.max_size, step: m.size_multiple, value: m.default_size });
  }
  Object.assign($("steps"), { max: m.max_steps, value: m.default_steps });
  Object.assign($("guidance"), { max: m.max_guidance, value: m.default_guidance });
  $("sampler").replaceChildren(...m.samplers.map((s) => new Option(s, s, false, s === m.default_sampler)));
  $("draw").disabled = false;
}

function request() {
  const body = { prompt: $("prompt").value, n: 1 };
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  if (number("width") && number("height")) body.size = number("width") + "x" + number("height");
  body.steps = number("steps");
  body.guidance_scale = number("guidance");
  body.seed = number("seed");
  if ($("sampler").value) body.sampler = $("sampler").value;
  if ($("negative").value) body.negative_prompt = $("negative").value;
  if ($("karras").checked) body.karras = true;
  return body;
}

async function draw(body) {
  if (running) return;
  running = new AbortController();
  setBusy(true);
  const start = performance.now();
  const clock = setInterval(() => {
    $("status").textContent = "drawing… " + ((performance.now() - start) / 1000).toFixed(1) + " s";
  }, 100);
  try {
    const answer = await fetch("/v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    const json = await answer.json();
    if (!answer.ok) throw new Error(json.error.message);
    add(json, body.prompt);
    $("status").textContent = "";
  } catch (e) {
    $("status").textContent = e.name === "AbortError" ? "cancelled" : "";
    if (e.name !== "AbortError") showError(e.message);
  } finally {
    clearInterval(clock);
    running = null;
    setBusy(false);
  }
}

function add(json, prompt) {
  const bytes = Uint8Array.from(atob(json.data[0].b64_json), (c) => c.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  pictures.push({ url, prompt, recipe: json.safelight });
  if (pictures.length > KEEP) URL.revokeObjectURL(pictures.shift().url);
  show(pictures[pictures.length - 1]);
}

function show(p) {
  const r = p.recipe, t = r.times;
  const rows = [
    ["Seed", r.seed], ["Size", r.width + " × " + r.height], ["Steps", r.steps],
    ["Guidance", r.guidance_scale], ["Sampler", r.sampler + (r.karras ? ", Karras" : "")],
    ["Without", r.negative_prompt], ["Model", r.model],
    ["Time", (t.total_ms / 1000).toFixed(2) + " s" + (t.queue_ms > 100 ? ", " + (t.queue_ms / 1000).toFixed(2) + " s of it waiting" : "")],
  ];
  $("picture").src = p.url;
  $("picture").alt = "Drawn picture: " + p.prompt;
  $("save").href = p.url;
  $("save").download = "safelight-" + r.seed + ".png";
  $("caption").textContent = p.prompt;
  $("recipe").replaceChildren(...rows.filter((x) => x[1] !== "").flatMap(([k, v]) => [element("dt", k), element("dd", v)]));
  $("result").hidden = false;
  $("again").onclick = () => draw(bodyOf(p));
  $("vary").onclick = () => draw({ ...bodyOf(p), seed: r.seed + 1 });
  $("copy").onclick = async () => {
    await navigator.clipboard.writeText(JSON.stringify(bodyOf(p), null, 2)).then(
      () => ($("status").textContent = "recipe copied"), () => showError("the browser does not allow copying here"));
  };
  showHistory(p);
}

// The request that draws this picture again.
function bodyOf(p) {
  const r = p.recipe;
  const body = { prompt: p.prompt, n: 1, size: r.width + "x" + r.height, steps: r.steps, seed: r.seed,
                 guidance_scale: r.guidance_scale, sampler: r.sampler, karras: r.karras };
  if (r.negative_prompt) body.negative_prompt = r.negative_prompt;
  return body;
}

function showHistory(current) {
  $("past").hidden = pictures.length < 2;
  $("history").replaceChildren(...pictures.slice().reverse().map((p) => {
    const item = document.createElement("li"), button = document.createElement("button"), img = document.createElement("img");
    img.src = p.url;
    img.alt = p.prompt + ", seed " + p.recipe.seed;
    button.type = "button";
    button.setAttribute("aria-current", String(p === current));
    button.onclick = () => show(p);
    button.append(img);
    item.append(button);
    return item;
  }));
}

function element(name, text) {
  const e = document.createElement(name);
  e.textContent = text;
  return e;
}

function setBusy(busy) {
  document.body.classList.toggle("busy", busy);
  $("draw").disabled = $("again").disabled = $("vary").disabled = busy;
  $("cancel").hidden = !busy;
  if (busy) $("error").hidden = true;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

$("form").addEventListener("submit", (e) => { e.preventDefault(); draw(request()); });
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    $("form").requestSubmit();
  }
});
$("cancel").addEventListener("click", () => running && running.abort());
document.addEventListener("keydown", (e) => { if (e.key === "Escape" && running) running.abort(); });
$("draw").disabled = true;
loadModel();
