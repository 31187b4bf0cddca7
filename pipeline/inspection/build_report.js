// The list of assets in a build's report: filters, histograms, and two meshes side by side.
"use strict";

(() => {
  const PAGE = 60; // rows that are added to the list at a time
  const BINS = 20;
  const LEVELS = 65535; // of a quantised coordinate, as in report_meshes.py
  const CREASE = Math.cos(40 * Math.PI / 180); // faces that meet at more have edges in the shading
  const OWN_COLOR = [0.3, 0.38, 0.48]; // linear, of meshes that state none
  const QUANTITIES = [
    { name: "score", label: "Score", log: false, range: [0, 1] },
    { name: "faces", label: "Faces of the original", log: true },
    { name: "tokens", label: "Tokens at the finest resolution", log: true },
  ];
  const assets = JSON.parse(document.getElementById("asset-data").textContent);
  const root = document.getElementById("browser");
  const form = root.querySelector("form");
  const list = root.querySelector("ol");
  const more = root.querySelector(".more");
  const detail = root.querySelector(".detail");
  let visible = PAGE;

  // Returns an element with properties, attributes in `attributes`, and children.
  function element(name, properties = {}, ...children) {
    const { attributes = {}, ...rest } = properties;
    const node = Object.assign(document.createElement(name), rest);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function options(select, values, all) {
    const counts = new Map();
    for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    select.append(element("option", { value: "", textContent: all }));
    for (const [value, count] of sorted) {
      select.append(element("option", { value, textContent: `${value} (${count})` }));
    }
    select.parentElement.hidden = sorted.length < 1;
  }

  function matches(asset) {
    const { status, reason, warning, low, high, name, shown } = form.elements;
    const number = (input, fallback) => input.value === "" ? fallback : Number(input.value);
    const text = name.value.trim().toLowerCase();
    const limited = low.value !== "" || high.value !== "";
    return (!status.value || asset.status === status.value)
      && (!reason.value || asset.reason === reason.value)
      && (!warning.value || asset.warnings.includes(warning.value))
      && (!limited || (asset.score !== null
        && asset.score >= number(low, -Infinity) && asset.score <= number(high, Infinity)))
      && (!text || `${asset.url} ${asset.uid}`.toLowerCase().includes(text))
      && (!shown.checked || hasView(asset));
  }

  const payload = (asset, kind) =>
    document.querySelector(`script[data-mesh="${CSS.escape(asset.uid)}/${kind}"]`);
  const hasView = (asset) => Boolean(asset.notes && (asset.notes.original || asset.notes.bricks));

  function show() {
    const found = assets.filter(matches);
    root.querySelector(".count").textContent =
      `${found.length.toLocaleString("en")} of ${assets.length.toLocaleString("en")} assets`;
    list.replaceChildren(...found.slice(0, visible).map(row));
    more.hidden = found.length <= visible;
    root.querySelector(".histograms").replaceChildren(
      ...QUANTITIES.map((quantity) => histogram(quantity, found)).filter(Boolean));
  }

  function row(asset) {
    const picture = asset.thumbnail
      ? element("img", { src: asset.thumbnail, alt: "", loading: "lazy" })
      : element("span", { className: "blank" });
    const pill = element("span", {
      className: `pill ${asset.status.replace(" ", "-")}`, textContent: asset.status,
    });
    const facts = [asset.reason, asset.score === null ? "" : `score ${asset.score.toFixed(3)}`,
      asset.warnings.length ? `${asset.warnings.length} warnings` : ""].filter(Boolean);
    const button = element("button", {
      type: "button", className: "row-asset", title: asset.url, disabled: !hasView(asset),
      attributes: { "aria-pressed": "false" },
    }, picture, element("span", { className: "text" },
      element("b", { textContent: asset.url.split("/").pop() || asset.url }),
      element("small", {}, pill, facts.length ? ` ${facts.join(" · ")}` : "")));
    button.addEventListener("click", () => {
      for (const other of list.querySelectorAll("[aria-pressed=true]")) {
        other.setAttribute("aria-pressed", "false");
      }
      button.setAttribute("aria-pressed", "true");
      open(asset);
    });
    return element("li", {}, button);
  }

  function histogram({ name, label, log, range }, found) {
    const scale = log ? Math.log10 : (value) => value;
    const all = assets.map((asset) => asset[name]).filter((value) => value > 0 || value === 0);
    const usable = all.filter((value) => !log || value > 0).map(scale);
    if (!usable.length) return null;
    const low = range ? range[0] : usable.reduce((a, b) => Math.min(a, b));
    const high = range ? range[1] : usable.reduce((a, b) => Math.max(a, b));
    const counts = new Array(BINS).fill(0);
    const numbers = found.map((asset) => asset[name])
      .filter((value) => value !== null && value !== undefined && (!log || value > 0));
    for (const value of numbers) {
      const place = (scale(value) - low) / (high - low || 1);
      counts[Math.min(BINS - 1, Math.max(0, Math.floor(place * BINS)))] += 1;
    }
    const most = Math.max(1, ...counts);
    const edge = (place) => {
      const value = low + (high - low) * place;
      return log ? Math.round(10 ** value).toLocaleString("en") : String(value);
    };
    const bars = counts.map((count, n) => element("span", {
      title: `${edge(n / BINS)} to ${edge((n + 1) / BINS)}: ${count} assets`,
      style: `height:${100 * count / most}%`,
    }));
    const text = `${label} of ${numbers.length.toLocaleString("en")} assets`;
    return element("div", { className: "histogram" },
      element("h3", { textContent: log ? `${text}, logarithmic` : text }),
      element("div", { className: "bars", attributes: { role: "img", "aria-label": text } }, ...bars),
      element("div", { className: "range" },
        element("span", { textContent: edge(0) }), element("span", { textContent: edge(1) })));
  }

  // Returns the mesh of a payload as a viewer takes it: one vertex for each corner of a face.
  async function decode(script) {
    const packed = Uint8Array.from(atob(script.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const data = new DataView(await new Response(stream).arrayBuffer());
    const [vertices, faces, groups] = [0, 4, 8].map((place) => data.getUint32(place, true));
    const positions = 12 + 16 * groups;
    const indices = positions + 6 * vertices;
    const point = (vertex, axis) =>
      data.getUint16(positions + 6 * vertex + 2 * axis, true) / LEVELS - 0.5;
    const mesh = {
      positions: new Float32Array(9 * faces), normals: new Float32Array(9 * faces),
      indices: Uint32Array.from({ length: 3 * faces }, (_, n) => n), groups: [],
    };
    const corners = Uint16Array.from(
      { length: 3 * faces }, (_, n) => data.getUint16(indices + 2 * n, true));
    corners.forEach((vertex, n) => {
      for (let axis = 0; axis < 3; axis++) mesh.positions[3 * n + axis] = point(vertex, axis);
    });
    creaseNormals(mesh, corners, vertices);
    let first = 0;
    for (let n = 0; n < groups; n++) {
      const color = [0, 4, 8].map((place) => data.getFloat32(12 + 16 * n + place, true));
      const count = 3 * data.getUint32(12 + 16 * n + 12, true);
      mesh.groups.push({ first, count, color: Number.isNaN(color[0]) ? OWN_COLOR : color });
      first += count;
    }
    return mesh;
  }

  // Sets each corner's normal to the mean of the faces at its vertex that deviate little from its own.
  function creaseNormals({ positions, normals }, corners, vertices) {
    const faces = corners.length / 3;
    const areas = new Float32Array(3 * faces); // area vectors
    const units = new Float32Array(3 * faces);
    const at = Array.from({ length: vertices }, () => []);
    for (let face = 0; face < faces; face++) {
      const p = positions.subarray(9 * face, 9 * face + 9);
      const u = [p[3] - p[0], p[4] - p[1], p[5] - p[2]];
      const v = [p[6] - p[0], p[7] - p[1], p[8] - p[2]];
      const n = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
      const length = Math.hypot(...n) || 1;
      for (let k = 0; k < 3; k++) {
        areas[3 * face + k] = n[k];
        units[3 * face + k] = n[k] / length;
        at[corners[3 * face + k]].push(face);
      }
    }
    corners.forEach((vertex, corner) => {
      const own = 3 * Math.floor(corner / 3);
      for (const face of at[vertex]) {
        const cosine = units[own] * units[3 * face] + units[own + 1] * units[3 * face + 1]
          + units[own + 2] * units[3 * face + 2];
        if (cosine < CREASE) continue;
        for (let k = 0; k < 3; k++) normals[3 * corner + k] += areas[3 * face + k];
      }
    });
  }

  async function open(asset) {
    const kinds = [["original", "Original"], ["bricks", "Surface of the bricks"]];
    const figures = kinds.map(([kind, title]) => {
      const script = payload(asset, kind);
      const faces = asset.notes[kind];
      const caption = faces ? `${title} (${faces.toLocaleString("en")} faces before simplification)`
        : title;
      const view = script ? element("mesh-viewer", { attributes: { label: `${title} of ${asset.url}` } })
        : element("div", { className: "none", textContent: missing(asset, kind) });
      return { view, script, figure: element("figure", {}, view,
        element("figcaption", { textContent: caption })) };
    });
    const facts = [
      ["uid", asset.uid], ["path", asset.url], ["status", asset.status], ["stage", asset.stage],
      ["reason", asset.reason], ["warnings", asset.warnings.join(", ")], ["licence", asset.licence],
      ["split", asset.split], ["inside found", asset.sign_path],
      ["score", asset.score === null ? "" : asset.score.toFixed(4)],
      ["tokens", asset.tokens === null ? "" : asset.tokens.toLocaleString("en")],
    ].filter(([, value]) => value);
    detail.replaceChildren(
      element("h3", { textContent: asset.url.split("/").pop() || asset.url }),
      element("div", { className: "views" }, ...figures.map(({ figure }) => figure)),
      element("dl", {}, ...facts.flatMap(([name, value]) => [
        element("dt", { textContent: name }), element("dd", { textContent: value })])));
    const viewers = figures.filter(({ script }) => script);
    for (const { view, script } of viewers) view.set(await decode(script));
    if (viewers.length === 2) link(viewers[0].view, viewers[1].view);
  }

  function missing(asset, kind) {
    if (asset.notes.failed) return `The mesh could not be made: ${asset.notes.failed}`;
    if (kind === "bricks") return "The build has no bricks of this asset, or they have no surface.";
    return asset.notes.no_original
      ? `The original could not be read: ${asset.notes.no_original}` : "The original was not read.";
  }

  // Keeps the cameras and the display of two viewers equal.
  function link(one, other) {
    for (const [from, to] of [[one, other], [other, one]]) {
      for (const kind of ["pointermove", "wheel", "keydown", "click"]) {
        from.addEventListener(kind, () => {
          to.camera = { ...from.camera };
          if (to.mode !== from.mode) to.show(from.mode);
          to.draw();
        });
      }
    }
  }

  options(form.elements.status, assets.map((asset) => asset.status), "all");
  options(form.elements.reason, assets.map((asset) => asset.reason), "all");
  options(form.elements.warning, assets.flatMap((asset) => asset.warnings), "all");
  for (const name of ["low", "high"]) {
    form.elements[name].parentElement.hidden = assets.every((asset) => asset.score === null);
  }
  form.addEventListener("input", () => { visible = PAGE; show(); });
  form.addEventListener("reset", () => setTimeout(() => { visible = PAGE; show(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { visible += PAGE; show(); });
  show();
  const first = list.querySelector(".row-asset:not(:disabled)");
  if (first) first.click();
})();
