// Views, models, keys: what holds the parts together.

const VIEWS = {
  summary: { show: showSummary, key: () => false, leave: () => byId("summary").replaceChildren() },
  gallery: { show: showGallery, key: galleryKey, leave: clearGallery },
  blind: { show: showBlind, key: blindKey, leave: leaveBlind },
};
let view = "summary";

const KEYS = [
  ["1 2 3", "summary, gallery, blind vote"],
  ["← → ↑ ↓", "gallery: move the mark"],
  ["space, enter", "gallery: open the marked pair"],
  ["/", "gallery: search"],
  ["← →", "open pair: the one before, the next"],
  ["space", "open pair: flip between both images"],
  ["s", "open pair: slider, or side by side"],
  ["+ − 0", "open pair: zoom"],
  ["← → ↑", "blind vote: left, right, tie"],
  ["backspace", "blind vote: undo"],
  ["esc", "close"],
];

function showView(name) {
  if (name !== view) VIEWS[view].leave();
  view = name;
  for (const tab of document.querySelectorAll("[data-view]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.view === name));
    byId(tab.dataset.view).hidden = tab.dataset.view !== name;
  }
  document.body.dataset.view = name;
  window.scrollTo(0, 0);
  VIEWS[name].show();
}

function chooseModels() {
  document.body.classList.toggle("alone", isAlone);
  const options = data.models.map(({ label }, place) => [place, label]);
  const last = data.comparisons.at(-1)?.model;  // the model that was named last is the one in question
  const shown = data.comparisons.find((comparison) => comparison.model === last);
  const place = (label, otherwise) => Math.max(data.models.findIndex((model) => model.label === label), otherwise);
  state.model = shown ? place(shown.model, 0) : data.models.length - 1;
  state.against = shown ? place(shown.against, 0) : 0;
  for (const name of ["model", "against"]) {
    const select = byId(name);
    fillSelect(select, options, state[name]);
    select.addEventListener("change", () => {
      const other = name === "model" ? "against" : "model";
      const [before, after] = [state[name], Number(select.value)];
      state[name] = after;
      if (state[other] === after) {  // the two change places
        state[other] = before;
        byId(other).value = String(before);
      }
      VIEWS[view].show();
    });
  }
}

function showHelp() {
  const help = byId("help");
  help.replaceChildren(make("h2", {}, "Keys"),
    make("dl", { class: "keys" }, KEYS.flatMap(([key, text]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, text)])),
    make("button", { type: "button", class: "main", onclick: () => help.close() }, "Close"));
  if (!help.open) help.showModal();
}

function onKey(event) {
  const isText = event.target.matches?.("input:not([type=checkbox]), textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || isText) return;
  const views = Object.keys(VIEWS);
  let done = true;
  if (event.key === "?") showHelp();
  else if (byId("viewer").open) done = viewerKey(event);
  else if (views[Number(event.key) - 1] && !isVoting() && !(isAlone && event.key === "3")) showView(views[Number(event.key) - 1]);
  else if (event.target.matches?.("button, summary, a") && (event.key === " " || event.key === "Enter")) done = false;
  else done = VIEWS[view].key(event);
  if (done) event.preventDefault();
}

let waiting = false;
function soon(act) {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    act();
  });
}

for (const tab of document.querySelectorAll("[data-view]")) tab.addEventListener("click", () => showView(tab.dataset.view));
byId("help-button").addEventListener("click", showHelp);
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
document.addEventListener("keydown", onKey);
window.addEventListener("scroll", () => soon(showInView), { passive: true });
window.addEventListener("resize", () => soon(layOut));
chooseModels();
showView("summary");
