// The gallery: filters, orders, and a grid that holds elements only for the cards in view.

const GAP = 16;
const TEXT_HEIGHT = 116;
const LEAST_CARD = 330;
const gallery = { scorer: 0, search: "", set: "", category: "", winner: "", agreement: "", order: "ahead", shown: [], at: 0 };

const ORDERS = {
  ahead: ["model furthest ahead", (one, other) => leadFor(other) - leadFor(one)],
  behind: ["rival furthest ahead", (one, other) => leadFor(one) - leadFor(other)],
  close: ["closest first", (one, other) => Math.abs(leadFor(one)) - Math.abs(leadFor(other))],
  disagreement: ["scorers disagree most", (one, other) =>
    other.disagreement - one.disagreement || other.spread - one.spread],
  place: ["as evaluated", (one, other) => one.place - other.place],
};

if (isAlone) {
  for (const name of ["close", "disagreement"]) delete ORDERS[name];
  ORDERS.ahead[0] = "best score first";
  ORDERS.behind[0] = "worst score first";
}

function leadFor(pair) {
  const own = isAlone ? (pair.ours.scores[gallery.scorer] ?? 0) * data.scorers[gallery.scorer]?.better : null;
  return own ?? pair.leads[gallery.scorer] ?? 0;
}

function showGallery() {
  const section = byId("gallery");
  section.replaceChildren(filterBar(), make("p", { id: "found", class: "dim", role: "status" }),
    make("div", { id: "grid", tabindex: "0", role: "listbox", "aria-label": "Pairs" }));
  refilter();
}

/** Take all pictures out of the page, as blind votes need it. */
function clearGallery() {
  byId("gallery").replaceChildren();
}

function filterBar() {
  const choose = (name) => (event) => {
    gallery[name] = name === "scorer" ? Number(event.target.value) : event.target.value;
    refilter();
  };
  const named = (names) => [["", "all"], ...names.map((name, place) => [place, name])];
  const scorers = data.scorers.map(({ name }, place) => [place, name]);
  const orders = Object.entries(ORDERS).map(([value, [title]]) => [value, title]);
  const winners = [["", "any"], ["1", labelOf(state.model)], ["-1", labelOf(state.against)], ["0", "tie"]];
  const agreements = [["", "any"], ["no", "scorers disagree"], ["yes", "scorers agree"]];
  return make("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    make("label", { class: "field search" }, make("span", {}, "Search"),
      make("input", { id: "search", type: "search", value: gallery.search, placeholder: "words of a prompt",
        oninput: choose("search") })),
    selectOf("scorer", "Scorer", scorers, gallery.scorer, choose("scorer")),
    selectOf("order", "Order", orders, gallery.order, choose("order")),
    isAlone ? null : selectOf("winner", "Winner", winners, gallery.winner, choose("winner")),
    !isAlone && data.scorers.length > 1 ? selectOf("agreement", "Scorers", agreements, gallery.agreement, choose("agreement")) : null,
    data.sets.length > 1 ? selectOf("set", "Prompts", named(data.sets), gallery.set, choose("set")) : null,
    data.categories.length ? selectOf("category", "Category", named(data.categories), gallery.category, choose("category")) : null);
}

function refilter() {
  const words = gallery.search.toLowerCase().split(/\s+/).filter(Boolean);
  const all = pairsOf(state.model, state.against);
  const tests = [
    words.length && ((pair) => words.every((word) => pair.prompt.lower.includes(word))),
    gallery.set !== "" && ((pair) => pair.prompt.set === Number(gallery.set)),
    gallery.category !== "" && ((pair) => pair.prompt.category === Number(gallery.category)),
    gallery.winner !== "" && ((pair) => winnerOf(pair, gallery.scorer) === Number(gallery.winner)),
    gallery.agreement !== "" && ((pair) => (pair.disagreement > 0) === (gallery.agreement === "no")),
  ].filter(Boolean);
  gallery.shown = all.filter((pair) => tests.every((test) => test(pair))).sort(ORDERS[gallery.order][1]);
  gallery.at = 0;
  const size = counted(all.length, isAlone ? "image" : "pair");
  byId("found").textContent = gallery.shown.length === all.length ? size : `${count(gallery.shown.length)} of ${size}`;
  layOut();
}

const layout = { columns: 1, width: 0, height: 0, first: -1, last: -1 };

/** Size the grid for its width and number of pairs, then put in the cards in view. */
function layOut() {
  const grid = byId("grid");
  if (!grid) return;
  const width = grid.clientWidth;
  layout.columns = Math.max(1, Math.floor((width + GAP) / (LEAST_CARD + GAP)));
  layout.width = (width - GAP * (layout.columns - 1)) / layout.columns;
  layout.height = Math.round((layout.width - 3) / (isAlone ? 1 : 2) + TEXT_HEIGHT);
  layout.first = layout.last = -1;
  const rows = Math.ceil(gallery.shown.length / layout.columns);
  grid.style.height = `${Math.max(0, rows * (layout.height + GAP) - GAP)}px`;
  showInView();
}

function showInView() {
  const grid = byId("grid");
  if (!grid) return;
  const top = -grid.getBoundingClientRect().top;
  const step = layout.height + GAP;
  const first = Math.max(0, Math.floor(top / step) - 1) * layout.columns;
  const last = Math.min(gallery.shown.length, (Math.ceil((top + window.innerHeight) / step) + 1) * layout.columns);
  if (first === layout.first && last === layout.last) return;
  const kept = new Map([...grid.children].map((card) => [Number(card.dataset.at), card]));
  const fresh = layout.first === -1;
  [layout.first, layout.last] = [first, last];
  const cards = [];
  for (let at = first; at < last; at += 1) cards.push((!fresh && kept.get(at)) || pairCard(at));
  grid.replaceChildren(...cards);
}

function pairCard(at) {
  const pair = gallery.shown[at];
  const winner = winnerOf(pair, gallery.scorer);
  const scored = (image) => number(image.scores[gallery.scorer]);
  const half = (image, side, wins) => make("div", { class: `half ${side}${wins ? " wins" : ""}` }, imageElement(image));
  const card = make("article", { class: `pair${at === gallery.at ? " at" : ""}`, "data-at": at, role: "option",
    "aria-label": pair.prompt.text, onclick: () => { gallery.at = at; markAt(); openViewer(at); } },
    make("div", { class: "both" }, half(pair.ours, "ours", winner === 1), half(pair.theirs, "theirs", winner === -1)),
    make("div", { class: "scores" },
      make("span", { class: winner === 1 ? "ours-text strong" : "" }, scored(pair.ours)),
      make("span", { class: "badge theirs" }, winner === 0 ? "tie" : signed(pair.leads[gallery.scorer])),
      make("span", { class: winner === -1 ? "theirs strong" : "theirs" }, scored(pair.theirs))),
    make("p", { class: "prompt" }, pair.prompt.text),
    make("p", { class: "dim small-text line" }, factsOf(pair)));
  card.style.cssText = `left:${(at % layout.columns) * (layout.width + GAP)}px;` +
    `top:${Math.floor(at / layout.columns) * (layout.height + GAP)}px;` +
    `width:${layout.width}px;height:${layout.height}px`;
  return card;
}

function factsOf(pair) {
  const { set, category } = pair.prompt;
  const parts = [data.sets[set], category < 0 ? null : data.categories[category], `seed ${pair.seed}`];
  if (pair.disagreement > 0) parts.push("scorers disagree");
  return parts.filter(Boolean).join(" · ");
}

function markAt() {
  for (const card of byId("grid").children) card.classList.toggle("at", Number(card.dataset.at) === gallery.at);
}

/** Move the mark, and scroll so that its card is in view. */
function moveMark(by) {
  const at = Math.max(0, Math.min(gallery.shown.length - 1, gallery.at + by));
  gallery.at = at;
  const grid = byId("grid");
  const top = grid.getBoundingClientRect().top + Math.floor(at / layout.columns) * (layout.height + GAP);
  const header = document.querySelector(".top").offsetHeight + 12;
  if (top < header) window.scrollBy(0, top - header);
  else if (top + layout.height > window.innerHeight) window.scrollBy(0, top + layout.height + 12 - window.innerHeight);
  showInView();
  markAt();
}

function galleryKey(event) {
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layout.columns, ArrowDown: layout.columns };
  if (event.key in moves) moveMark(moves[event.key]);
  else if ((event.key === " " || event.key === "Enter") && gallery.shown.length) openViewer(gallery.at);
  else if (event.key === "/") byId("search").focus();
  else return false;
  return true;
}
