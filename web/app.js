// The page: asks the server for what is new, keeps it, and shows it. Text from a run is only ever set as text.

import { amount, colour, Curves, Heat, heatRange, percent, viridis } from "/charts.js";

const POINTS = 3000;
const COLUMNS = 240;
const POLL = 2000;
const QUANTITIES = {
  flip_rate: { name: "flip rate", unit: "share of weights that changed their index", format: percent },
  movement: {
    name: "movement",
    unit: "mean |change| / mean |weight| in a step",
    format: (v) => (v === null || v === undefined ? "-" : v.toExponential(1)),
  },
  vote_pressure: { name: "vote pressure", unit: "RMS vote / largest vote of the buffer", format: percent },
  agreement: { name: "agreement", unit: "cosine of votes with a fresh gradient", format: (v) => amount(v, 3) },
};
const RANGES = { all: null, "last 1,000": 1000, "last 200": 200 };
const LAYER_WORDS = { open: "open", opened: "just opened", locked: "locked" };

const $ = (id) => document.getElementById(id);
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const page = {
  runs: [],
  focus: 0,
  quantity: "flip_rate",
  zoomed: null, // {from, to} or {last}
  sampleStep: null,
  answered: true,
};
window.monitor = page; // for the browser's console

// -- the server -------------------------------------------------------------------------------------------------------

async function ask(path, parameters) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, v]) => v !== null && v !== undefined));
  const response = await fetch(`/api/${path}?${query}`);
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return response.json();
}

function asked() {
  const z = page.zoomed;
  if (!z) return {};
  const [from, to] = view();
  return { from: Math.max(0, Math.floor(from)), to: z.last ? null : Math.ceil(to) };
}

async function loadSeries(run) {
  const answer = await ask("series", { run: run.id, points: POINTS, ...asked() });
  // Of a part of the run the last step is not the newest: whoever takes it for that is sent everything again.
  Object.assign(run, {
    generation: answer.generation,
    newest: answer.last,
    steps: answer.steps,
    columns: answer.columns,
  });
}

async function loadHeat(run) {
  const answer = await ask("heat", { run: run.id, quantity: page.quantity, columns: COLUMNS, ...asked() });
  run.heat = { bounds: answer.bounds, layers: answer.layers, rows: answer.rows };
}

async function reload(runs = page.runs) {
  await Promise.all(runs.flatMap((run) => [loadSeries(run), run.id === page.focus ? loadHeat(run) : null]));
}

async function look(run) {
  const news = await ask("news", {
    run: run.id,
    generation: run.generation,
    changes: run.changes,
    state: run.summary ? run.summary.state : "",
    after: run.newest ?? -1,
    quantity: page.quantity,
  });
  const fresh = news.steps && news.steps.length > 0;
  if (news.reset) {
    run.generation = news.generation;
    await reload([run]);
  } else if (fresh) {
    append(run, news);
    if (run.steps.length > 2 * POINTS || !appendHeat(run, news.heat)) await reload([run]);
  }
  run.changes = news.changes;
  if (news.summary) run.summary = news.summary;
  return { curves: news.reset || fresh, summary: Boolean(news.summary) };
}

/** Put new steps behind the others; a reload between question and answer may have brought some of them. */
function append(run, news) {
  const held = run.steps.at(-1) ?? -1;
  const known = news.steps.filter((step) => step <= held).length;
  run.steps.push(...news.steps.slice(known));
  for (const [name, values] of Object.entries(news.columns)) run.columns[name].push(...values.slice(known));
  run.newest = Math.max(run.newest ?? -1, news.steps.at(-1));
}

/** Whether the new columns could be put beside the others. */
function appendHeat(run, fresh) {
  if (run.id !== page.focus) return true;
  const { heat } = run;
  if (!heat || heat.layers.join() !== fresh.layers.join() || heat.bounds.length > 2 * COLUMNS) return false;
  const end = heat.bounds.at(-1) ?? 0;
  const known = fresh.bounds.slice(0, -1).filter((bound) => bound < end).length;
  if (known === fresh.bounds.length - 1) return true;
  heat.bounds.pop();
  heat.bounds.push(...fresh.bounds.slice(known));
  heat.rows.forEach((row, i) => row.push(...fresh.rows[i].slice(known)));
  return true;
}

async function poll() {
  try {
    const found = await Promise.all(page.runs.map(look));
    if (!page.answered) notice("");
    page.answered = true;
    if (found.some((f) => f.summary)) showSummary();
    if (found.some((f) => f.curves)) showCurves();
    showAges();
  } catch (error) {
    page.answered = false;
    notice(`the monitor does not answer (${error.message}); asking again`);
  }
  setTimeout(poll, document.hidden ? 5 * POLL : POLL);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// -- what is in view --------------------------------------------------------------------------------------------------

const focused = () => page.runs[page.focus];
const visible = () => page.runs.filter((run) => run.visible);

function view() {
  const newest = Math.max(1, ...visible().map((run) => run.newest ?? 0));
  const z = page.zoomed;
  if (!z) return [0, newest];
  return z.last ? [Math.max(0, newest - z.last), newest] : [z.from, z.to];
}

function marks() {
  const { summary } = focused();
  if (!summary) return [];
  const unlocks = summary.unlocks.map(([step, layers]) => ({
    step,
    level: "unlock",
    short: `${layers.replace(" and ", ", ")} open`,
    text: `step ${step}: layers ${layers} open`,
  }));
  const troubles = summary.events
    .filter((e) => e.step !== null && (e.level === "warning" || e.level === "error"))
    .map((e) => ({ step: e.step, level: e.level, text: `step ${e.step}: ${e.text}` }));
  return [...unlocks, ...troubles];
}

async function zoom(range) {
  page.zoomed = range && range.to !== undefined && range.to - range.from < 1 ? page.zoomed : range;
  showRange();
  try {
    await reload();
  } catch (error) {
    notice(error.message);
  }
  showCurves();
}

const charts = {};

function buildCharts() {
  const hooks = {
    view,
    zoom,
    marks,
    said: (mark) => {
      $("mark").textContent = mark ? mark.text : "";
    },
  };
  const curves = (id, spec) => {
    charts[id] = new Curves($(id), { height: 190, ...spec }, hooks);
  };
  curves("loss", {
    height: 300,
    marks: true,
    format: amount,
    columns: [
      { name: "loss", label: "training", index: 0, smooth: true },
      { name: "val_loss", label: "held-out", index: 1, points: true, dash: [6, 3] },
    ],
  });
  curves("agreement", {
    format: (v) => amount(v, 3),
    columns: [
      { name: "agreement", label: "votes", index: 0 },
      { name: "agreement_control", label: "shuffled votes", index: 1, dash: [4, 3] },
    ],
  });
  curves("throughput", {
    floor: 0,
    format: (v) => amount(v, 4),
    columns: [{ name: "tokens_per_s", label: "tokens/s", index: 0 }],
  });
  curves("memory", {
    floor: 0,
    format: (v) => amount(v, 3),
    ceiling: () => 0,
    columns: [{ name: "mem_peak_bytes", label: "GB", index: 0, scale: 1e-9 }],
  });
  curves("lr", { floor: 0, format: (v) => amount(v, 3), columns: [{ name: "lr", label: "rate", index: 0 }] });
  charts.heat = new Heat($("heat"), hooks, showCell);
  page.charts = charts;
}

function showCurves() {
  const runs = visible().map((run) => ({ name: run.short, index: run.id, ...fromTheStart(run) }));
  for (const [id, chart] of Object.entries(charts)) if (id !== "heat") chart.update(runs);
  charts.heat.update(focused().heat);
  showScale();
}

/** Steps and columns, and in front of them the evaluation before the first step, which no step's line has. */
function fromTheStart(run) {
  const { steps, columns } = run;
  const first = run.summary ? run.summary.first_val_loss : null;
  if (first === null || page.zoomed || !steps.length || steps[0] < 1) return { steps, columns };
  const longer = Object.entries(columns).map(([name, values]) => [
    name,
    [name === "val_loss" ? first : null, ...values],
  ]);
  return { steps: [0, ...steps], columns: Object.fromEntries(longer) };
}

function showCell(cell) {
  const { format } = QUANTITIES[page.quantity];
  const steps = !cell ? "" : cell.from === cell.to ? `step ${cell.from}` : `steps ${cell.from} to ${cell.to}`;
  const name = !cell ? "" : cell.layer === "head" ? "head" : `layer ${cell.layer}`;
  $("cell").textContent = cell ? `${name}, ${steps}: ${cell.value === null ? "locked" : format(cell.value)}` : "";
}

function showScale() {
  const { unit, format } = QUANTITIES[page.quantity];
  const { heat } = focused();
  const limits = heat ? heatRange(heat.rows) : null;
  $("scale").replaceChildren();
  if (!limits) return;
  const canvas = make("canvas", { width: 160, height: 1 });
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 160; x += 1) {
    pen.fillStyle = viridis(x / 159);
    pen.fillRect(x, 0, 1, 1);
  }
  $("scale").append(
    make("span", { textContent: format(limits[0], 2) }),
    canvas,
    make("span", { textContent: format(limits[1], 2) }),
    make("span", { textContent: unit }),
    make("span", { className: "swatch" }),
    make("span", { textContent: "locked" }),
  );
}

// -- panels -----------------------------------------------------------------------------------------------------------

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  const s = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function clock(timestamp) {
  if (timestamp === null) return "";
  const then = new Date(timestamp * 1000);
  const today = then.toDateString() === new Date().toDateString();
  const time = then.toLocaleTimeString("en-GB");
  return today ? time : `${then.getMonth() + 1}-${then.getDate()} ${time.slice(0, 5)}`;
}

const gigabytes = (bytes) => (bytes === null ? "-" : `${(bytes / 1e9).toFixed(2)} GB`);
const layerName = (name) => (name === "head" ? "head" : name);

function showRuns() {
  $("runs").replaceChildren(
    ...page.runs.map((run) => {
      const state = run.summary ? run.summary.state : run.state;
      const dot = make("span", { className: "dot" });
      dot.style.borderColor = colour(run.id);
      dot.style.background = run.visible ? colour(run.id) : "transparent";
      const toggle = make("button", { className: "toggle", type: "button", title: "show or hide its curves" }, dot);
      toggle.setAttribute("aria-pressed", run.visible);
      toggle.addEventListener("click", () => {
        run.visible = !run.visible || visible().length === 1;
        showRuns();
        showCurves();
      });
      const name = make(
        "button",
        { className: "name", type: "button", title: run.folder },
        `${run.short} `,
        make("span", { className: `state is-${state}`, textContent: state }),
      );
      name.addEventListener("click", () => focus(run.id));
      const chip = make("span", { className: run.id === page.focus ? "run focus" : "run" });
      if (page.runs.length > 1) chip.append(toggle);
      chip.append(name);
      return chip;
    }),
  );
}

async function focus(id) {
  page.focus = id;
  page.sampleStep = null;
  focused().visible = true;
  await loadHeat(focused());
  showSummary();
  showCurves();
}

function showSummary() {
  const s = focused().summary;
  showRuns();
  if (!s) return;
  document.title = `${s.name}: ${s.state}${s.steps ? ` ${Math.floor((100 * s.step) / s.steps)} %` : ""}`;
  if (page.answered) {
    notice(
      s.reading > 0 ? `reading a long history: ${percent(s.reading, 2)} left; the curves are a glance until then` : "",
    );
  }
  showNow(s);
  showTiles(s);
  showLayers(s);
  showEvents(s);
  showScores(s);
  showSampleSteps(s);
  $("settings").replaceChildren(
    ...s.settings.map(([name, value]) => make("span", { textContent: `${name} ${value}` })),
  );
}

function showNow(s) {
  const next =
    s.next_step === null
      ? ""
      : ` · next: ${s.next_layers.length ? `${s.next_layers.join(", ")} open` : "change"} ` +
        `at step ${s.next_step.toLocaleString("en-US")}${s.next_eta ? `, in ${duration(s.next_eta)}` : ""}`;
  const bar = make("progress", { max: s.steps || 1, value: s.steps ? Math.min(s.step, s.steps) : 0 });
  bar.setAttribute("aria-label", "steps done");
  const state = make("span", { className: `is-${s.state}` }, make("span", { className: "pulse" }), s.state);
  const how = make("span", { className: "detail", id: "how", textContent: s.state === "running" ? "" : `: ${s.how}` });
  $("now").replaceChildren(
    make(
      "div",
      {},
      make("div", { className: "phase", textContent: s.phase || s.state }),
      make("div", { className: "detail", textContent: s.phase ? `${s.phase_detail}${next}` : s.how }),
    ),
    make(
      "div",
      {},
      bar,
      make(
        "div",
        { className: "steps" },
        make("span", {
          textContent: `step ${s.step.toLocaleString("en-US")}${s.steps ? ` of ${s.steps.toLocaleString("en-US")}` : ""}`,
        }),
        make("span", { textContent: s.pace === null ? "" : `${amount(s.pace, 3)} s a step` }),
      ),
    ),
    make(
      "div",
      { className: "when" },
      make("div", {}, state, how),
      make("div", {
        textContent: s.eta === null ? "" : `${duration(s.eta)} left, ends ${clock(Date.now() / 1000 + s.eta)}`,
      }),
      make("div", { id: "age" }),
    ),
  );
  showAges();
}

function showAges() {
  const s = focused().summary;
  if (!s || !$("age")) return;
  const parts = s.updated === null ? [] : [`last line ${duration(Date.now() / 1000 - s.updated)} ago`];
  if (s.saved_step !== null) parts.push(`saved at step ${s.saved_step}`);
  $("age").textContent = parts.join(" · ");
}

function showTiles(s) {
  const tile = (label, value, note) =>
    make(
      "div",
      { className: "tile" },
      make("div", { className: "label", textContent: label }),
      make("div", { className: "value", textContent: value }),
      make("div", { className: "note", textContent: note, title: note }),
    );
  const trend =
    s.trend === null ? "mean of 20 steps" : `${s.trend < 0 ? "▼" : "▲"} ${Math.abs(s.trend).toFixed(3)} in 100 steps`;
  $("tiles").replaceChildren(
    tile("training loss", s.loss === null ? "-" : s.loss.toFixed(4), trend),
    tile(
      "held-out loss",
      s.val_loss === null ? "-" : s.val_loss.toFixed(4),
      s.best === null ? "" : `best ${s.best.toFixed(4)} at step ${s.best_step}`,
    ),
    tile("flip rate", percent(s.flip_rate), s.flips === null ? "" : `${s.flips.toLocaleString("en-US")} weights`),
    tile(
      "agreement",
      s.agreement === null ? "-" : s.agreement.toFixed(3),
      s.control === null ? "" : `shuffled votes ${s.control.toFixed(3)}`,
    ),
    tile(
      "tokens a second",
      amount(s.tokens_per_s, 4),
      s.waiting === null
        ? s.pace === null
          ? ""
          : `${amount(s.pace, 3)} s a step`
        : `${percent(s.waiting, 2)} waiting for data`,
    ),
    tile(
      "peak memory",
      gigabytes(s.memory),
      s.memory && s.memory_total ? `${percent(s.memory / s.memory_total, 2)} of ${gigabytes(s.memory_total)}` : "",
    ),
    tile(
      "tokens seen",
      s.tokens === null ? "-" : s.tokens.toLocaleString("en-US"),
      s.data || (s.rate === null ? "" : `learning rate ${s.rate.toExponential(2)}`),
    ),
  );
  $("card").textContent = s.memory_total ? `GB at most, of ${(s.memory_total / 1e9).toFixed(1)}` : "GB at most";
}

function showLayers(s) {
  $("phase").textContent = s.phase_detail;
  const loudest = Math.max(1e-12, ...s.layers.map((layer) => layer.pressure ?? 0));
  const head = make(
    "tr",
    {},
    ...["layer", "flip rate", "movement", "vote pressure", "agrees"].map((t) => make("th", { textContent: t })),
  );
  const rows = s.layers.map((layer) => {
    const row = make("tr", { className: layer.state });
    row.dataset.layer = layer.name;
    row.append(
      make("td", { title: LAYER_WORDS[layer.state] }, make("span", { className: "glyph" }), layerName(layer.name)),
    );
    if (layer.state === "locked") {
      const when =
        layer.opens_at === null ? "locked" : `locked, opens at step ${layer.opens_at.toLocaleString("en-US")}`;
      row.append(make("td", { colSpan: 4, className: "state-cell", textContent: when }));
      return row;
    }
    const meter = make("meter", { min: 0, max: loudest, value: layer.pressure ?? 0, title: percent(layer.pressure) });
    row.append(
      make("td", { textContent: percent(layer.flip_rate) }),
      make("td", { textContent: QUANTITIES.movement.format(layer.movement) }),
      make("td", {}, `${percent(layer.pressure, 2)} `, meter),
      make("td", { textContent: layer.agreement === null ? "-" : layer.agreement.toFixed(2) }),
    );
    if (layer.heat !== null) row.title = `braked by the governor: rate x ${layer.heat.toFixed(2)}`;
    return row;
  });
  $("layers").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function showEvents(s) {
  $("events").replaceChildren(
    ...[...s.events]
      .reverse()
      .map((e) =>
        make(
          "li",
          {},
          make("time", { textContent: clock(e.timestamp) }),
          make("span", { className: "at", textContent: e.step === null ? "" : `step ${e.step}` }),
          make("span", { className: `level-${e.level}`, textContent: e.text }),
        ),
      ),
  );
}

function showScores(s) {
  const { names, rows } = s.scores;
  $("score-panel").hidden = !rows.length;
  $("samples").closest("section").style.gridColumn = rows.length ? "" : "1 / -1";
  if (!rows.length) return;
  const head = make("tr", {}, ...["checkpoint", ...names].map((t) => make("th", { textContent: t })));
  const body = rows.map(([step, cells]) =>
    make(
      "tr",
      {},
      make("td", { textContent: step === null ? "-" : `step ${step.toLocaleString("en-US")}` }),
      ...cells.map((cell) => make("td", { textContent: cell })),
    ),
  );
  $("scores").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function segments(element, names, chosen, choose) {
  element.replaceChildren(
    ...names.map(([value, text]) => {
      const button = make("button", { type: "button", textContent: text });
      button.setAttribute("aria-pressed", value === chosen);
      button.addEventListener("click", () => choose(value));
      return button;
    }),
  );
}

function showRange() {
  const names = Object.keys(RANGES).map((name) => [name, name]);
  const z = page.zoomed;
  const chosen = !z ? "all" : z.last ? Object.keys(RANGES).find((n) => RANGES[n] === z.last) : "zoom";
  if (chosen === "zoom") names.push(["zoom", `${z.from} to ${z.to}`]);
  segments($("range"), names, chosen, (name) => {
    if (name !== "zoom") zoom(RANGES[name] ? { last: RANGES[name] } : null);
  });
}

function showQuantity() {
  segments(
    $("quantity"),
    Object.entries(QUANTITIES).map(([key, q]) => [key, q.name]),
    page.quantity,
    async (key) => {
      page.quantity = key;
      showQuantity();
      await loadHeat(focused());
      showCurves();
    },
  );
}

function showSampleSteps(s) {
  const steps = s.sample_steps;
  const chosen = page.sampleStep ?? steps[steps.length - 1];
  const near = steps.length > 12 ? steps.filter((x, i) => i >= steps.length - 11 || i === 0 || x === chosen) : steps;
  segments(
    $("sample-steps"),
    near.map((x) => [x, x.toLocaleString("en-US")]),
    chosen,
    (x) => {
      page.sampleStep = x;
      showSampleSteps(s);
    },
  );
  if (steps.length) loadSamples(chosen);
  else $("samples").replaceChildren(make("p", { className: "empty", textContent: "none yet" }));
}

async function loadSamples(step) {
  const answer = await ask("samples", { run: page.focus, step });
  const part = (title, text) => make("div", {}, make("h3", { textContent: title }), make("pre", { textContent: text }));
  $("samples").replaceChildren(
    ...answer.samples.map((s) =>
      make(
        "div",
        { className: "sample" },
        part("prompt", s.prompt),
        part(`what the model writes, step ${answer.step}`, s.text),
        part("reference", s.reference),
      ),
    ),
  );
}

// -- light and dark ---------------------------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const wish = localStorage.getItem("theme") || "system";
  const dark = wish === "dark" || (wish === "system" && systemDark.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = `theme: ${wish}`;
  if (page.runs.length) {
    showSummary();
    showCurves();
  }
}

// -- begin ------------------------------------------------------------------------------------------------------------

async function begin() {
  applyTheme();
  systemDark.addEventListener("change", applyTheme);
  $("theme").addEventListener("click", () => {
    const wish = localStorage.getItem("theme") || "system";
    localStorage.setItem("theme", THEMES[(THEMES.indexOf(wish) + 1) % THEMES.length]);
    applyTheme();
  });
  buildCharts();
  showRange();
  showQuantity();
  let waiting = null;
  new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => Object.values(charts).forEach((chart) => chart.resize()), 100);
  }).observe(document.querySelector("main"));
  await findRuns();
  await poll();
  document.documentElement.dataset.ready = "true";
}

async function findRuns() {
  for (;;) {
    try {
      const { runs } = await ask("runs", {});
      // Runs of one model are told apart by their folders.
      const names = runs.map((run) => run.name);
      page.runs = runs.map((run) => ({
        ...run,
        visible: true,
        generation: -1,
        changes: -1,
        newest: null,
        steps: [],
        columns: {},
        heat: null,
        summary: null,
        short: names.filter((n) => n === run.name).length > 1 ? run.folder.split("/").filter(Boolean).pop() : run.name,
      }));
      return;
    } catch (error) {
      notice(`the monitor does not answer (${error.message}); asking again`);
      await new Promise((done) => {
        setTimeout(done, POLL);
      });
    }
  }
}

begin();
