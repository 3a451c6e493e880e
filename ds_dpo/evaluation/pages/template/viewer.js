// A pair in full size: side by side, or one above the other behind a slider, with zoom.

const viewer = { at: 0, mode: "beside", split: 50, scale: 1, x: 0, y: 0 };
const MODES = [["beside", "Side by side"], ["slider", "Slider"]];

function openViewer(at) {
  viewer.at = at;
  showPair();
  if (!byId("viewer").open) byId("viewer").showModal();
  byId("viewer").focus();
}

function closeViewer() {
  byId("viewer").close();
}

function showPair() {
  const pair = gallery.shown[viewer.at];
  Object.assign(viewer, { scale: 1, x: 0, y: 0, split: 50 });
  const stage = make("div", { class: `stage ${viewer.mode}`, id: "stage" },
    pane(pair.ours, "ours", labelOf(state.model)),
    pane(pair.theirs, "theirs", labelOf(state.against)),
    viewer.mode === "slider" ? make("div", { class: "handle", "aria-hidden": "true" }) : null);
  stage.addEventListener("pointerdown", startDrag);
  stage.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2); }, { passive: false });
  stage.addEventListener("dblclick", () => zoom(viewer.scale > 1 ? 0 : 2));
  byId("viewer").replaceChildren(viewerBar(), stage, viewerFacts(pair));
  applyZoom();
  for (const near of [gallery.shown[viewer.at + 1], gallery.shown[viewer.at - 1]].filter(Boolean)) {
    for (const image of [near.ours, near.theirs]) new Image().src = addressOf(image); // loaded before it is asked for
  }
}

function pane(image, side, label) {
  return make("figure", { class: `pane ${side}` },
    make("div", { class: "window" }, imageElement(image, { loading: "eager" })),
    make("figcaption", {}, make("span", { class: `dot ${side}` }), label));
}

function viewerBar() {
  const button = (text, label, onclick, more = {}) =>
    make("button", { class: "quiet", type: "button", "aria-label": label, title: label, onclick, ...more }, text);
  return make("div", { class: "viewer-bar" },
    make("div", { class: "group" },
      button("←", "Pair before", () => step(-1)),
      make("span", { class: "dim", id: "viewer-place" }, `${count(viewer.at + 1)} of ${count(gallery.shown.length)}`),
      button("→", "Next pair", () => step(1))),
    make("div", { class: "group segments" }, MODES.map(([mode, title]) =>
      make("button", { type: "button", "aria-pressed": String(mode === viewer.mode), onclick: () => setMode(mode) }, title))),
    make("div", { class: "group" },
      button("−", "Smaller", () => zoom(1 / 1.5)),
      make("span", { class: "dim", id: "zoom-factor" }),
      button("+", "Larger", () => zoom(1.5)),
      button("✕", "Close", closeViewer)));
}

function viewerFacts(pair) {
  const rows = data.scorers.map(({ name }, scorer) => {
    const winner = winnerOf(pair, scorer);
    return make("tr", {},
      make("th", { scope: "row" }, name),
      make("td", { class: `right ${winner === 1 ? "ours-text strong" : ""}` }, number(pair.ours.scores[scorer])),
      make("td", { class: `right ${winner === -1 ? "strong" : ""}` }, number(pair.theirs.scores[scorer])),
      make("td", { class: "right dim" }, winner === 0 ? "tie" : signed(pair.leads[scorer])));
  });
  return make("div", { class: "viewer-facts" },
    make("div", {}, make("p", { class: "prompt whole" }, pair.prompt.text), make("p", { class: "dim small-text" }, factsOf(pair))),
    rows.length ? make("table", {},
      make("thead", {}, make("tr", {}, make("th", {}), make("th", { class: "right" }, shortened(labelOf(state.model), 16)),
        make("th", { class: "right" }, shortened(labelOf(state.against), 16)), make("th", { class: "right" }, "lead"))),
      make("tbody", {}, rows)) : null);
}

function step(by) {
  viewer.at = Math.max(0, Math.min(gallery.shown.length - 1, viewer.at + by));
  gallery.at = viewer.at;
  showPair();
  moveMark(0);
}

function setMode(mode) {
  viewer.mode = mode;
  showPair();
}

function zoom(factor) {
  viewer.scale = factor === 0 ? 1 : Math.max(1, Math.min(16, viewer.scale * factor));
  if (viewer.scale === 1) [viewer.x, viewer.y] = [0, 0];
  applyZoom();
}

function applyZoom() {
  const stage = byId("stage");
  stage.style.setProperty("--scale", viewer.scale);
  stage.style.setProperty("--x", `${viewer.x}px`);
  stage.style.setProperty("--y", `${viewer.y}px`);
  stage.style.setProperty("--split", `${viewer.split}%`);
  byId("zoom-factor").textContent = `${viewer.scale.toFixed(1)}×`;
}

/** Drag moves the slider, or an enlarged picture. */
function startDrag(event) {
  const stage = byId("stage");
  const start = { x: event.clientX - viewer.x, y: event.clientY - viewer.y };
  const drag = (move) => {
    if (viewer.mode === "slider" && viewer.scale === 1) {
      const box = stage.getBoundingClientRect();
      viewer.split = Math.max(0, Math.min(100, (100 * (move.clientX - box.left)) / box.width));
    } else if (viewer.scale > 1) {
      [viewer.x, viewer.y] = [move.clientX - start.x, move.clientY - start.y];
    }
    applyZoom();
  };
  const end = () => {
    stage.removeEventListener("pointermove", drag);
    stage.removeEventListener("pointerup", end);
    stage.removeEventListener("pointercancel", end);
  };
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  stage.addEventListener("pointermove", drag);
  stage.addEventListener("pointerup", end);
  stage.addEventListener("pointercancel", end);
  drag(event);
}

function viewerKey(event) {
  const acts = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => zoom(1.5),
    ArrowDown: () => zoom(1 / 1.5),
    "+": () => zoom(1.5),
    "-": () => zoom(1 / 1.5),
    "0": () => zoom(0),
    s: () => setMode(viewer.mode === "slider" ? "beside" : "slider"),
    " ": flip,
    Escape: closeViewer,
  };
  if (!(event.key in acts)) return false;
  acts[event.key]();
  return true;
}

/** Show the one image, then the other, at the same place. */
function flip() {
  if (viewer.mode !== "slider") {
    viewer.mode = "slider";
    showPair();
    viewer.split = 100;
  } else {
    viewer.split = viewer.split > 50 ? 0 : 100;
  }
  applyZoom();
}
