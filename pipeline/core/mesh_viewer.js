// <mesh-viewer src="mesh.glb" label="...">: an interactive view of a triangle mesh, in WebGL 2.
//
// It reads binary glTF files whose nodes have no transform: positions, normals, indices and base
// colours. It needs no other file and makes no request but that of `src`, which may be a data URI.
// Drag turns the mesh, the wheel or two fingers zoom, drag with Shift or the right button moves it.
// With the keyboard: the arrow keys turn, + and - zoom, Home resets the view.
"use strict";

(() => {
  const MODES = [["shaded", "Shaded"], ["wireframe", "Wireframe"], ["normals", "Normals"]];
  const COMPONENTS = {
    5121: Uint8Array, 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array,
  };
  const WIDTHS = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4 };
  const FIELD_OF_VIEW = 0.6; // radians
  const START = { azimuth: 0.6, elevation: 0.35, distance: 1.0, x: 0, y: 0 };
  const MAX_ELEVATION = 1.55;

  const VERTEX_SHADER = `#version 300 es
    uniform mat4 view, projection;
    in vec3 position, normal;
    out vec3 eye_normal, world_normal;
    void main() {
      world_normal = normal;
      eye_normal = mat3(view) * normal;
      gl_Position = projection * view * vec4(position, 1.0);
    }`;
  const FRAGMENT_SHADER = `#version 300 es
    precision highp float;
    uniform int mode;
    uniform vec3 color;
    in vec3 eye_normal, world_normal;
    out vec4 result;
    vec3 encode(vec3 linear) { return pow(clamp(linear, 0.0, 1.0), vec3(1.0 / 2.2)); }
    void main() {
      if (mode == 1) { result = vec4(color, 1.0); return; }
      vec3 side = gl_FrontFacing ? vec3(1.0) : vec3(-1.0);
      if (mode == 2) { result = vec4(0.5 + 0.5 * normalize(world_normal) * side, 1.0); return; }
      vec3 n = normalize(eye_normal) * side;
      float key = max(dot(n, normalize(vec3(-0.4, 0.7, 0.8))), 0.0);
      float fill = max(dot(n, normalize(vec3(0.8, 0.1, 0.5))), 0.0);
      float sky = 0.7 + 0.3 * n.y;
      float shine = pow(max(dot(n, normalize(vec3(-0.2, 0.4, 1.0))), 0.0), 40.0);
      vec3 light = vec3(1.5) * key + vec3(0.45, 0.5, 0.6) * fill + vec3(0.35, 0.4, 0.48) * sky;
      result = vec4(encode(color * light + 0.06 * shine), 1.0);
    }`;

  const STYLE = `
    :host { display: block; position: relative; min-height: 16rem; height: 26rem;
      background: linear-gradient(#f7f9fb, #dde3ea); border-radius: 8px; overflow: hidden; }
    canvas { display: block; width: 100%; height: 100%; touch-action: none; cursor: grab; }
    canvas:active { cursor: grabbing; }
    canvas:focus-visible { outline: 3px solid #2563eb; outline-offset: -3px; }
    .modes { position: absolute; top: 8px; left: 8px; display: flex; gap: 2px; padding: 2px;
      border: 0; margin: 0; background: #ffffffd9; border-radius: 8px; }
    .modes button { font: 600 13px system-ui, sans-serif; padding: 6px 10px; min-height: 32px;
      border: 0; border-radius: 6px; background: none; color: #1f2937; cursor: pointer; }
    .modes button[aria-pressed="true"] { background: #1d4ed8; color: #fff; }
    .modes button:focus-visible { outline: 3px solid #2563eb; outline-offset: 1px; }
    .note { position: absolute; right: 8px; bottom: 8px; margin: 0; padding: 2px 8px;
      font: 12px system-ui, sans-serif; color: #1f2937; background: #ffffffd9;
      border-radius: 6px; }
    .note:empty { display: none; }`;

  // Returns {positions, normals, indices, groups} of all primitives of a GLB. A group is a run of
  // indices of one colour.
  function readGlb(buffer) {
    const header = new DataView(buffer);
    if (buffer.byteLength < 20 || header.getUint32(0, true) !== 0x46546c67) {
      throw new Error("the file is no binary glTF file");
    }
    const jsonLength = header.getUint32(12, true);
    const json = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, jsonLength)));
    const binary = 20 + jsonLength + 8;
    const read = (number) => {
      const accessor = json.accessors[number];
      const view = json.bufferViews[accessor.bufferView];
      const Component = COMPONENTS[accessor.componentType];
      const width = WIDTHS[accessor.type];
      if (!Component || !width || (view.byteStride || 0) > width * Component.BYTES_PER_ELEMENT) {
        throw new Error("the file has an unsupported accessor");
      }
      const start = binary + (view.byteOffset || 0) + (accessor.byteOffset || 0);
      const size = accessor.count * width * Component.BYTES_PER_ELEMENT;
      return new Component(buffer.slice(start, start + size));
    };
    const parts = json.meshes.flatMap((mesh) => mesh.primitives).map((primitive) => {
      const positions = read(primitive.attributes.POSITION);
      const indices = primitive.indices === undefined
        ? Uint32Array.from({ length: positions.length / 3 }, (_, i) => i)
        : Uint32Array.from(read(primitive.indices));
      const normals = primitive.attributes.NORMAL === undefined
        ? vertexNormals(positions, indices) : read(primitive.attributes.NORMAL);
      const material = (json.materials || [])[primitive.material] || {};
      const color = (material.pbrMetallicRoughness || {}).baseColorFactor || [0.3, 0.38, 0.48, 1];
      return { positions, normals, indices, color: color.slice(0, 3) };
    });
    const total = (name) => parts.reduce((sum, part) => sum + part[name].length, 0);
    const mesh = {
      positions: new Float32Array(total("positions")),
      normals: new Float32Array(total("positions")),
      indices: new Uint32Array(total("indices")),
      groups: [],
    };
    let vertex = 0;
    let index = 0;
    for (const part of parts) {
      mesh.positions.set(part.positions, 3 * vertex);
      mesh.normals.set(part.normals, 3 * vertex);
      for (let i = 0; i < part.indices.length; i++) {
        mesh.indices[index + i] = part.indices[i] + vertex;
      }
      mesh.groups.push({ first: index, count: part.indices.length, color: part.color });
      vertex += part.positions.length / 3;
      index += part.indices.length;
    }
    return mesh;
  }

  // Returns the sum of the area vectors of the faces at each vertex.
  function vertexNormals(p, indices) {
    const normals = new Float32Array(p.length);
    for (let i = 0; i < indices.length; i += 3) {
      const [a, b, c] = [3 * indices[i], 3 * indices[i + 1], 3 * indices[i + 2]];
      const u = [p[b] - p[a], p[b + 1] - p[a + 1], p[b + 2] - p[a + 2]];
      const v = [p[c] - p[a], p[c + 1] - p[a + 1], p[c + 2] - p[a + 2]];
      const n = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
      for (const corner of [a, b, c]) {
        for (let k = 0; k < 3; k++) normals[corner + k] += n[k];
      }
    }
    return normals;
  }

  // Returns pairs of vertices: every edge once. Both directions of an edge have one key.
  function edgesOf(indices, vertices) {
    const keys = new Float64Array(indices.length);
    for (let i = 0; i < indices.length; i++) {
      const next = indices[i % 3 === 2 ? i - 2 : i + 1];
      keys[i] = Math.min(indices[i], next) * vertices + Math.max(indices[i], next);
    }
    keys.sort();
    const lines = new Uint32Array(2 * keys.length);
    let size = 0;
    for (let i = 0; i < keys.length; i++) {
      if (keys[i] === keys[i - 1]) continue;
      lines[size++] = Math.floor(keys[i] / vertices);
      lines[size++] = keys[i] % vertices;
    }
    return lines.subarray(0, size);
  }

  function bounds(positions) {
    const low = [Infinity, Infinity, Infinity];
    const high = [-Infinity, -Infinity, -Infinity];
    for (let i = 0; i < positions.length; i++) {
      low[i % 3] = Math.min(low[i % 3], positions[i]);
      high[i % 3] = Math.max(high[i % 3], positions[i]);
    }
    const center = low.map((value, k) => (value + high[k]) / 2);
    const radius = Math.hypot(...high.map((value, k) => (value - low[k]) / 2)) || 1;
    return { center, radius };
  }

  class MeshViewer extends HTMLElement {
    static observedAttributes = ["src", "label"];

    constructor() {
      super();
      this.attachShadow({ mode: "open" });
      this.mode = "shaded";
      this.camera = { ...START };
      this.pointers = new Map();
    }

    connectedCallback() {
      if (!this.canvas) this.build();
      this.resizeObserver = new ResizeObserver(() => this.draw());
      this.resizeObserver.observe(this);
      if (this.mesh) this.draw();
      else this.load();
    }

    disconnectedCallback() {
      this.resizeObserver.disconnect();
      // Browsers keep few WebGL contexts, so a viewer that left the page frees its own.
      const extension = this.gl && this.gl.getExtension("WEBGL_lose_context");
      if (extension) extension.loseContext();
      this.gl = this.canvas = this.mesh = null;
      this.shadowRoot.replaceChildren();
    }

    attributeChangedCallback(name, before, after) {
      if (!this.canvas || before === after) return;
      if (name === "src") this.load();
      else this.canvas.setAttribute("aria-label", after);
    }

    build() {
      const style = document.createElement("style");
      style.textContent = STYLE;
      this.canvas = document.createElement("canvas");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", this.getAttribute("label") || "3D view of the mesh");
      const modes = document.createElement("div");
      modes.className = "modes";
      modes.setAttribute("role", "group");
      modes.setAttribute("aria-label", "Display of the mesh");
      this.buttons = MODES.map(([mode, text]) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = text;
        button.addEventListener("click", () => this.show(mode));
        modes.append(button);
        return [mode, button];
      });
      this.note = document.createElement("p");
      this.note.className = "note";
      this.note.setAttribute("role", "status");
      this.shadowRoot.replaceChildren(style, this.canvas, modes, this.note);
      this.listen();
      this.show(this.mode);
      this.start();
    }

    start() {
      const gl = this.gl = this.canvas.getContext("webgl2", { antialias: true, alpha: true });
      if (!gl) {
        this.note.textContent = "This browser has no WebGL 2, so the mesh cannot be shown.";
        return;
      }
      const program = this.program = gl.createProgram();
      for (const [kind, text] of [
        [gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER],
      ]) {
        const shader = gl.createShader(kind);
        gl.shaderSource(shader, text);
        gl.compileShader(shader);
        if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) {
          throw new Error(gl.getShaderInfoLog(shader));
        }
        gl.attachShader(program, shader);
      }
      gl.linkProgram(program);
      this.uniforms = Object.fromEntries(["view", "projection", "mode", "color"].map(
        (name) => [name, gl.getUniformLocation(program, name)]));
    }

    async load() {
      const source = this.getAttribute("src");
      this.dataset.state = "loading";
      if (!source) return;
      this.note.textContent = "Loading the mesh";
      try {
        const response = await fetch(source);
        if (!response.ok) {
          const answer = await response.json().catch(() => ({}));
          throw new Error(answer.detail || `the server answered ${response.status}`);
        }
        const mesh = readGlb(await response.arrayBuffer());
        if (source !== this.getAttribute("src") || !this.canvas) return; // another one was chosen
        this.set(mesh);
      } catch (error) {
        this.dataset.state = "failed";
        if (this.note) this.note.textContent = `The mesh cannot be shown: ${error.message}`;
      }
    }

    set(mesh) {
      const gl = this.gl;
      if (!gl) return;
      const lines = edgesOf(mesh.indices, mesh.positions.length / 3);
      this.mesh = { ...mesh, ...bounds(mesh.positions), lines };
      this.camera = { ...START };
      this.array = gl.createVertexArray();
      gl.bindVertexArray(this.array);
      for (const [name, values] of [["position", mesh.positions], ["normal", mesh.normals]]) {
        const place = gl.getAttribLocation(this.program, name);
        gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
        gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
        gl.enableVertexAttribArray(place);
        gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
      }
      gl.bindVertexArray(null);
      const upload = (values) => {
        const buffer = gl.createBuffer();
        gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, buffer);
        gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, values, gl.STATIC_DRAW);
        return buffer;
      };
      this.faceBuffer = upload(mesh.indices);
      this.lineBuffer = upload(this.mesh.lines);
      const count = (mesh.indices.length / 3).toLocaleString("en");
      this.note.textContent = `${count} faces`;
      this.dataset.state = "ready";
      this.draw();
    }

    show(mode) {
      this.mode = mode;
      this.dataset.mode = mode;
      for (const [name, button] of this.buttons) {
        button.setAttribute("aria-pressed", String(name === mode));
      }
      this.draw();
    }

    draw() {
      if (this.pending || !this.mesh || !this.gl) return;
      this.pending = requestAnimationFrame(() => {
        this.pending = null;
        if (this.mesh && this.gl) this.paint();
      });
    }

    paint() {
      const { gl, mesh, camera, uniforms } = this;
      const scale = Math.min(window.devicePixelRatio || 1, 2);
      const width = Math.max(1, Math.round(this.clientWidth * scale));
      const height = Math.max(1, Math.round(this.clientHeight * scale));
      if (this.canvas.width !== width || this.canvas.height !== height) {
        this.canvas.width = width;
        this.canvas.height = height;
      }
      gl.viewport(0, 0, width, height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      gl.enable(gl.DEPTH_TEST);
      gl.useProgram(this.program);
      const aspect = width / height;
      const fit = mesh.radius / Math.sin(FIELD_OF_VIEW / 2) / Math.min(1, aspect);
      const distance = fit * camera.distance;
      gl.uniformMatrix4fv(uniforms.view, false, this.viewMatrix(distance));
      gl.uniformMatrix4fv(uniforms.projection, false, this.projectionMatrix(aspect, distance));
      gl.bindVertexArray(this.array);
      const mode = MODES.findIndex(([name]) => name === this.mode);
      gl.uniform1i(uniforms.mode, mode);
      if (this.mode === "wireframe") {
        gl.uniform3f(uniforms.color, 0.11, 0.2, 0.36);
        gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.lineBuffer);
        gl.drawElements(gl.LINES, mesh.lines.length, gl.UNSIGNED_INT, 0);
      } else {
        gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.faceBuffer);
        for (const group of mesh.groups) {
          gl.uniform3f(uniforms.color, ...group.color);
          gl.drawElements(gl.TRIANGLES, group.count, gl.UNSIGNED_INT, 4 * group.first);
        }
      }
      gl.bindVertexArray(null);
    }

    viewMatrix(distance) {
      const { azimuth, elevation, x, y } = this.camera;
      const [sa, ca] = [Math.sin(azimuth), Math.cos(azimuth)];
      const [se, ce] = [Math.sin(elevation), Math.cos(elevation)];
      // Rows: right, up and backward of the camera, which looks at the centre of the mesh.
      const rows = [[ca, 0, -sa], [-sa * se, ce, -ca * se], [sa * ce, se, ca * ce]];
      const radius = this.mesh.radius;
      const moved = [x * radius, y * radius, -distance];
      const t = rows.map((row, i) =>
        moved[i] - row.reduce((sum, value, k) => sum + value * this.mesh.center[k], 0));
      return new Float32Array([
        rows[0][0], rows[1][0], rows[2][0], 0, rows[0][1], rows[1][1], rows[2][1], 0,
        rows[0][2], rows[1][2], rows[2][2], 0, t[0], t[1], t[2], 1,
      ]);
    }

    projectionMatrix(aspect, distance) {
      const radius = this.mesh.radius;
      const near = Math.max(distance - 2 * radius, 0.01 * radius);
      const far = distance + 2 * radius;
      const f = 1 / Math.tan(FIELD_OF_VIEW / 2);
      return new Float32Array([
        f / aspect, 0, 0, 0, 0, f, 0, 0,
        0, 0, (far + near) / (near - far), -1, 0, 0, 2 * far * near / (near - far), 0,
      ]);
    }

    turn(dx, dy) {
      this.camera.azimuth -= dx;
      const elevation = this.camera.elevation + dy;
      this.camera.elevation = Math.max(-MAX_ELEVATION, Math.min(MAX_ELEVATION, elevation));
      this.draw();
    }

    zoom(factor) {
      this.camera.distance = Math.max(0.15, Math.min(6, this.camera.distance * factor));
      this.draw();
    }

    listen() {
      const { canvas, pointers } = this;
      const spread = () => {
        const [a, b] = [...pointers.values()];
        return Math.hypot(a.x - b.x, a.y - b.y) || 1;
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      });
      canvas.addEventListener("pointermove", (event) => {
        const last = pointers.get(event.pointerId);
        if (!last) return;
        const before = pointers.size === 2 ? spread() : 0;
        const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
        pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
        if (before) this.zoom(before / spread());
        else if (event.shiftKey || event.buttons === 2) {
          this.camera.x += 2 * dx / this.clientHeight;
          this.camera.y -= 2 * dy / this.clientHeight;
          this.draw();
        } else this.turn(0.01 * dx, 0.01 * dy);
      });
      for (const name of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
      }
      canvas.addEventListener("contextmenu", (event) => event.preventDefault());
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.zoom(Math.exp(0.001 * event.deltaY));
      }, { passive: false });
      canvas.addEventListener("keydown", (event) => {
        const actions = {
          ArrowLeft: () => this.turn(-0.15, 0), ArrowRight: () => this.turn(0.15, 0),
          ArrowUp: () => this.turn(0, -0.15), ArrowDown: () => this.turn(0, 0.15),
          "+": () => this.zoom(0.85), "-": () => this.zoom(1 / 0.85),
          Home: () => { this.camera = { ...START }; this.draw(); },
        };
        if (actions[event.key]) {
          event.preventDefault();
          actions[event.key]();
        }
      });
      canvas.addEventListener("webglcontextlost", (event) => {
        event.preventDefault();
        if (this.note) this.note.textContent = "The view was interrupted. Reload the page.";
      });
    }
  }

  if (!customElements.get("mesh-viewer")) customElements.define("mesh-viewer", MeshViewer);
})();
