"use strict";

const byId = (id) => document.getElementById(id);
const API_KEY_ITEM = "offcut-api-key"; // in the session storage
let running = null; // AbortController of the generation in progress

// Returns the server's reply. Throws an Error with the server's message if the reply is not a success.
async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => null);
  const error = new Error(problem?.error?.message ?? `the server answered with status ${reply.status}`);
  error.status = reply.status;
  throw error;
}

// Yields the data of each server-sent event as it arrives.
async function* readEvents(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function clearFigure(figure) {
  const image = figure.querySelector("img");
  image.hidden = true;
  image.removeAttribute("src");
  figure.querySelector(".seconds").textContent = "";
  figure.querySelector(".count").textContent = "\u00a0";
  const steps = figure.querySelector(".steps");
  steps.replaceChildren();
  steps.setAttribute("aria-label", "No UNet calls yet");
}

function showImage(figure, png, alt, preview) {
  const image = figure.querySelector("img");
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
  image.src = `data:image/png;base64,${png}`;
  image.alt = alt;
  image.classList.toggle("preview", preview);
  image.hidden = false;
}

// Colours the bar of one UNet call, and counts the calls by kind.
function showCall(figure, event) {
  const steps = figure.querySelector(".steps");
  const total = event.total ?? event.step;
  while (steps.children.length < total) steps.append(document.createElement("i"));
  steps.classList.toggle("many", total > 60);
  const bar = steps.children[event.step - 1];
  bar.className = event.kind;
  bar.title = `call ${event.step}, ${event.kind}: ${event.seconds.toFixed(3)} s`;
  const full = steps.querySelectorAll(".full").length;
  const skipped = steps.querySelectorAll(".skipped").length;
  const shallow = event.step - full - skipped;
  const kinds = skipped ? `${full} full, ${shallow} shallow and ${skipped} skipped` : `${full} full and ${shallow} shallow`;
  const text = `${kinds} of ${total} calls`;
  figure.querySelector(".count").textContent = text;
  steps.setAttribute("aria-label", text);
}

// Generates one image and shows it in a figure. Returns the time that the server took, in seconds.
async function generate(figure, body, alt, signal) {
  const reply = await call("v1/images/generations", body, signal);
  const began = performance.now();
  const seconds = figure.querySelector(".seconds");
  let serverSeconds = null;
  for await (const event of readEvents(reply)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "image_generation.progress") {
      showCall(figure, event);
      seconds.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
    } else if (event.type === "image_generation.partial_image") {
      showImage(figure, event.b64_json, `${alt}, preview`, true);
    } else if (event.type === "image_generation.completed") {
      showImage(figure, event.b64_json, alt, false);
      serverSeconds = event.offcut.seconds;
      seconds.textContent = `${serverSeconds.toFixed(2)} s`;
    }
  }
  if (serverSeconds === null) throw new Error("the server closed the connection before the image was done");
  return serverSeconds;
}

function requestBody() {
  const body = {
    prompt: byId("prompt").value.trim(),
    num_inference_steps: byId("steps").valueAsNumber,
    guidance_scale: byId("guidance").valueAsNumber,
    seed: byId("seed").valueAsNumber,
    stream: true,
  };
  if (byId("negative").value) body.negative_prompt = byId("negative").value;
  if (byId("size").value) body.size = byId("size").value;
  if (byId("request").dataset.previews) body.partial_images = 3;
  return body;
}

// Returns the request's caching fields: the interval of the slider, or a schedule of the server.
function cachingFields() {
  const schedule = byId("schedule").value;
  const interval = byId("interval").valueAsNumber;
  if (isTuned(schedule)) return { schedule };
  if (!schedule && interval === 1) return { interval };
  return { ...(schedule ? { schedule } : { interval }), forecast: byId("forecast").valueAsNumber };
}

// A tuned schedule has a forecast of its own.
function isTuned(schedule) {
  return schedule === "auto" || schedule.startsWith("tuned:");
}

async function submit() {
  if (running) return;
  const controller = (running = new AbortController());
  byId("error").hidden = true;
  byId("generate").disabled = true;
  byId("stop").disabled = false;
  const body = requestBody();
  clearFigure(byId("cached"));
  clearFigure(byId("uncached"));
  if (matchMedia("(max-width: 60rem)").matches) byId("results").scrollIntoView(); // the results are below the form
  try {
    setStatus("Generating with caching");
    const cached = await generate(byId("cached"), { ...body, ...cachingFields() }, body.prompt, controller.signal);
    if (!byId("compare").checked) {
      setStatus(`${cached.toFixed(2)} s with caching`);
    } else {
      setStatus("Generating without caching");
      const alt = `${body.prompt}, without caching`;
      const uncached = await generate(byId("uncached"), { ...body, interval: 1 }, alt, controller.signal);
      const ratio = (uncached / cached).toFixed(2);
      setStatus(`${ratio} times as fast: ${cached.toFixed(2)} s with caching, ${uncached.toFixed(2)} s without`);
    }
  } catch (error) {
    if (controller.signal.aborted) setStatus("Stopped");
    else showError(error);
  } finally {
    running = null;
    byId("generate").disabled = false;
    byId("stop").disabled = true;
  }
}

function setStatus(text) {
  byId("status").textContent = text;
}

function showError(error) {
  setStatus("\u00a0");
  byId("error").textContent = error.message;
  byId("error").hidden = false;
  if (error.status === 401) {
    document.querySelector("details").open = true;
    byId("key").focus();
  }
}

// Fills the form with the server's model, defaults and limits.
async function loadModel() {
  const [model] = (await (await call("v1/models")).json()).data;
  const { defaults, limits } = model.offcut;
  byId("model").textContent = `${model.id}, ${model.offcut.size} pixels by default`;
  byId("steps").max = limits.num_inference_steps;
  byId("steps").value = defaults.num_inference_steps;
  byId("guidance").value = defaults.guidance_scale;
  byId("prompt").maxLength = byId("negative").maxLength = limits.prompt_chars;
  byId("size").placeholder = model.offcut.size;
  fillSchedules(model.offcut.cuts.length ? defaults.schedule : null, model.offcut.tuned);
  byId("forecast").value = defaults.forecast;
  if (model.offcut.previews) byId("request").dataset.previews = "yes";
  if (!model.offcut.cuts.length) {
    byId("interval").value = 1;
    byId("interval").disabled = byId("schedule").disabled = byId("forecast").disabled = true;
  } else if (defaults.interval > 1) {
    byId("interval").max = Math.max(10, defaults.interval);
    byId("interval").value = defaults.interval;
  }
  updateCaching();
}

// Lists the server's schedules, and selects its default.
function fillSchedules(defaultSchedule, tuned) {
  const names = [...(defaultSchedule ? [defaultSchedule] : []), ...tuned.map((name) => `tuned:${name}`)];
  byId("schedule").length = 1;
  for (const name of new Set(names)) byId("schedule").append(new Option(name, name));
  byId("schedule").value = defaultSchedule ?? "";
}

// Enables the caching fields that apply, and updates the slider's texts.
function updateCaching() {
  const schedule = byId("schedule").value;
  byId("interval").disabled = schedule !== "" || byId("schedule").disabled;
  byId("interval-hint").textContent = schedule
    ? `Not used: the schedule below is ${schedule}.`
    : "A larger interval is faster and costs image quality.";
  byId("forecast").disabled = isTuned(schedule) || byId("schedule").disabled;
  const interval = byId("interval").valueAsNumber;
  const text = interval === 1 ? "call" : `${interval} calls`;
  byId("interval-shown").textContent = text;
  byId("interval").setAttribute("aria-valuetext", `full UNet every ${text}`);
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("request").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("random-seed").addEventListener("click", () => {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
byId("interval").addEventListener("input", updateCaching);
byId("schedule").addEventListener("change", updateCaching);
byId("key").value = sessionStorage.getItem(API_KEY_ITEM) ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem(API_KEY_ITEM, byId("key").value);
  byId("error").hidden = true;
  loadModel().catch(showError);
});
updateCaching();
loadModel().catch(showError);
