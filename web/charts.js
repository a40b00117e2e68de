// Curves and the heat map, drawn by uPlot. All share one range of steps, one cursor and one width of the left axis, so
// that what happened in a step stands in one vertical line. Nothing here asks the server.

/* global uPlot */

const AXIS = 58;
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#00795a", "#a2508a", "#8a6d00", "#4a4a4a"],
  dark: ["#56b4e9", "#ff9d5c", "#3ecf9f", "#e39bc8", "#f0e442", "#c9d0d9"],
};
// Viridis, by nine of its colours; between them straight lines.
const VIRIDIS = ["440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "fde725"].map((hex) =>
  [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)),
);

export const isDark = () => document.documentElement.dataset.theme === "dark";
export const colour = (index) => PALETTES[isDark() ? "dark" : "light"][index % 6];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mix = VIRIDIS[i].map((a, k) => Math.round(a + (VIRIDIS[i + 1][k] - a) * (place - i)));
  return `rgb(${mix.join(",")})`;
}

export function amount(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(Math.max(0, digits - 2));
  return String(Number(value.toPrecision(digits)));
}
export const percent = (value, digits = 3) =>
  value === null || value === undefined ? "-" : `${Number((100 * value).toPrecision(digits))} %`;

// -- curves ---------------------------------------------------------------------------------------------------------

/** Exponential mean over steps; half of it is younger than about a fortieth of what is shown. */
function smooth(steps, values) {
  if (steps.length < 3) return values.slice();
  const reach = Math.max(1, (steps[steps.length - 1] - steps[0]) / 60);
  let mean = null;
  let before = 0;
  return values.map((v, i) => {
    if (v === null) return null;
    mean = mean === null ? v : mean + (1 - Math.exp(-(steps[i] - before) / reach)) * (v - mean);
    before = steps[i];
    return mean;
  });
}

function axes(format) {
  const common = {
    stroke: css("--soft"),
    font: "11px system-ui, 'DejaVu Sans', sans-serif",
    grid: { stroke: css("--grid"), width: 1 },
    ticks: { stroke: css("--line"), width: 1, size: 4 },
  };
  return [
    {
      ...common,
      size: 34,
      space: 60,
      label: "step",
      labelSize: 14,
      labelFont: "11px system-ui, sans-serif",
      labelGap: -4,
      values: (u, splits) => splits.map((v) => (Number.isInteger(v) ? v.toLocaleString("en-US") : "")),
    },
    { ...common, size: AXIS, space: 28, values: (u, splits) => splits.map((v) => format(v)) },
  ];
}

function base(element, height, page) {
  return {
    width: Math.max(240, element.clientWidth),
    height,
    padding: [10, 14, 0, 0],
    cursor: {
      sync: { key: "steps", scales: ["x", null] },
      drag: { x: true, y: false, setScale: false, dist: 8 },
      focus: { prox: 24 },
      points: { size: 6 },
      bind: { dblclick: () => () => page.zoom(null) },
    },
    hooks: {
      setSelect: [
        (u) => {
          if (u.select.width < 2) return;
          const [from, to] = [u.select.left, u.select.left + u.select.width].map((x) => u.posToVal(x, "x"));
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          // A cursor that is synchronised selects in all charts: only the one under the pointer may speak.
          if (u.root.matches(":hover")) page.zoom({ from: Math.floor(from), to: Math.ceil(to) });
        },
      ],
    },
  };
}

/** Vertical lines at unlocks, and signs at what went wrong. */
function drawMarks(u, marks, labels) {
  const { ctx, bbox } = u;
  const dpr = devicePixelRatio || 1;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top - 10 * dpr, bbox.width, bbox.height + 10 * dpr);
  ctx.clip();
  ctx.font = `${10 * dpr}px system-ui, 'DejaVu Sans', sans-serif`;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  let free = -Infinity;
  for (const mark of marks) {
    const x = Math.round(u.valToPos(mark.step, "x", true)) + 0.5;
    if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
    ctx.strokeStyle = ctx.fillStyle = css(
      mark.level === "unlock" ? "--mark" : mark.level === "error" ? "--bad" : "--warn",
    );
    ctx.lineWidth = dpr;
    ctx.setLineDash(mark.level === "unlock" ? [3 * dpr, 3 * dpr] : []);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    if (mark.level !== "unlock") {
      ctx.beginPath();
      ctx.moveTo(x - 5 * dpr, bbox.top);
      ctx.lineTo(x + 5 * dpr, bbox.top);
      ctx.lineTo(x, bbox.top + 8 * dpr);
      ctx.fill();
    } else if (labels && x > free) {
      const text = mark.short;
      const width = ctx.measureText(text).width;
      if (x + width + 6 * dpr < bbox.left + bbox.width) {
        ctx.fillText(text, x + 4 * dpr, bbox.top + 2 * dpr);
        free = x + width + 10 * dpr;
      }
    }
  }
  ctx.restore();
}

/** What both kinds of charts share: a place on the page, and building anew where `key` changes. */
class Chart {
  constructor(element, page) {
    Object.assign(this, { element, page, chart: null, key: "" });
  }

  resize() {
    if (this.chart) this.chart.setSize({ width: Math.max(240, this.element.clientWidth), height: this.height() });
  }

  clear(text) {
    if (this.chart) this.chart.destroy();
    this.chart = null;
    this.key = "";
    this.element.replaceChildren();
    if (text)
      this.element.append(Object.assign(document.createElement("p"), { className: "empty", textContent: text }));
  }
}

/**
 * A chart of curves of several runs.
 * spec: columns [{name, label, dash, points, smooth, index}], format, height, marks (bool), floor (lowest y shown).
 * page: view() -> [from, to], zoom(range or null), marks() -> marks, said(mark) when the cursor is near one.
 */
export class Curves extends Chart {
  constructor(element, spec, page) {
    super(element, page);
    this.spec = spec;
  }

  height() {
    return this.spec.height;
  }

  /** runs: [{name, index, steps, columns}]; builds anew where runs, theme or place have changed. */
  update(runs) {
    const shown = [];
    const tables = [];
    for (const run of runs) {
      const table = [run.steps];
      for (const column of this.spec.columns) {
        const values = (run.columns[column.name] || []).map((v) =>
          v === null || !column.scale ? v : v * column.scale,
        );
        if (!values.some((v) => v !== null)) continue;
        const of = runs.length > 1 ? `${run.name} ` : "";
        const tint = runs.length > 1 ? colour(run.index) : colour(column.index);
        if (column.smooth) {
          shown.push({ ...column, label: `${of}${column.label}`, tint, faint: true });
          table.push(values);
          shown.push({ ...column, label: `${of}smoothed`, tint });
          table.push(smooth(run.steps, values));
        } else {
          shown.push({ ...column, label: `${of}${column.label}`, tint });
          table.push(values);
        }
      }
      if (table.length > 1) tables.push(table);
    }
    if (!tables.length) {
      this.clear("no data yet");
      return;
    }
    // 0: an absent value is no gap; 1: it is.
    const modes = [];
    let at = 0;
    for (const table of tables) modes.push([0, ...table.slice(1).map(() => (shown[at++].points ? 0 : 1))]);
    const data = tables.length > 1 || modes[0].includes(0, 1) ? uPlot.join(tables, modes) : tables[0];
    const key = JSON.stringify([shown.map((s) => [s.label, s.tint, s.dash]), isDark()]);
    if (key === this.key && this.chart) {
      this.chart.setData(data);
      return;
    }
    this.clear();
    this.key = key;
    this.build(shown, data);
  }

  build(shown, data) {
    const { spec, page, element } = this;
    const options = base(element, spec.height, page);
    options.scales = {
      x: { time: false, range: () => page.view() },
      y: { range: (u, low, high) => this.range(low, high) },
    };
    options.axes = axes(spec.format);
    options.legend = { live: true };
    options.series = [{ label: "step", value: (u, v) => (v === null ? "-" : v.toLocaleString("en-US")) }];
    for (const s of shown) {
      options.series.push({
        label: s.label,
        stroke: s.faint ? `${s.tint}59` : s.tint,
        width: s.faint ? 1 : 2,
        dash: s.dash,
        spanGaps: Boolean(s.points),
        points: { show: Boolean(s.points), size: 6, fill: css("--panel") },
        value: (u, v) => (v === null || v === undefined ? "-" : spec.format(v, 5)),
      });
    }
    if (spec.marks) options.hooks.drawAxes = [(u) => drawMarks(u, page.marks(), true)];
    if (spec.marks) {
      options.hooks.setCursor = [
        (u) => {
          const marks = page.marks().map((m) => ({ ...m, far: Math.abs(u.valToPos(m.step, "x") - u.cursor.left) }));
          const near = marks.filter((m) => m.far < 8).sort((a, b) => a.far - b.far)[0];
          page.said(u.cursor.left >= 0 && near ? near : null);
        },
      ];
    }
    this.chart = new uPlot(options, data, element);
  }

  range(low, high) {
    const { floor, ceiling } = this.spec;
    if (low === null) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [
      floor === undefined ? low - room : Math.min(floor, low),
      Math.max(high + room, ceiling ? ceiling() : -Infinity),
    ];
  }
}

// -- heat map -------------------------------------------------------------------------------------------------------

/** Lowest and highest number of a heat map, without the outermost hundredth on either side. */
export function heatRange(rows) {
  const known = rows
    .flat()
    .filter((v) => v !== null)
    .sort((a, b) => a - b);
  if (!known.length) return null;
  const at = (share) => known[Math.round(share * (known.length - 1))];
  const [low, high] = [at(0.01), at(0.99)];
  return high > low ? [low, high] : [low - Math.abs(low) * 0.01 - 1e-9, high + Math.abs(high) * 0.01 + 1e-9];
}

/** A quantity by layer (down) and step (across); the head on top, locked cells hatched. */
export class Heat extends Chart {
  constructor(element, page, said) {
    super(element, page);
    Object.assign(this, { said, heat: null, limits: null });
  }

  height() {
    const count = this.heat.layers.length;
    return Math.min(470, Math.max(count * 15, Math.min(count * 30, 232)) + 48);
  }

  /** heat: {bounds, layers, rows}, as the server sends it. */
  update(heat) {
    this.heat = heat;
    this.limits = heat ? heatRange(heat.rows) : null;
    if (!heat || !heat.layers.length || heat.bounds.length < 2) {
      this.clear("no data yet");
      return;
    }
    const data = [heat.bounds, heat.bounds.map(() => null)];
    const key = JSON.stringify([heat.layers, isDark()]);
    if (key === this.key) {
      this.chart.setData(data);
      return;
    }
    this.clear();
    this.key = key;
    const count = heat.layers.length;
    const options = base(this.element, this.height(), this.page);
    options.legend = { show: false };
    options.cursor.points = { show: false };
    options.scales = { x: { time: false, range: () => this.page.view() }, y: { range: () => [0, count] } };
    options.axes = axes((v) => v);
    const every = Math.ceil((count * 13) / (this.height() - 48));
    const named = heat.layers
      .map((name, i) => [count - i - 0.5, name === "head" ? "head" : `layer ${name}`])
      .filter((pair, i) => i % every === 0);
    options.axes[0].grid = { show: false };
    Object.assign(options.axes[1], {
      grid: { show: false },
      ticks: { show: false },
      gap: 4,
      splits: () => named.map((pair) => pair[0]),
      values: () => named.map((pair) => pair[1]),
    });
    options.series = [{}, { stroke: "transparent" }];
    options.hooks.drawClear = [(u) => this.draw(u)];
    options.hooks.setCursor = [(u) => this.hover(u)];
    this.chart = new uPlot(options, data, this.element);
  }

  share(value) {
    return (value - this.limits[0]) / (this.limits[1] - this.limits[0]);
  }

  draw(u) {
    const { bounds, rows } = this.heat;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    const edges = bounds.map((step) => Math.round(u.valToPos(step - 0.5, "x", true)));
    const hatch = hatching(ctx);
    rows.forEach((row, i) => {
      const top = Math.round(bbox.top + (bbox.height * i) / rows.length);
      const bottom = Math.round(bbox.top + (bbox.height * (i + 1)) / rows.length) - (rows.length < 40 ? 1 : 0);
      row.forEach((value, k) => {
        ctx.fillStyle = value === null ? hatch : viridis(this.share(value));
        ctx.fillRect(edges[k], top, Math.max(1, edges[k + 1] - edges[k]), bottom - top);
      });
    });
    drawMarks(
      u,
      this.page.marks().filter((m) => m.level === "unlock"),
      false,
    );
    ctx.restore();
  }

  hover(u) {
    const { left, top } = u.cursor;
    if (left < 0 || top < 0 || !this.heat || !u.root.matches(":hover")) return this.said(null);
    const step = u.posToVal(left, "x");
    const { bounds, layers, rows } = this.heat;
    const i = Math.min(layers.length - 1, Math.floor((top / u.over.clientHeight) * layers.length));
    const k = bounds.findIndex((b, n) => n + 1 < bounds.length && step >= b - 0.5 && step < bounds[n + 1] - 0.5);
    if (k < 0) return this.said(null);
    return this.said({ layer: layers[i], from: bounds[k], to: bounds[k + 1] - 1, value: rows[i][k] });
  }
}

function hatching(ctx) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.fillStyle = css("--locked");
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = css("--locked-line");
  pen.beginPath();
  for (const shift of [-8, 0, 8]) {
    pen.moveTo(shift, 8);
    pen.lineTo(shift + 8, 0);
  }
  pen.stroke();
  return ctx.createPattern(tile, "repeat");
}
