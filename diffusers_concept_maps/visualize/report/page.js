
const DATA = JSON.parse(document.getElementById("data").textContent);
const METHODS = DATA.methods.map((method) => new Scores(method.scores));
const COUNT = DATA.frames.length || DATA.tokens.length;
const by = (name) => document.getElementById(name);
const view = {
  method: 0, concept: 0, frame: 0, mode: "heat", opacity: 0.6, threshold: 0.5, colors: "inferno", curve: "mean own",
};
const picture = new Picture(DATA, by("picture"), by("points"));
const timeline = new Timeline(by("timeline"), by("lowest"), by("highest"));
let panels = [];
let timer = null;
let pointer = null;

function token() {
  return DATA.tokens[view.frame];
}

/** Everything that depends on the frame, the concept or how it is drawn. */
function draw() {
  const scores = METHODS[view.method];
  picture.draw(view, scores, token());
  by("frame").value = view.frame;
  by("frame").setAttribute("aria-valuetext", `frame ${view.frame} of ${COUNT}`);
  by("number").textContent = `${view.frame} / ${COUNT - 1}`;
  if (!scores) return;
  panels.forEach((panel) => panel.draw(view, token(), scores.frames));
  timeline.point(view.frame);
  concepts().forEach((button, concept) => {
    button.setAttribute("aria-pressed", concept === view.concept);
    const share = scores.curve(concept, false)[token()];
    button.lastChild.textContent = readable(scores.score(concept, share));
  });
  by("threshold").disabled = view.mode !== "threshold";
  by("low").textContent = readable(scores.low[view.concept]);
  by("high").textContent = readable(scores.high[view.concept]);
  drawShare(by("scale"), Float32Array.from({ length: 256 }, (_, entry) => (entry + 0.5) / 256), COLORMAPS[view.colors]);
  by("legend").hidden = view.mode !== "heat";
  if (pointer) tell();
}

function drawCurves() {
  const scores = METHODS[view.method];
  if (scores) timeline.draw(scores, DATA.tokens, view);
}

function concepts() {
  return [...by("concepts").children];
}

function seek(frame) {
  view.frame = Math.max(0, Math.min(COUNT - 1, frame));
  draw();
}

function play(on) {
  clearInterval(timer);
  timer = on && COUNT > 1 ? setInterval(() => seek((view.frame + 1) % COUNT), 1000 / DATA.fps) : null;
  by("play").textContent = timer ? "❚❚" : "▶";
  by("play").setAttribute("aria-label", timer ? "pause" : "play");
}

function pick(concept) {
  if (concept >= DATA.concepts.length) return;
  view.concept = concept;
  drawCurves();
  draw();
}

/** The scores under the pointer, of all concepts. */
function tell() {
  const scores = METHODS[view.method];
  const { width, height } = picture.canvas;
  const [column, row] = [Math.floor(pointer.x * width), Math.floor(pointer.y * height)];
  if (!scores || column < 0 || row < 0 || column >= width || row >= height) return;
  const values = DATA.concepts.map((name, concept) => {
    const share = picture.share(scores, concept, token())[row * width + column];
    return `${name} ${readable(scores.score(concept, share))}`;
  });
  const place = (at) => Math.floor(at / picture.scale);
  by("value").textContent = `x ${place(column)}, y ${place(row)}: ${values.join(" · ")}`;
}

function choose(method) {
  view.method = method;
  panels = [];
  for (const axis of ["layer", "step", "head"]) {
    const entry = DATA.methods[method].panels[axis];
    by(`${axis}s`).hidden = !entry;
    if (entry) panels.push(new Panels(axis, entry, by(`${axis}-maps`)));
  }
  const heads = panels.find((panel) => panel.axis === "head");
  by("row-choice").hidden = !heads || heads.rows.length < 2;
  if (heads) by("row").replaceChildren(...heads.rows.map((name, row) => new Option(`layer ${name}`, row)));
  drawCurves();
  draw();
}

function theme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

function cycle() {
  const modes = [...by("mode").options].filter((option) => !option.disabled).map((option) => option.value);
  view.mode = by("mode").value = modes[(modes.indexOf(view.mode) + 1) % modes.length];
  draw();
}

/** Keys; what a button, a slider or a list does with a key itself stays its own. */
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const own = { BUTTON: [" "], SUMMARY: [" "], SELECT: null, INPUT: event.target.id === "frame" ? [] : null };
  const taken = own[event.target.tagName];
  if (taken === null || (taken && taken.includes(event.key))) return;
  const step = event.shiftKey ? 10 : 1;
  const actions = {
    " ": () => play(!timer), ArrowRight: () => seek(view.frame + step), ArrowLeft: () => seek(view.frame - step),
    Home: () => seek(0), End: () => seek(COUNT - 1), m: cycle, t: theme,
  };
  const digit = "123456789".indexOf(event.key);
  if (!actions[event.key] && digit < 0) return;
  event.preventDefault();
  if (actions[event.key]) actions[event.key]();
  else pick(digit);
}

function listen() {
  const update = (name, read) => by(name).addEventListener("input", (event) => {
    read(event.target.value);
    draw();
  });
  update("frame", (value) => (view.frame = Number(value)));
  update("mode", (value) => (view.mode = value));
  update("opacity", (value) => (view.opacity = Number(value) / 100));
  update("threshold", (value) => (view.threshold = Number(value) / 100));
  update("colors", (value) => (view.colors = value));
  update("row", (value) => (panels.find((panel) => panel.axis === "head").row = Number(value)));
  update("curve", (value) => {
    view.curve = value;
    drawCurves();
  });
  by("method").addEventListener("input", (event) => choose(Number(event.target.value)));
  by("play").addEventListener("click", () => play(!timer));
  by("theme").addEventListener("click", theme);
  document.addEventListener("keydown", press);
  by("timeline").addEventListener("pointerdown", (event) => {
    const box = by("timeline").getBoundingClientRect();
    seek(Math.round(((event.clientX - box.left) / box.width) * (COUNT - 1)));
  });
  by("stage").addEventListener("pointermove", (event) => {
    const box = by("picture").getBoundingClientRect();
    pointer = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    tell();
  });
  by("stage").addEventListener("pointerleave", () => {
    pointer = null;
    by("value").textContent = "";
  });
}

function button(name, concept) {
  const element = document.createElement("button");
  const [swatch, text, value] = ["span", "span", "span"].map((tag) => document.createElement(tag));
  element.type = "button";
  swatch.className = "swatch";
  swatch.style.background = css(hue(concept));
  text.className = "name";
  text.textContent = name;
  value.className = "mean";
  element.append(swatch, text, value);
  element.addEventListener("click", () => pick(concept));
  return element;
}

async function start() {
  if (DATA.title) document.title = by("title").textContent = DATA.title;
  by("frame").max = COUNT - 1;
  by("metadata").textContent = JSON.stringify(DATA.metadata, null, 2);
  by("concepts").append(...DATA.concepts.map(button));
  by("method").replaceChildren(...DATA.methods.map((method, index) => new Option(method.name, index)));
  document.body.classList.toggle("no-maps", !METHODS.length);
  document.body.classList.toggle("no-frames", !DATA.frames.length);
  document.body.classList.toggle("still", COUNT < 2);
  by("mode").options[2].disabled = DATA.concepts.length < 2;
  listen();
  play(false);
  await picture.open();
  if (METHODS.length) choose(0);
  else draw();
  document.documentElement.dataset.ready = "yes";
}

start();
