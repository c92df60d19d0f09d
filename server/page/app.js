// The public page: the form, the drawings on their way, and who is told what. No framework, no build step, nothing from elsewhere.

import { $, Refusal, element, readJson, seconds } from "/common.js";
import { Drawing } from "/draw.js";
import { addPicture, openGallery } from "/gallery.js";

const FIELDS = { width: "width", height: "height", size: "width", steps: "steps", guidance_scale: "guidance_scale", sampler: "sampler", karras: "karras",
                 seed: "seed", n: "n", prompt: "prompt", negative_prompt: "negative_prompt" }; // the server's name of a field: its control
const NUMBERS = ["steps", "guidance_scale", "seed", "n"];
const under_way = [];      // {drawing, card}, oldest first

const say = (text) => { $("status").textContent = text; };
const wait = (ms) => new Promise((wake) => setTimeout(wake, ms));

// ---- the model and whether it draws ----

async function loadModel() {
  for (;; await wait(700)) {
    try {
      const list = await readJson(await fetch("/v1/models"));
      if (list.data.length) {
        showModel(list.data[0].safelight, list.data[0].id);
        return watchReady();
      }
      $("model").textContent = "the model is loading…";
    } catch {
      $("model").textContent = "the server does not answer";
    }
  }
}

function showModel(m, name) {
  $("model").textContent = name + ", Safelight " + m.version;
  for (const id of ["width", "height"]) Object.assign($(id), { min: m.size_multiple, max: m.max_size, step: m.size_multiple, value: m.default_size });
  Object.assign($("steps"), { min: 1, max: m.max_steps, value: m.default_steps });
  Object.assign($("guidance_scale"), { min: 0, max: m.max_guidance, value: m.default_guidance });
  Object.assign($("seed"), { min: 0 });
  Object.assign($("n"), { min: 1, max: m.max_n });
  $("sampler").replaceChildren(...[...new Set([...m.samplers, m.default_sampler])].map((s) => new Option(s, s, false, s === m.default_sampler)));
  $("draw").disabled = false;
}

// What keeps the server from drawing is said before somebody asks in vain.
async function watchReady() {
  let said = "";
  for (;; await wait(3000)) {
    try {
      await readJson(await fetch("/readyz"));
      if (said && $("error").textContent === said) showError(null);
      return;
    } catch (e) {
      said = e.message;
      if (e instanceof Refusal && !under_way.length) showError(e);
    }
  }
}

// ---- the form ----

// The request that the form describes; throws when a field holds no number, or one that would not arrive as it was typed.
function request() {
  const body = { prompt: $("prompt").value };
  for (const id of ["width", "height", ...NUMBERS]) {
    if ($(id).validity.badInput) throw new Refusal({ message: id.replace("_", " ") + " must be a number", param: id }, 400);
    if ($(id).value !== "") body[id] = Number($(id).value);
    if (Math.abs(body[id]) > Number.MAX_SAFE_INTEGER) throw new Refusal({ message: id + " is more than a browser can count", param: id }, 400);
  }
  if (body.width && body.height) body.size = body.width + "x" + body.height;
  delete body.width;
  delete body.height;
  if ($("sampler").value) body.sampler = $("sampler").value;
  if ($("karras").value) body.karras = $("karras").value === "yes";
  if ($("negative_prompt").value) body.negative_prompt = $("negative_prompt").value;
  return body;
}

function fill(body) {
  const [width, height] = body.size.split("x");
  const values = { ...body, width, height, karras: body.karras ? "yes" : "no", negative_prompt: body.negative_prompt || "" };
  for (const id of Object.values(FIELDS)) if (id in values) $(id).value = values[id];
  $("more").open = true;
  $("prompt").focus();
}

// ---- drawings on their way ----

// The card of one drawing: how it forms, how far it is, and its end.
class Card {
  constructor(body, cancel) {
    const [width, height] = (body.size || "1x1").split("x").map(Number);
    this.start = performance.now();
    this.url = "";
    this.state = "sending";
    this.image = element("img", { alt: "", hidden: true, width, height });
    this.text = element("p", { className: "state", textContent: "sending…" });
    this.bar = element("progress", { max: 1, value: 0, ariaLabel: "Progress of " + body.prompt });
    this.button = element("button", { type: "button", textContent: "Cancel", ariaLabel: "Cancel " + body.prompt, onclick: cancel });
    this.item = element("li", {}, element("div", { className: "forming" }, this.image),
                        element("div", {}, element("p", { className: "what", textContent: body.prompt || "(no prompt)" }), this.text, this.bar, this.button));
    this.clock = setInterval(() => this.tick(), 200);
    $("way").append(this.item);
    $("empty").hidden = true;
  }

  tick() {
    this.text.textContent = this.state + ", " + ((performance.now() - this.start) / 1000).toFixed(1) + " s";
  }

  tell(state) {
    this.state = state;
    this.tick();
  }

  preview(bytes, type) {
    const old = this.url;
    this.url = this.image.src = URL.createObjectURL(new Blob([bytes], { type }));
    this.image.alt = "The picture so far";
    this.image.hidden = false;
    if (old) URL.revokeObjectURL(old);
  }

  close() {
    const had = this.item.contains(document.activeElement);
    clearInterval(this.clock);
    this.item.remove();
    if (this.url) URL.revokeObjectURL(this.url);
    if (had) $("prompt").focus();
  }
}

function placeInQueue(position, estimate) {
  const ahead = position === null ? "" : position === 0 ? "next to start" : position === 1 ? "1 request ahead" : position + " requests ahead";
  const time = estimate ? "about " + seconds(estimate) + " to go" : "";
  return ["waiting", ahead, time].filter(Boolean).join(", ");
}

async function draw(body) {
  const card = new Card(body, () => drawing.cancel());
  let steps = 0;
  const drawing = new Drawing(body, $("key").value, {
    waiting(position, estimate) {
      card.tell(placeInQueue(position, estimate));
      say(card.state);
    },
    step(p) {
      const of = p.pictures > 1 ? "picture " + (p.picture + 1) + " of " + p.pictures + ", " : "";
      if (!steps) say("drawing " + (body.prompt || "a picture"));
      steps = p.steps;
      card.bar.value = (p.picture + (p.steps ? p.step / p.steps : 0)) / (p.pictures || 1);
      card.tell("drawing " + of + "step " + p.step + " of " + p.steps);
    },
    preview(bytes, type) {
      card.preview(bytes, type);
      if (!steps) card.tell("drawing");
    },
    trouble: (text) => card.tell(text),
  });
  const entry = { drawing, card };
  under_way.push(entry);
  showError(null);
  try {
    const pictures = await drawing.run();
    for (const p of pictures) addPicture(p, body.prompt);
    say("done: " + (pictures.length > 1 ? pictures.length + " pictures" : body.prompt) + ", " + seconds((performance.now() - card.start) / 1000));
  } catch (e) {
    if (e.name === "AbortError" || e.code === "cancelled") say("cancelled");
    else showError(e);
  } finally {
    card.close();
    under_way.splice(under_way.indexOf(entry), 1);
    $("empty").hidden = under_way.length > 0 || !$("result").hidden;
  }
}

// ---- errors ----

// In the server's words, at the field that it names. null: there is none any more.
function showError(e) {
  for (const id of new Set(Object.values(FIELDS))) {
    $(id).removeAttribute("aria-invalid");
    $(id).removeAttribute("aria-describedby");
  }
  $("error").hidden = !e;
  $("error").textContent = e ? e instanceof Refusal ? e.message : "the server does not answer: " + e.message : "";
  const field = e && e.param && FIELDS[e.param];
  if (!field) return;
  say("");
  $("more").open = $("more").open || $("more").contains($(field));
  $(field).setAttribute("aria-invalid", "true");
  $(field).setAttribute("aria-describedby", "error");
  $(field).focus();
}

// ---- start ----

$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  if ($("draw").disabled) return;
  try {
    draw(request());
  } catch (refusal) {
    showError(refusal);
  }
});
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape" && under_way.length) under_way[under_way.length - 1].drawing.cancel();
});
addEventListener("pagehide", () => { for (const { drawing } of under_way) drawing.cancel(); });
$("draw").disabled = true;
$("more").open = matchMedia("(min-width: 60rem)").matches;
openGallery(draw, fill);
loadModel();
