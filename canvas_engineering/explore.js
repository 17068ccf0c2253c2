// The page of canvas_engineering.explore: one script, no library. `data` is what explore.py wrote.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { regions, connections, table } = data;
const $ = (id) => document.getElementById(id);
const [T, ...spatial] = data.grid;
// Further spatial dimensions are seen along the last two; one dimension is one row.
const plane = (bounds) => [bounds[0], bounds[1], ...[0, 1, 0, 1, ...bounds.slice(2)].slice(-4)];
const [ROWS, COLUMNS] = [1, 1, ...spatial].slice(-2);
const SIZE = [T, ROWS, COLUMNS];
const boxes = regions.bounds.map(plane);
const N = boxes.length;
const LAST_TIME = Math.max(0, ...regions.period.map((p, r) => p * (boxes[r][1] - 1)));

// apart from the three colours of what the pointer marks, below
const PALETTE = [
  "#7b5ea7",
  "#d1699b",
  "#8d6e53",
  "#b8433f",
  "#6b7a8f",
  "#c58bd6",
  "#a3a14e",
  "#4b4f8a",
  "#e0a3a0",
  "#5c4a3f",
  "#94bcc4",
  "#9c2f66",
];
const OTHER = "#9aa5b1",
  FOCUS = "#f08c00",
  KEYS = "#1c6fd0",
  QUERIES = "#1f9d55";
const MAX_ROWS = 150,
  MAX_LISTED = 300,
  MAX_OUTLINED = 2500,
  MAX_ARROWS = 60,
  LABELS = 150;

const state = {
  yaw: 0.62,
  pitch: 0.5,
  zoom: 1,
  move: [0, 0],
  turning: false,
  time: null,
  hovered: null,
  pinned: null,
  words: "",
  matching: null,
  colours: [],
};

// -- the declaration --------------------------------------------------------------------------------------------------

const outgoing = Array.from({ length: N }, () => []),
  incoming = Array.from({ length: N }, () => []);
(connections ? connections.src : []).forEach((src, i) => {
  const dst = connections.dst[i];
  if (src >= 0 && dst >= 0) {
    outgoing[src].push(i);
    incoming[dst].push(i);
  }
});
const replaces = new Set(connections ? connections.replaces : []);

const meets = (a, b) => a[0] < b[1] && b[0] < a[1] && a[2] < b[3] && b[2] < a[3] && a[4] < b[5] && b[4] < a[5];
const within = (a, b) => a[0] >= b[0] && a[1] <= b[1] && a[2] >= b[2] && a[3] <= b[3] && a[4] >= b[4] && a[5] <= b[5];

/** The attention sets of a connection: query box, key/value box, weight. */
function attentionSets(i) {
  if (!connections.sets[i]) return [];
  const src = boxes[connections.src[i]],
    dst = boxes[connections.dst[i]],
    weight = connections.weight[i];
  const bank = regions.slots[connections.dst[i]] > 0; // slots stand for the whole region
  const masked = connections.masked[i];
  if (masked) return masked.map(([q, k, f]) => ({ q: plane(q), k: bank ? dst : plane(k), weight: weight * f }));
  return connections.patterns[connections.frames[i]].map(([q0, q1, k0, k1, f]) => ({
    q: [q0, q1, ...src.slice(2)],
    k: bank ? dst : [k0, k1, ...dst.slice(2)],
    weight: weight * f,
  }));
}

/** Boxes without repeats, those of consecutive frames joined. */
function joined(found) {
  const sorted = found
    .map((box) => ({ box, side: box.slice(2).join() }))
    .sort((a, b) => (a.side < b.side ? -1 : a.side > b.side ? 1 : a.box[0] - b.box[0]));
  const runs = [];
  for (const { box, side } of sorted) {
    const last = runs[runs.length - 1];
    if (last && last.side === side && box[0] <= last.box[1]) last.box[1] = Math.max(last.box[1], box[1]);
    else runs.push({ box: [...box], side });
  }
  return runs.map((run) => run.box);
}

/** A region's frame at the slider's time and whether it ticks then; null outside of its frames. */
function frameAt(r) {
  const frame = Math.floor(state.time / regions.period[r]);
  return frame >= boxes[r][0] && frame < boxes[r][1] ? { frame, ticks: state.time % regions.period[r] === 0 } : null;
}

/** Where a region lies now: its whole box, or its frame at the slider's time, or null. */
function boxNow(r) {
  if (state.time === null) return boxes[r];
  const at = frameAt(r);
  return at && [at.frame, at.frame + 1, ...boxes[r].slice(2)];
}

/** What `focus` ({region, box}) attends to, or what attends to it: one link for each connection that meets its box. */
function links(focus, attended) {
  const own = focus.cell ? boxes.map((_, r) => r).filter((r) => meets(boxes[r], focus.box)) : [focus.region];
  const found = [];
  for (const r of own) {
    for (const i of (attended ? incoming : outgoing)[r]) {
      const met = attentionSets(i).filter((set) => meets(attended ? set.k : set.q, focus.box));
      const idle = !connections.sets[i] && !focus.cell;
      if (met.length || idle) {
        found.push({
          i,
          region: (attended ? connections.src : connections.dst)[i],
          weight: met.reduce((sum, set) => sum + set.weight, 0),
          boxes: joined(met.map((set) => (attended ? set.q : set.k))),
        });
      }
    }
  }
  return found;
}

/** The focus of a region or a cell of it, with its links. */
function focusOn(region, cell) {
  const box = cell
    ? [cell[0], cell[0] + 1, cell[1], cell[1] + 1, cell[2], cell[2] + 1]
    : boxNow(region) || boxes[region];
  const focus = { region, cell, box };
  focus.attends = connections ? links(focus, false) : [];
  focus.attended = connections ? links(focus, true) : [];
  return focus;
}

/** The focus of one connection: its query region, and what that attends to through it alone. */
function focusOnConnection(i) {
  const sets = attentionSets(i),
    region = connections.src[i];
  if (region < 0 || connections.dst[i] < 0) return null;
  return {
    region,
    box: boxes[region],
    only: i,
    attends: [{ i, region: connections.dst[i], boxes: joined(sets.map((set) => set.k)) }],
    attended: [],
  };
}

const focus = () => state.hovered || state.pinned;

// -- words ------------------------------------------------------------------------------------------------------------

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const share = (x) => `${+(100 * x).toPrecision(3)} %`;
const number = (x) => `${+x.toPrecision(4)}`;
const nameOf = (r) => (r < 0 ? "(not in the layout)" : regions.name[r]);
const badges = (pairs) =>
  pairs.map(([what, value]) => {
    const made = element("span", undefined, "badge");
    made.append(element("b", `${what} `), value);
    return made;
  });
const frameWords = ([t, u]) =>
  [t, u].map((x) => (x === null ? "all" : x === 0 ? "t" : `t${x < 0 ? "−" : "+"}${Math.abs(x)}`)).join(" → ");
const numberOf = ([t, h, w]) => (t * ROWS + h) * COLUMNS + w;
const positionWords = (cell) =>
  `(${cell.join(", ")})${spatial.length > 2 ? "" : `, number ${numberOf(cell).toLocaleString()},`}`;
const fillOf = (i) =>
  connections.walked && connections.walked[i]
    ? `${+((100 * connections.pairs[i]) / connections.walked[i]).toPrecision(2)} %`
    : "–";

/** A table of connections. `columns`: headings and regions of each row; `weights`: the weight's heading and text. */
function connectionTable(rows, columns, weights) {
  const made = element("table", undefined, columns.length > 1 ? "two" : ""),
    head = element("tr"),
    [weightName, weightOf] = weights;
  const names = [
    ...columns.map(([name]) => name),
    "frames",
    "fill",
    weightName,
    "function",
    ...(connections.walked ? ["rect.", "tiles full"] : []),
  ];
  names.forEach((name, at) =>
    head.append(element("th", name, at === columns.length + 2 || at > columns.length + 3 ? "number" : "")),
  );
  made.append(head);
  for (const link of rows.slice(0, MAX_ROWS)) {
    const i = link.i,
      row = element("tr", undefined, "row");
    for (const [, of] of columns) row.append(element("td", nameOf(of(link))));
    row.append(
      element("td", connections.sets[i] ? frameWords(connections.offsets[i]) : "no sets"),
      element("td", connections.fill[i]),
      element("td", weightOf(link), "number"),
      element("td", connections.fn[i].replace("_attention", "")),
    );
    if (connections.walked)
      row.append(
        element("td", connections.rectangles[i].toLocaleString(), "number"),
        element("td", fillOf(i), "number"),
      );
    for (const cell of row.children) cell.title = cell.textContent;
    row.onmouseenter = () => hover(focusOnConnection(i), true);
    row.onmouseleave = () => hover(null, true);
    row.onclick = () => {
      const other = link.region ?? connections.src[i];
      if (other >= 0) pin(focusOn(other));
    };
    made.append(row);
    if (connections.notes[i]) {
      const notes = element("tr", undefined, "notes"),
        cell = element("td");
      cell.colSpan = names.length;
      cell.append(...badges(connections.notes[i]));
      notes.append(cell);
      made.append(notes);
    }
  }
  if (rows.length > MAX_ROWS)
    made.append(element("caption", `the first ${MAX_ROWS} of ${rows.length.toLocaleString()}`));
  return made;
}

function describe() {
  const chosen = focus(),
    details = $("details");
  details.replaceChildren();
  if (!chosen) return describeCanvas(details);
  const { region: r, cell } = chosen;
  details.append(element("h2", cell ? `position ${positionWords(cell)} of ${regions.name[r]}` : regions.name[r]));
  const bounds = regions.bounds[r],
    ranges = [];
  for (let at = 0; at < bounds.length; at += 2) ranges.push(`${bounds[at]}:${bounds[at + 1]}`);
  const positions = ranges.reduce((n, _, at) => n * (bounds[2 * at + 1] - bounds[2 * at]), 1);
  const p = regions.period[r];
  details.append(
    element(
      "div",
      `${ranges.join(" × ")}, ${positions.toLocaleString()} position${positions === 1 ? "" : "s"}, ` +
        `period ${p}: frames at real times ${bounds[0] * p} to ${(bounds[1] - 1) * p}`,
    ),
  );
  details.append(...badges(regions.badges[r]), ...badges(regions.facts[r]));
  if (!connections) return;
  // one softmax each, averaged by weight: a set's part of the average, where sets that replace leave no room for others
  const inForce = chosen.attends.some((link) => replaces.has(link.i)) ? (link) => replaces.has(link.i) : () => true;
  const total = chosen.attends.filter(inForce).reduce((sum, link) => sum + (link.weight || 0), 0);
  const weights =
    cell && table.form === "edge"
      ? [
          "weight, share",
          (link) => (total ? `${number(link.weight)}, ${share(inForce(link) ? link.weight / total : 0)}` : "–"),
        ]
      : ["weight", (link) => number(cell ? link.weight : connections.weight[link.i])];
  const plain = ["weight", (link) => number(cell ? link.weight : connections.weight[link.i])];
  details.append(heading(`attends to (${chosen.attends.length.toLocaleString()})`, KEYS));
  details.append(connectionTable(chosen.attends, [["key/value region", (link) => link.region]], weights));
  if (chosen.only === undefined) {
    details.append(heading(`attended to by (${chosen.attended.length.toLocaleString()})`, QUERIES));
    details.append(connectionTable(chosen.attended, [["query region", (link) => link.region]], plain));
  }
}

function heading(text, colour) {
  const made = element("h2"),
    swatch = element("i", undefined, "swatch");
  swatch.style.background = colour;
  made.append(swatch, ` ${text}`);
  return made;
}

function describeCanvas(details) {
  const families = new Map();
  boxes.forEach((_, r) => {
    const family = badge(r, "family");
    if (family) families.set(family, (families.get(family) || 0) + 1);
  });
  if (families.size) {
    details.append(element("h2", "Program"));
    details.append(...badges([...families].map(([family, n]) => [family, `${n}`])));
  }
  if (!connections) {
    details.append(element("div", "No topology: nothing attends to anything.", "quiet"));
    return;
  }
  details.append(element("h2", `Connections (${connections.src.length.toLocaleString()})`));
  const rows = connections.src.map((_, i) => ({ i }));
  if (connections.pairs) rows.sort((a, b) => connections.pairs[b.i] - connections.pairs[a.i]);
  details.append(
    connectionTable(
      rows,
      [
        ["query region", ({ i }) => connections.src[i]],
        ["key/value region", ({ i }) => connections.dst[i]],
      ],
      ["weight", ({ i }) => number(connections.weight[i])],
    ),
  );
}

function describeTable(rectangle) {
  if (!table) return;
  const row = table.rectangles[rectangle];
  if (row) {
    const [q0, q1, k0, k1, i] = row,
      size = `${(q1 - q0).toLocaleString()} queries × ${(k1 - k0).toLocaleString()} keys`;
    const whose =
      table.form === "edge"
        ? `${nameOf(connections.src[i])} attends to ${nameOf(connections.dst[i])}, ${frameWords(connections.offsets[i])}: `
        : "";
    $("block").textContent =
      `${whose}${size}${table.form === "edge" ? `, its connection's tiles ${fillOf(i)} full` : ""}`;
    return;
  }
  const fills = Object.entries(table.fills).map(([tile, fill]) => `${tile} tiles ${Math.round(100 * fill)} % full`);
  const left =
    table.total > table.rectangles.length ? `, the largest ${table.rectangles.length.toLocaleString()} drawn` : "";
  const colour = table.form === "edge" && !focus() ? "; coloured by key/value region" : "";
  $("block").textContent =
    [
      `${table.total.toLocaleString()} rectangles${left}, ${table.form} form`,
      `density ${share(table.density)}`,
      ...fills,
    ].join(", ") + colour;
}

function drawLegend() {
  const entries = focus()
    ? [
        [FOCUS, "under the pointer, or pinned"],
        [KEYS, "what it attends to"],
        [QUERIES, "what attends to it"],
      ]
    : [...state.legend, ...(state.time === null ? [] : [["#d5dbe1", "pale, dashed: held from an earlier tick"]])];
  $("legend").replaceChildren(
    ...entries.map(([colour, name]) => {
      const made = element("span"),
        swatch = element("i", undefined, "swatch");
      swatch.style.background = colour;
      made.append(swatch, name);
      return made;
    }),
  );
}

function list() {
  const shown = [];
  for (let r = 0; r < N && shown.length < MAX_LISTED; r++) if (!state.matching || state.matching[r]) shown.push(r);
  const matches = state.matching ? state.matching.reduce((n, is) => n + is, 0) : N;
  const left = matches > shown.length ? `, the first ${shown.length} listed` : "";
  $("count").textContent = `${matches.toLocaleString()} of ${N.toLocaleString()} regions${left}`;
  $("regions").replaceChildren(
    ...shown.map((r) => {
      const made = element("li"),
        swatch = element("i", undefined, "swatch");
      swatch.style.background = state.colours[r];
      made.append(swatch, element("span", regions.name[r]));
      made.title = regions.name[r];
      made.classList.toggle("chosen", state.pinned !== null && state.pinned.region === r);
      made.onmouseenter = () => hover(focusOn(r));
      made.onmouseleave = () => hover(null);
      made.onclick = () => pin(focusOn(r));
      return made;
    }),
  );
}

// -- what a person does -----------------------------------------------------------------------------------------------

let asked = false;
/** Draws at the next frame of the screen, however often it was asked for. */
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    drawScene();
    drawTable();
    drawLegend();
    drawClocks();
  });
}

/** `inTable`: the pointer is in the details, which then stay as they are. */
function hover(found, inTable) {
  state.hovered = found;
  if (!inTable) describe();
  redraw();
}

function pin(found) {
  state.pinned = found;
  state.hovered = null;
  describe();
  list();
  redraw();
}

function setTime(time) {
  state.time = time;
  $("all").checked = time === null;
  if (time !== null) $("slider").value = time;
  if (state.pinned) state.pinned = focusOn(state.pinned.region, state.pinned.cell);
  state.hovered = null;
  describe();
  redraw();
}

function listen() {
  const scene = $("scene");
  let drag = null,
    last = "";
  const at = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const under = (event) => {
    const found = pick(...at(event));
    return found && { region: found.region, cell: $("pick-position").checked ? found.cell : null };
  };
  scene.onpointerdown = (event) => {
    drag = { x: event.clientX, y: event.clientY, far: 0 };
    scene.setPointerCapture(event.pointerId);
  };
  scene.onpointermove = (event) => {
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag = { x: event.clientX, y: event.clientY, far: drag.far + Math.abs(dx) + Math.abs(dy) };
      if (event.shiftKey) {
        state.move[0] += dx;
        state.move[1] += dy;
      } else turn(-dx * 0.008, dy * 0.008);
      if (drag.far > 3) {
        scene.classList.add("turning");
        state.turning = true;
        state.hovered = null;
        redraw();
      }
      return;
    }
    const found = under(event),
      key = JSON.stringify(found);
    if (key !== last) {
      last = key;
      hover(found && focusOn(found.region, found.cell));
    }
  };
  scene.onpointerup = (event) => {
    if (drag && drag.far <= 3) {
      const found = under(event);
      pin(found && focusOn(found.region, found.cell));
    }
    drag = null;
    last = "";
    state.turning = false;
    scene.classList.remove("turning");
    redraw();
  };
  scene.onpointerleave = () => {
    last = "";
    hover(null);
  };
  scene.ondblclick = () => {
    Object.assign(state, { yaw: 0.62, pitch: 0.5, zoom: 1, move: [0, 0] });
    redraw();
  };
  scene.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const [x, y] = at(event),
        { width, height } = scene.getBoundingClientRect(),
        before = state.zoom;
      state.zoom = Math.min(60, Math.max(0.3, before * Math.exp(-event.deltaY * 0.0015)));
      // what is under the pointer stays there
      state.move = [x - width / 2, y - height / 2].map(
        (far, axis) => far - ((far - state.move[axis]) * state.zoom) / before,
      );
      redraw();
    },
    { passive: false },
  );
  scene.onkeydown = (event) => {
    const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    if (step) {
      event.preventDefault();
      turn(...step);
      redraw();
    }
    if (event.key === "Escape") pin(null);
  };
  const matrix = $("matrix");
  let block = -1;
  matrix.onpointermove = (event) => {
    const found = rectangleAt(...at(event));
    if (found === block) return;
    block = found;
    describeTable(block);
    if (table.form === "edge") hover(block < 0 ? null : focusOnConnection(table.rectangles[block][4]));
  };
  matrix.onpointerleave = () => {
    block = -1;
    describeTable(-1);
    hover(null);
  };
  $("search").oninput = (event) => {
    const words = (state.words = event.target.value.toLowerCase().trim());
    state.matching = words
      ? regions.name.map((name, r) =>
          [name, ...regions.badges[r].flat(), ...regions.facts[r].flat()].some((text) =>
            text.toLowerCase().includes(words),
          ),
        )
      : null;
    list();
    redraw();
  };
  $("colour").onchange = (event) => {
    colourBy(event.target.value);
    list();
    redraw();
  };
  $("slider").oninput = (event) => setTime(+event.target.value);
  $("all").onchange = (event) => setTime(event.target.checked ? null : +$("slider").value);
  new ResizeObserver(redraw).observe($("space"));
}

function turn(yaw, pitch) {
  state.yaw += yaw;
  state.pitch = Math.min(1.55, Math.max(-1.55, state.pitch + pitch));
}

function start() {
  const positions = data.grid.reduce((n, size) => n * size, 1);
  const said = [
    `${data.grid.join(" × ")} = ${positions.toLocaleString()} positions of ${data.width}`,
    `${N.toLocaleString()} region${N === 1 ? "" : "s"}`,
  ];
  if (connections)
    said.push(
      `${connections.src.length.toLocaleString()} connections`,
      `${table.sets.toLocaleString()} attention sets`,
    );
  if (spatial.length > 2) said.push(`seen along the last two of ${spatial.length} spatial dimensions`);
  document.querySelector("header").append(...said.map((text) => element("span", text)));
  const kinds = Object.keys(KINDS).filter((kind) => kind !== "family" || regions.badges.some((pairs) => pairs.length));
  $("colour").append(...kinds.map((kind) => new Option(kind)));
  const groups = (kind) => new Set(boxes.map((_, r) => KINDS[kind](r))).size;
  $("colour").value = kinds.find((kind) => groups(kind) <= PALETTE.length && (groups(kind) > 1 || N === 1)) || "period";
  colourBy($("colour").value);
  $("slider").max = LAST_TIME;
  $("blocks").hidden = !table;
  describe();
  describeTable(-1);
  list();
  listen();
  redraw();
}
