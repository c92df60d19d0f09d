// Asks the server for pictures and tells what happens on the way. The server's jobs are used where it offers them: a job outlives a broken connection.
// Where it does not, the request is an OpenAI stream, which ends with its connection.

import { Refusal, readEvents, readJson } from "/common.js";

const PREVIEWS = 3;
let hasJobs = true;        // until the server says otherwise

const wait = (ms) => new Promise((wake) => setTimeout(wake, ms));

// One request for pictures. on has the functions
//   waiting(position, seconds)  how many start before it, and the estimate until it is done; either may be null
//   step({step, steps, picture, pictures}),  preview(bytes, type, picture),  trouble(text): the connection broke, and is tried again
// run() returns [{bytes, type, recipe}], throws a Refusal, or throws an AbortError once cancel() was called.
export class Drawing {
  constructor(body, key, on) {
    this.body = body;
    this.on = on;
    this.headers = key ? { Authorization: "Bearer " + key } : {};
    this.stop = new AbortController();
    this.job = "";
  }

  cancel() {
    if (this.stop.signal.aborted) return;
    this.stop.abort();
    this.forget();
  }

  async run() {
    if (hasJobs) {
      const job = await this.submit();
      if (job) return this.follow(job);
    }
    return this.stream();
  }

  // ---- jobs ----

  // The job, or null when this server has none. A request on its way is not cut off: the server may have accepted it, and then it is cancelled by its id.
  async submit() {
    const answer = await fetch("/v1/jobs", { method: "POST", headers: { ...this.headers, "Content-Type": "application/json" },
                                             body: JSON.stringify({ ...this.body, partial_images: PREVIEWS }) });
    if (answer.status === 404 || answer.status === 405 || answer.status === 501) {
      const text = await answer.text();
      if (text.includes("model_not_found")) throw new Refusal(JSON.parse(text).error, answer.status);
      hasJobs = false;
      return null;
    }
    const job = await readJson(answer);
    this.job = job.id;
    if (this.stop.signal.aborted) this.forget();
    this.stop.signal.throwIfAborted();
    return job;
  }

  // Tells the server, also while the page is being left, that nobody waits any more.
  forget() {
    if (this.job) fetch("/v1/jobs/" + this.job, { method: "DELETE", headers: this.headers, keepalive: true }).catch(() => {});
    this.job = "";
  }

  async follow(job) {
    let last = "", outcome = null, tries = 0;
    const hear = (name, data, id) => {
      if (id) last = id;
      tries = 0;
      outcome = outcome || this.hear(name, data);
    };
    this.hear("status", job);
    for (;;) {
      try {
        const answer = await fetch("/v1/jobs/" + job.id + "/events", {
          headers: { ...this.headers, Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) }, signal: this.stop.signal });
        if (!answer.ok) await readJson(answer);
        await readEvents(answer, hear);
      } catch (e) {
        if (e instanceof Refusal || this.stop.signal.aborted) throw e;
        this.on.trouble("the connection broke; the job goes on, and so does this page as soon as it can");
      }
      if (outcome) return outcome();
      await wait(Math.min(500 * 2 ** tries++, 10000));
      this.stop.signal.throwIfAborted();
    }
  }

  // Passes one event on. Once it is over: a function that returns the pictures or throws why there are none.
  hear(name, data) {
    const fail = (error) => () => { throw new Refusal(error, 0); };
    if (name === "step") this.on.step(data);
    if (name === "preview") this.on.preview(bytesOf(data.b64_json), "image/" + data.output_format, data.picture);
    if (name === "error") return fail(data.error);
    if (name === "result") return () => picturesOf(data.result, this.headers);
    if (name !== "status") return null;
    if (data.status === "queued") this.on.waiting(data.queue_position, data.estimated_wait_s);
    if (data.status === "running" && data.progress) this.on.step(data.progress);
    if (data.status === "failed" || data.status === "cancelled") return fail(data.error || { message: "the job was " + data.status });
    if (data.status === "succeeded" && data.result) return () => picturesOf(data.result, this.headers);
    return null;
  }

  // ---- a stream ----

  async stream() {
    const pictures = [], n = this.body.n || 1;
    let error = null;
    const answer = await fetch("/v1/images/generations", {
      method: "POST", headers: { ...this.headers, "Content-Type": "application/json" }, signal: this.stop.signal,
      body: JSON.stringify({ ...this.body, stream: true, partial_images: PREVIEWS }) });
    if (!answer.ok) await readJson(answer);
    this.on.waiting(null, null);
    await readEvents(answer, (name, data) => {
      if (data.error) error = data.error;
      else if (name.endsWith(".partial_image")) this.on.preview(bytesOf(data.b64_json), "image/" + data.output_format, data.picture_index || 0);
      else if (name.endsWith(".completed")) pictures.push(pictureOf(bytesOf(data.b64_json), data, data.safelight));
    });
    if (error) throw new Refusal(error, 0);
    if (pictures.length < n) throw new Refusal({ message: "the connection broke before the picture was there" }, 0);
    return pictures;
  }
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// entry is of an answer's data, or an event: what this picture differs in from the recipe.
function pictureOf(bytes, entry, recipe, format = entry.output_format) {
  return { bytes, type: "image/" + (format || "png"), recipe: { ...recipe, ...entry.safelight, seed: entry.seed ?? recipe.seed } };
}

async function picturesOf(result, headers) {
  return Promise.all(result.data.map(async (entry) => {
    if (entry.b64_json) return pictureOf(bytesOf(entry.b64_json), entry, result.safelight, result.output_format);
    const answer = await fetch(new URL(entry.url, location).pathname, { headers }); // the host is ours, whatever a proxy makes of it
    if (!answer.ok) await readJson(answer);
    return pictureOf(await answer.arrayBuffer(), entry, result.safelight, result.output_format);
  }));
}
