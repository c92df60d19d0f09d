// What both pages use: short names for the document, server-sent events, and the server's errors.

export const $ = (id) => document.getElementById(id);

// element("p", {className: "x", textContent: "y"}, child, ...)
export function element(name, properties = {}, ...children) {
  const e = Object.assign(document.createElement(name), properties);
  e.append(...children);
  return e;
}

// The rows of a description list: [term, text] pairs; empty texts are left out.
export function rows(pairs) {
  return pairs.filter(([, text]) => text !== "" && text !== null && text !== undefined)
    .flatMap(([term, text]) => [element("dt", { textContent: term }), element("dd", {}, text instanceof Node ? text : String(text))]);
}

export function seconds(s) {
  return s < 10 ? s.toFixed(1) + " s" : s < 90 ? Math.round(s) + " s" : s < 5400 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h";
}

// What the server refused, in its own words.
export class Refusal extends Error {
  constructor(error, status) {
    super(error.message);
    this.param = error.param || "";
    this.code = error.code || "";
    this.status = status;
  }
}

// The JSON of an answer; throws what the server says when it refused.
export async function readJson(answer) {
  const text = await answer.text();
  let json;
  try {
    json = JSON.parse(text);
  } catch {
    throw new Refusal({ message: "the answer (" + answer.status + ") is not from Safelight: " + text.slice(0, 200) }, answer.status);
  }
  if (!answer.ok) throw new Refusal(json.error || { message: "the server answered " + answer.status }, answer.status);
  return json;
}

// Calls on(name, data, id) for each event of a text/event-stream as it comes. EventSource would do, but sends neither a key nor a body.
export async function readEvents(answer, on) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      readEvent(rest.slice(0, end), on);
      rest = rest.slice(end + 2);
    }
  }
}

function readEvent(text, on) {
  let name = "message", data = "", id = "";
  for (const line of text.split("\n")) {
    const at = line.indexOf(":"), value = line.slice(at + 1).replace(/^ /, "");
    if (line.startsWith("event:")) name = value;
    else if (line.startsWith("data:")) data += value;
    else if (line.startsWith("id:")) id = value;
  }
  if (data) on(name, JSON.parse(data), id);
}
