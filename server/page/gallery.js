// The pictures of this visit: thumbnails, the chosen one large with its recipe, and what can be done with it. They are object URLs of this tab, revoked as
// they go.

import { $, element, rows } from "/common.js";

const KEEP = 60;
const pictures = [];       // {url, type, prompt, recipe}, newest first
let chosen = null;
let redraw = () => {};     // draw(body), from app.js
let fill = () => {};       // fill(body): into the form

export function openGallery(draw, intoForm) {
  redraw = draw;
  fill = intoForm;
  $("again").onclick = () => redraw(bodyOf(chosen));
  $("vary").onclick = () => redraw({ ...bodyOf(chosen), seed: chosen.recipe.seed + 1 });
  $("use").onclick = () => fill(bodyOf(chosen));
  $("copy").onclick = copy;
  $("remove").onclick = () => remove(chosen);
  $("history").addEventListener("keydown", move);
}

export function addPicture({ bytes, type, recipe }, prompt) {
  const p = { url: URL.createObjectURL(new Blob([bytes], { type })), type, prompt, recipe };
  pictures.unshift(p);
  p.item = thumbnail(p);
  $("history").prepend(p.item);
  if (pictures.length > KEEP) remove(pictures[KEEP]);
  choose(p);
}

// The request that draws this picture again.
function bodyOf(p) {
  const r = p.recipe;
  const body = { prompt: p.prompt, n: 1, size: r.width + "x" + r.height, steps: r.steps, seed: r.seed, guidance_scale: r.guidance_scale,
                 sampler: r.sampler, karras: r.karras };
  if (r.negative_prompt) body.negative_prompt = r.negative_prompt;
  if (r.clip_skip) body.clip_skip = r.clip_skip;
  return body;
}

function underWhat(r) {
  if (!r.generation_id) return "Safety: not said";
  return (r.requires_nothing ? "No safety (evaluation), generation " : "Safety generation ") + r.generation_id;
}

function thumbnail(p) {
  const r = p.recipe;
  const button = element("button", { type: "button", onclick: () => choose(p) },
                         element("img", { src: p.url, alt: p.prompt + ", seed " + r.seed }));
  const under = element("span", { className: r.requires_nothing ? "under bad" : "under", textContent: r.generation_id || "", title: underWhat(r) });
  return element("li", {}, button, under);
}

function choose(p) {
  chosen = p;
  $("result").hidden = $("past").hidden = !p;
  $("empty").hidden = Boolean(p);
  for (const q of pictures) {
    const button = q.item.firstChild;
    button.setAttribute("aria-current", String(q === p));
    button.tabIndex = q === p ? 0 : -1;
  }
  if (p) show(p);
}

function show(p) {
  const r = p.recipe, t = r.times, name = "safelight-" + r.seed + "." + p.type.replace("image/", "").replace("jpeg", "jpg");
  $("picture").src = $("open").href = $("save").href = p.url;
  $("picture").alt = "Drawn picture: " + p.prompt;
  $("open").target = "_blank";
  $("save").download = name;
  $("caption").textContent = p.prompt || "(no prompt)";
  $("safety").textContent = underWhat(r);
  $("safety").classList.toggle("bad", Boolean(r.requires_nothing));
  $("recipe").replaceChildren(...rows([
    ["Seed", r.seed], ["Size", r.width + " × " + r.height], ["Steps", r.steps], ["Guidance", r.guidance_scale],
    ["Sampler", r.sampler + (r.karras ? ", Karras" : "")], ["Without", r.negative_prompt], ["Styles", r.styles], ["Model", r.model],
    ["Profile", r.profile], ["Generation", r.generation_id], ["Digest", r.generation_digest && element("code", { textContent: r.generation_digest })],
    ["Time", t && (t.total_ms / 1000).toFixed(2) + " s" + (t.queue_ms > 100 ? ", " + (t.queue_ms / 1000).toFixed(2) + " s of it waiting" : "")],
  ]));
}

async function copy() {
  const text = JSON.stringify(bodyOf(chosen), null, 2);
  try {
    await navigator.clipboard.writeText(text);
    $("status").textContent = "recipe copied";
  } catch {
    $("error").textContent = "the browser does not allow copying here: " + text;
    $("error").hidden = false;
  }
}

function remove(p) {
  const at = pictures.indexOf(p), had = p.item.contains(document.activeElement) || document.activeElement === $("remove");
  pictures.splice(at, 1);
  p.item.remove();
  URL.revokeObjectURL(p.url);
  if (p !== chosen) return;
  choose(pictures[Math.min(at, pictures.length - 1)] || null);
  if (had) (chosen ? chosen.item.firstChild : $("prompt")).focus();
}

// Arrow keys walk through the thumbnails, of which one is in the tab order.
function move(e) {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -KEEP, End: KEEP };
  if (!(e.key in steps)) return;
  e.preventDefault();
  const at = Math.max(0, Math.min(pictures.length - 1, pictures.indexOf(chosen) + steps[e.key]));
  choose(pictures[at]);
  chosen.item.firstChild.focus();
}
