// The canvas in three dimensions: colours, projection, boxes, axes, what lies under the pointer; and its clocks.

// -- colours ----------------------------------------------------------------------------------------------------------

const badge = (r, what) => (regions.badges[r].find((b) => b[0] === what) || [])[1];
const KINDS = {
  region: (r) => regions.name[r],
  family: (r) => badge(r, "family") || "no program",
  "end of the name": (r) =>
    regions.name[r]
      .split(".")
      .pop()
      .replace(/\[\d+\]|\d+$/g, ""),
  "start of the name": (r) => regions.name[r].split(/[.[\d]/)[0],
  period: (r) => `period ${regions.period[r]}`,
};

function colourBy(kind) {
  const counts = new Map();
  const names = boxes.map((_, r) => KINDS[kind](r));
  names.forEach((name) => counts.set(name, (counts.get(name) || 0) + 1));
  // the largest get colours, in the order in which they are declared
  const large = [...counts]
    .sort((a, b) => b[1] - a[1])
    .slice(0, PALETTE.length)
    .map(([name]) => name);
  const shown = [...counts.keys()].filter((name) => large.includes(name));
  const colour = new Map(shown.map((name, i) => [name, PALETTE[i]]));
  state.colours = names.map((name) => colour.get(name) || OTHER);
  state.legend = shown.map((name) => [colour.get(name), name]);
  if (counts.size > shown.length) state.legend.push([OTHER, `${counts.size - shown.length} more`]);
}

const shades = new Map();
/** The colour of a face: top, side and front are lit differently. */
function shade(colour, light, alpha) {
  const key = `${colour}${light}/${alpha}`;
  if (!shades.has(key)) {
    const rgb = [1, 3, 5].map((at) => Math.round(Math.min(255, parseInt(colour.slice(at, at + 2), 16) * light)));
    shades.set(key, `rgba(${rgb},${alpha})`);
  }
  return shades.get(key);
}

// -- the scene --------------------------------------------------------------------------------------------------------

/** Units of a cell along (t, row, column): cells are square, frames as long as lets time be seen. */
const side = Math.max(ROWS, COLUMNS);
const UNIT = [
  Math.min(0.2 * side, Math.min(1.3 * side, Math.max(0.6 * side, T)) / T),
  ROWS === 1 ? Math.max(1, 0.12 * side) : 1,
  COLUMNS === 1 ? Math.max(1, 0.12 * side) : 1,
];
const EXTENT = SIZE.map((n, axis) => n * UNIT[axis]);

/** The three rows of the rotation over (t, row, column) units: right, down, away from the viewer. */
function rotation(yaw, pitch) {
  const [c, s, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  return [
    [s, 0, c],
    [-c * sp, cp, s * sp],
    [c * cp, sp, -s * cp],
  ];
}

/** A canvas at the screen's resolution, with its context and size in CSS pixels. */
function sized(canvas, width = canvas.clientWidth, height = canvas.clientHeight) {
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** The projection of cells to pixels, for a scene of this size. */
function camera(width, height) {
  const reach = rotation(0.62, 0.5).map((row) => row.reduce((sum, x, axis) => sum + Math.abs(x) * EXTENT[axis], 0));
  const scale = state.zoom * Math.min(Math.max(width - 200, width / 2) / reach[0], (height - 100) / reach[1]);
  const turn = rotation(state.yaw, state.pitch);
  const axes = [0, 1, 2].map((axis) => turn.map((row) => row[axis] * UNIT[axis] * scale));
  const origin = [0, 1, 2].map((k) => -axes.reduce((sum, a, axis) => sum + (a[k] * SIZE[axis]) / 2, 0));
  origin[0] += width / 2 + state.move[0];
  origin[1] += height / 2 + state.move[1];
  const project = (t, h, w) => [0, 1, 2].map((k) => origin[k] + t * axes[0][k] + h * axes[1][k] + w * axes[2][k]);
  return { axes, origin, project, scale };
}

const LIGHT = [0.82, 1.12, 0.97];

/** Draws the three faces of a box that look at the viewer; those that are thinner than a pixel are left out. */
function drawBox(context, box, colour, alpha, outline, dashed, faces = [0, 1, 2]) {
  const { axes, origin } = view;
  for (const axis of faces) {
    const u = (axis + 1) % 3,
      v = (axis + 2) % 3;
    const near = axes[axis][2] > 0 ? box[2 * axis] : box[2 * axis + 1];
    const ux = (box[2 * u + 1] - box[2 * u]) * axes[u][0],
      uy = (box[2 * u + 1] - box[2 * u]) * axes[u][1];
    const vx = (box[2 * v + 1] - box[2 * v]) * axes[v][0],
      vy = (box[2 * v + 1] - box[2 * v]) * axes[v][1];
    if (Math.abs(ux * vy - uy * vx) < 0.4) continue;
    const x = origin[0] + near * axes[axis][0] + box[2 * u] * axes[u][0] + box[2 * v] * axes[v][0];
    const y = origin[1] + near * axes[axis][1] + box[2 * u] * axes[u][1] + box[2 * v] * axes[v][1];
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x + ux, y + uy);
    context.lineTo(x + ux + vx, y + uy + vy);
    context.lineTo(x + vx, y + vy);
    context.closePath();
    context.fillStyle = shade(colour, LIGHT[axis], alpha);
    context.fill();
    if (outline) {
      if (dashed) context.setLineDash([3, 3]);
      context.strokeStyle = outline;
      context.stroke();
      if (dashed) context.setLineDash([]);
    }
  }
}

/** Farther first. */
function byDepth(items, { axes, origin }) {
  for (const item of items)
    item.depth = [0, 1, 2].reduce(
      (sum, axis) => sum + (item.box[2 * axis] + item.box[2 * axis + 1]) * axes[axis][2],
      0,
    );
  return items.sort((a, b) => b.depth - a.depth);
}

let view = null,
  drawn = "";
const backdrop = document.createElement("canvas");

function drawScene() {
  const { context, width, height } = sized($("scene"));
  view = camera(width, height);
  const chosen = focus(),
    items = visible();
  // what lies behind the focus stays the same while the pointer moves
  const key = JSON.stringify([view, state.time, state.words, state.turning, $("colour").value, !chosen, width, height]);
  if (key !== drawn) drawBackdrop(width, height, items, !chosen);
  drawn = key;
  context.drawImage(backdrop, 0, 0, width, height);
  if (chosen) drawFocus(context, chosen);
  drawLabels(context, chosen, items);
  drawGrid(context, true);
}

/** Regions that have a frame now and are looked for, if they are larger than half a pixel: {r, box, ticks}. */
function visible() {
  const items = [];
  for (let r = 0; r < N; r++) {
    const at = state.time === null ? { ticks: true } : frameAt(r);
    if (!at || (state.matching && !state.matching[r])) continue;
    const box = boxNow(r);
    let reach = 0;
    for (let axis = 0; axis < 3; axis++)
      reach += (Math.abs(view.axes[axis][0]) + Math.abs(view.axes[axis][1])) * (box[2 * axis + 1] - box[2 * axis]);
    if (reach > 0.5) items.push({ r, box, ticks: at.ticks });
  }
  return items;
}

function drawBackdrop(width, height, items, coloured) {
  const { context } = sized(backdrop, width, height);
  context.lineWidth = 0.8;
  drawGrid(context, false);
  const outlined = items.length <= MAX_OUTLINED;
  // while many boxes turn, one face of each has to do
  const faces = state.turning && !outlined ? largestFaces() : [0, 1, 2];
  for (const { r, box, ticks } of byDepth(items, view)) {
    if (!coloured) drawBox(context, box, OTHER, 0.09, outlined && "rgba(90,105,120,.22)", false, faces);
    else
      drawBox(
        context,
        box,
        state.colours[r],
        ticks ? 0.62 : 0.2,
        outlined && (ticks ? "rgba(30,40,50,.55)" : "rgba(30,40,50,.35)"),
        !ticks,
        faces,
      );
  }
}

/** The axis whose faces look at the viewer the most, alone in a list. */
function largestFaces() {
  const turned = rotation(state.yaw, state.pitch)[2].map(Math.abs);
  return [turned.indexOf(Math.max(...turned))];
}

function drawFocus(context, chosen) {
  const marked = [];
  for (const [found, colour] of [
    [chosen.attends, KEYS],
    [chosen.attended, QUERIES],
  ]) {
    // what a region has of itself is under its own colour
    for (const link of found)
      for (const box of link.boxes)
        if (chosen.cell || link.region !== chosen.region || !within(box, chosen.box)) marked.push({ box, colour });
  }
  for (const { box, colour } of byDepth(marked, view))
    drawBox(context, box, colour, 0.34, marked.length <= MAX_OUTLINED && shade(colour, 0.8, 0.9));
  context.lineWidth = 1.6;
  drawBox(context, chosen.box, FOCUS, 0.6, shade(FOCUS, 0.7, 1));
  context.lineWidth = 1.2;
  const middle = (box) => view.project((box[0] + box[1]) / 2, (box[2] + box[3]) / 2, (box[4] + box[5]) / 2);
  for (const [found, colour, attends] of [
    [chosen.attends, KEYS, true],
    [chosen.attended, QUERIES, false],
  ]) {
    for (const link of found.slice(0, MAX_ARROWS)) {
      if (link.region === chosen.region || !link.boxes.length) continue;
      const ends = [middle(chosen.box), middle(link.boxes[0])];
      drawArrow(context, ...(attends ? ends : ends.reverse()), colour);
    }
  }
}

/** A bent arrow from the query to the key. */
function drawArrow(context, [x0, y0], [x1, y1], colour) {
  const [bx, by] = [(x0 + x1) / 2 + (y1 - y0) * 0.15, (y0 + y1) / 2 - (x1 - x0) * 0.15];
  const angle = Math.atan2(y1 - by, x1 - bx);
  context.strokeStyle = context.fillStyle = colour;
  context.beginPath();
  context.moveTo(x0, y0);
  context.quadraticCurveTo(bx, by, x1, y1);
  context.stroke();
  context.beginPath();
  context.moveTo(x1, y1);
  for (const turn of [-0.35, 0.35]) context.lineTo(x1 - 9 * Math.cos(angle + turn), y1 - 9 * Math.sin(angle + turn));
  context.fill();
}

/** Names at the middle of their boxes, as far as they do not meet. */
function drawLabels(context, chosen, items) {
  context.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  let wanted;
  if (chosen) {
    const linked = [...chosen.attends, ...chosen.attended].filter(
      (link) => link.boxes.length && link.region !== chosen.region,
    );
    wanted = [
      { r: chosen.region, box: chosen.box },
      ...linked.slice(0, 40).map((link) => ({ r: link.region, box: link.boxes[0] })),
    ];
  } else wanted = items.length <= 400 ? [...items].reverse() : [];
  const taken = [],
    named = new Set();
  for (const { r, box } of wanted) {
    const [x, y] = view.project((box[0] + box[1]) / 2, (box[2] + box[3]) / 2, (box[4] + box[5]) / 2);
    const half = context.measureText(regions.name[r]).width / 2 + 5;
    const area = [x - half, x + half, y - 9, y + 9];
    if (named.has(r) || taken.some((a) => a[0] < area[1] && area[0] < a[1] && a[2] < area[3] && area[2] < a[3]))
      continue;
    taken.push(area);
    named.add(r);
    context.fillStyle = "rgba(255,255,255,.82)";
    context.fillRect(x - half, y - 9, 2 * half, 18);
    context.fillStyle = "#1c2733";
    context.fillText(regions.name[r], x, y);
  }
}

/** Ticks at round numbers, about as many as asked for. */
function ticks(n, wanted) {
  const rough = Math.max(1, n / wanted),
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  return Array.from({ length: Math.floor(n / step) + 1 }, (_, i) => i * step);
}

const AXES = ["T, frames", spatial.length > 2 ? "rows" : "H, rows", spatial.length > 2 ? "columns" : "W, columns"];

/** The grid's edges; in front, its axes with numbers, each along the edge that lies outermost. */
function drawGrid(context, front) {
  const middle = view.project(T / 2, ROWS / 2, COLUMNS / 2),
    taken = [];
  for (let axis = 0; axis < 3; axis++) {
    const [u, v] = [(axis + 1) % 3, (axis + 2) % 3];
    const edges = [
      [0, 0],
      [0, 1],
      [1, 0],
      [1, 1],
    ].map(([i, j]) => {
      const at = (x) => {
        const p = [0, 0, 0];
        p[axis] = x;
        p[u] = i * SIZE[u];
        p[v] = j * SIZE[v];
        return view.project(...p);
      };
      return { at, middle: at(SIZE[axis] / 2) };
    });
    if (!front) {
      context.strokeStyle = "#ccd5dd";
      for (const { at } of edges) {
        context.beginPath();
        context.moveTo(...at(0));
        context.lineTo(...at(SIZE[axis]));
        context.stroke();
      }
      continue;
    }
    // rows run down at the left, the others along the bottom
    const edge = edges.reduce((a, b) => ((axis === 1 ? b.middle[0] < a.middle[0] : b.middle[1] > a.middle[1]) ? b : a));
    drawAxis(context, edge, SIZE[axis], AXES[axis], middle, taken);
  }
}

function drawAxis(context, { at, middle: [mx, my] }, size, name, [cx, cy], taken) {
  const [a, b] = [at(0), at(size)],
    length = Math.hypot(b[0] - a[0], b[1] - a[1]);
  if (length < 24) return;
  // outwards, at a right angle to the edge
  let [nx, ny] = [(b[1] - a[1]) / length, (a[0] - b[0]) / length];
  if (nx * (mx - cx) + ny * (my - cy) < 0) [nx, ny] = [-nx, -ny];
  context.strokeStyle = "#6b7885";
  context.fillStyle = "#3a4754";
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textAlign = nx > 0.4 ? "left" : nx < -0.4 ? "right" : "center";
  context.textBaseline = "middle";
  context.beginPath();
  context.moveTo(a[0], a[1]);
  context.lineTo(b[0], b[1]);
  for (const tick of ticks(size, Math.min(8, length / 34))) {
    const [x, y] = at(tick),
      [left, top] = [x + 13 * nx, y + 13 * ny];
    context.moveTo(x, y);
    context.lineTo(x + 5 * nx, y + 5 * ny);
    if (taken.every(([l, t]) => Math.abs(l - left) > 24 || Math.abs(t - top) > 11)) {
      taken.push([left, top]);
      context.fillText(tick, left, top);
    }
  }
  context.stroke();
  const away = Math.abs(nx) > 0.4 ? 24 + context.measureText(size).width : 28 + 45 * Math.abs(nx);
  context.font = "bold 12px system-ui, 'DejaVu Sans', sans-serif";
  context.fillText(name, mx + away * nx, my + away * ny);
}

/** The region and cell under a point of the scene: the first box that a ray meets. */
function pick(px, py) {
  if (!view) return null;
  const { axes, origin, scale } = view,
    turn = rotation(state.yaw, state.pitch);
  // the rotation's inverse is its transpose; a ray runs along its third row
  const [sx, sy] = [(px - origin[0]) / scale, (py - origin[1]) / scale];
  const start = [0, 1, 2].map(
    (axis) => (sx * turn[0][axis] + sy * turn[1][axis] - (origin[2] / scale) * turn[2][axis]) / UNIT[axis],
  );
  const step = [0, 1, 2].map((axis) => turn[2][axis] / UNIT[axis]);
  let best = null;
  for (let r = 0; r < N; r++) {
    const box = state.matching && !state.matching[r] ? null : boxNow(r);
    if (!box) continue;
    let enter = -Infinity,
      leave = Infinity;
    for (let axis = 0; axis < 3; axis++) {
      const one = (box[2 * axis] - start[axis]) / step[axis],
        other = (box[2 * axis + 1] - start[axis]) / step[axis];
      enter = Math.max(enter, Math.min(one, other));
      leave = Math.min(leave, Math.max(one, other));
    }
    if (enter < leave && (!best || enter < best.enter)) best = { region: r, enter };
  }
  if (best) {
    best.cell = [0, 1, 2].map((axis) => {
      const [low, high] = [boxes[best.region][2 * axis], boxes[best.region][2 * axis + 1]];
      return Math.min(high - 1, Math.max(low, Math.floor(start[axis] + step[axis] * (best.enter + 1e-6))));
    });
  }
  return best;
}

/** Under the slider, a row for each period: a tick at every frame. */
function drawClocks() {
  const spans = new Map();
  regions.period.forEach((p, r) => {
    const span = spans.get(p) || [Infinity, 0, 0];
    spans.set(p, [Math.min(span[0], boxes[r][0] * p), Math.max(span[1], (boxes[r][1] - 1) * p), span[2] + 1]);
  });
  const rows = [...spans].sort((a, b) => a[0] - b[0]).slice(0, 5);
  $("clocks").style.height = `${15 * rows.length + 14}px`;
  const { context, width } = sized($("clocks"));
  const x = (time) => LABELS + 8 + (width - LABELS - 16) * (LAST_TIME ? time / LAST_TIME : 0);
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textBaseline = "middle";
  rows.forEach(([p, [first, last, count]], at) => {
    const y = 15 * at + 7,
      dense = x(p) - x(0) < 3;
    context.fillStyle = "#8a96a3";
    context.fillRect(x(first), y - (dense ? 3 : 0.5), Math.max(1, x(last) - x(first)), dense ? 6 : 1);
    for (let time = first; !dense && time <= last; time += p) {
      context.fillStyle = time === state.time ? FOCUS : "#52606d";
      context.fillRect(x(time) - 1, y - 4, 2, 8);
    }
    context.fillStyle = "#3a4754";
    context.textAlign = "left";
    context.fillText(`period ${p}, ${count.toLocaleString()} region${count > 1 ? "s" : ""}`, 0, y);
  });
  context.fillStyle = "#6b7885";
  context.textAlign = "center";
  for (const time of ticks(LAST_TIME, 10)) context.fillText(time, x(time), 15 * rows.length + 7);
  $("now").textContent = `real time ${state.time === null ? `0 to ${LAST_TIME}` : state.time}`;
}
