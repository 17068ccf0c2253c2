// The block table: queries down, keys and values across, in packed order.

let scale1d = null;

/** Rows that no rectangle cuts get the square root of their number: small regions are seen beside large ones. */
function tableScale() {
  if (scale1d) return scale1d;
  const cuts = [...new Set([0, Math.max(1, table.rows), ...table.rectangles.flatMap((row) => row.slice(0, 4))])].sort(
    (a, b) => a - b,
  );
  const lengths = [0];
  for (let i = 1; i < cuts.length; i++) lengths.push(lengths[i - 1] + Math.sqrt(cuts[i] - cuts[i - 1]));
  const total = lengths[lengths.length - 1];
  scale1d = {
    cuts,
    shares: lengths.map((x) => x / total),
    at: new Map(cuts.map((cut, i) => [cut, lengths[i] / total])),
  };
  return scale1d;
}

let frame = null;

function drawTable() {
  if (!table) return;
  const { context, width, height } = sized($("matrix"));
  const size = Math.min(width - 60, height - 40);
  frame = { left: Math.max(44, (width - size) / 2), top: 6, size };
  const { at } = tableScale(),
    chosen = focus();
  const marked = new Map();
  if (chosen && table.form === "edge") {
    for (const link of chosen.attended) marked.set(link.i, QUERIES);
    for (const link of chosen.attends) marked.set(link.i, KEYS);
  }
  context.fillStyle = "#fff";
  context.fillRect(frame.left, frame.top, size, size);
  const outlined = table.rectangles.length < 1000;
  for (const [q0, q1, k0, k1, i] of table.rectangles) {
    const [x, y] = [frame.left + at.get(k0) * size, frame.top + at.get(q0) * size];
    const [w, h] = [
      Math.max(0.7, at.get(k1) * size + frame.left - x),
      Math.max(0.7, at.get(q1) * size + frame.top - y),
    ];
    const own = table.form === "edge" ? state.colours[connections.dst[i]] : KEYS;
    context.fillStyle =
      chosen && table.form === "edge" ? marked.get(i) || "#e6eaee" : shade(own, 1, table.form === "edge" ? 0.85 : 0.5);
    context.fillRect(x, y, w, h);
    if (outlined && w > 3 && h > 3) {
      context.strokeStyle = "rgba(255,255,255,.9)";
      context.lineWidth = 0.6;
      context.strokeRect(x, y, w, h);
    }
  }
  context.strokeStyle = "#9aa5b1";
  context.lineWidth = 1;
  context.strokeRect(frame.left, frame.top, size, size);
  context.fillStyle = "#3a4754";
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textAlign = "center";
  context.textBaseline = "top";
  context.fillText(
    `keys and values, packed order, 0 to ${table.rows.toLocaleString()}`,
    frame.left + size / 2,
    frame.top + size + 6,
  );
  context.save();
  context.translate(frame.left - 8, frame.top + size / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "bottom";
  context.fillText(`queries, packed order, 0 to ${table.rows.toLocaleString()}`, 0, 0);
  context.restore();
}

/** The rectangle under a point of the table's picture, or -1. */
function rectangleAt(px, py) {
  if (!frame) return -1;
  const { cuts, shares } = tableScale();
  const row = (x) => {
    // the packed row at a share of the axis
    const i = Math.min(
      shares.length - 1,
      Math.max(
        1,
        shares.findIndex((share) => share > x),
      ),
    );
    return cuts[i - 1] + ((cuts[i] - cuts[i - 1]) * (x - shares[i - 1])) / (shares[i] - shares[i - 1]);
  };
  const [x, y] = [(px - frame.left) / frame.size, (py - frame.top) / frame.size];
  if (x < 0 || x >= 1 || y < 0 || y >= 1) return -1;
  const [q, k] = [row(y), row(x)];
  return table.rectangles.findLastIndex(([q0, q1, k0, k1]) => q0 <= q && q < q1 && k0 <= k && k < k1);
}
