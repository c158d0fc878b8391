"use strict";

const at = (id) => document.getElementById(id);
const KEY = "offcut-api-key";
let running = null; // the AbortController of what is being drawn

// The reply to a request to the server, or an Error with the server's own sentence.
async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the server answered ${reply.status}`);
  error.status = reply.status;
  throw error;
}

// The data of each server-sent event, as it comes.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function clear(figure) {
  const image = figure.querySelector("img");
  image.hidden = true;
  image.removeAttribute("src");
  figure.querySelector(".seconds").textContent = "";
  figure.querySelector(".count").textContent = "\u00a0";
  const steps = figure.querySelector(".steps");
  steps.replaceChildren();
  steps.setAttribute("aria-label", "No steps yet");
}

function show(figure, png, alt, preview) {
  const image = figure.querySelector("img");
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
  image.src = `data:image/png;base64,${png}`;
  image.alt = alt;
  image.classList.toggle("preview", preview);
  image.hidden = false;
}

function stepped(figure, event) {
  const steps = figure.querySelector(".steps");
  const total = event.total ?? event.step;
  while (steps.children.length < total) steps.append(document.createElement("i"));
  steps.classList.toggle("many", total > 60);
  const bar = steps.children[event.step - 1];
  bar.className = event.kind;
  bar.title = `step ${event.step}, ${event.kind}: ${event.seconds.toFixed(3)} s`;
  const full = steps.querySelectorAll(".full").length;
  const skipped = steps.querySelectorAll(".skipped").length;
  const without = skipped ? `, ${skipped} without an engine,` : "";
  const text = `${full} full and ${event.step - full - skipped} shallow${without} of ${total} calls`;
  figure.querySelector(".count").textContent = text;
  steps.setAttribute("aria-label", text);
}

// Draws one image into a figure; the seconds that the server worked on it.
async function draw(figure, body, alt, signal) {
  const reply = await call("v1/images/generations", body, signal);
  const began = performance.now();
  const seconds = figure.querySelector(".seconds");
  let took = null;
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "image_generation.progress") {
      stepped(figure, event);
      seconds.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
    } else if (event.type === "image_generation.partial_image") {
      show(figure, event.b64_json, `${alt}, unfinished`, true);
    } else if (event.type === "image_generation.completed") {
      show(figure, event.b64_json, alt, false);
      took = event.offcut.seconds;
      seconds.textContent = `${took.toFixed(2)} s`;
    }
  }
  if (took === null) throw new Error("the server ended the connection before the image was done");
  return took;
}

function asked() {
  const body = {
    prompt: at("prompt").value.trim(),
    num_inference_steps: at("steps").valueAsNumber,
    guidance_scale: at("guidance").valueAsNumber,
    seed: at("seed").valueAsNumber,
    stream: true,
  };
  if (at("negative").value) body.negative_prompt = at("negative").value;
  if (at("size").value) body.size = at("size").value;
  if (at("ask").dataset.previews) body.partial_images = 3;
  return body;
}

// How calls are to be cached, by the slider or by a schedule that the server has.
function caching() {
  const schedule = at("schedule").value;
  const interval = at("interval").valueAsNumber;
  if (schedule === "auto" || schedule.startsWith("tuned:")) return { schedule }; // it has forecasts of its own
  if (!schedule && interval === 1) return { interval };
  return { ...(schedule ? { schedule } : { interval }), forecast: at("forecast").valueAsNumber };
}

async function submit() {
  if (running) return;
  const stop = (running = new AbortController());
  at("wrong").hidden = true;
  at("draw").disabled = true;
  at("stop").disabled = false;
  const body = asked();
  clear(at("cached"));
  clear(at("uncached"));
  if (matchMedia("(max-width: 60rem)").matches) at("drawn").scrollIntoView(); // it stands below the form there
  try {
    say("Drawing with caching");
    const fast = await draw(at("cached"), { ...body, ...caching() }, body.prompt, stop.signal);
    if (!at("compare").checked) {
      say(`${fast.toFixed(2)} s`);
    } else {
      say("Drawing without caching");
      const slow = await draw(at("uncached"), { ...body, interval: 1 }, `${body.prompt}, without caching`, stop.signal);
      say(`${(slow / fast).toFixed(2)} times as fast: ${fast.toFixed(2)} s instead of ${slow.toFixed(2)} s`);
    }
  } catch (error) {
    if (stop.signal.aborted) say("Stopped");
    else fail(error);
  } finally {
    running = null;
    at("draw").disabled = false;
    at("stop").disabled = true;
  }
}

function say(text) {
  at("said").textContent = text;
}

function fail(error) {
  say("\u00a0");
  at("wrong").textContent = error.message;
  at("wrong").hidden = false;
  if (error.status === 401) {
    document.querySelector("details").open = true;
    at("key").focus();
  }
}

// What this server draws, and how much of it.
async function greet() {
  const [model] = (await (await call("v1/models")).json()).data;
  const { defaults, limits } = model.offcut;
  at("model").textContent = `${model.id}, images of ${model.offcut.size} pixels`;
  at("steps").max = limits.num_inference_steps;
  at("steps").value = defaults.num_inference_steps;
  at("guidance").value = defaults.guidance_scale;
  at("prompt").maxLength = at("negative").maxLength = limits.prompt_chars;
  at("size").placeholder = model.offcut.size;
  offer(model.offcut.cuts.length ? defaults.schedule : null, model.offcut.tuned);
  at("forecast").value = defaults.forecast;
  if (model.offcut.previews) at("ask").dataset.previews = "yes";
  if (!model.offcut.cuts.length) {
    at("interval").value = 1;
    at("interval").disabled = at("schedule").disabled = at("forecast").disabled = true;
  } else if (defaults.interval > 1) {
    at("interval").max = Math.max(10, defaults.interval);
    at("interval").value = defaults.interval;
  }
  shown();
}

// The schedules that the server has beside the slider; its own default is chosen at first.
function offer(own, tuned) {
  const names = [...new Set([...(own ? [own] : []), ...tuned.map((name) => `tuned:${name}`)])];
  at("schedule").length = 1;
  for (const name of names) at("schedule").append(new Option(name, name));
  at("schedule").value = own ?? "";
}

function shown() {
  const schedule = at("schedule").value;
  at("interval").disabled = schedule !== "" || at("schedule").disabled;
  at("interval-hint").textContent = schedule
    ? `Not used: the schedule below is ${schedule}.`
    : "Larger is faster and costs quality.";
  at("forecast").disabled = schedule === "auto" || schedule.startsWith("tuned:") || at("schedule").disabled;
  const interval = at("interval").valueAsNumber;
  const text = interval === 1 ? "call" : `${interval} calls`;
  at("interval-shown").textContent = text;
  at("interval").setAttribute("aria-valuetext", `full UNet every ${text}`);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("dice").addEventListener("click", () => {
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
at("interval").addEventListener("input", shown);
at("schedule").addEventListener("change", shown);
at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value);
  at("wrong").hidden = true;
  greet().catch(fail);
});
shown();
greet().catch(fail);
