// Blind votes: set up a session, vote on pairs whose models are hidden, look at the result.

const blind = { session: null, phase: "setup", kept: true, ready: false, imported: [] };

const isVoting = () => view === "blind" && blind.phase === "voting";

function showBlind() {
  document.body.classList.toggle("voting", blind.phase === "voting");
  ({ setup: showSetup, voting: showVoting, result: showResult })[blind.phase]();
}

function showPhase(phase) {
  blind.phase = phase;
  showBlind();
}

function leaveBlind() {
  document.body.classList.remove("voting");
  if (blind.phase === "voting") blind.phase = "setup";
  byId("blind").replaceChildren();
}

function showSetup() {
  const models = data.models.map(({ label }) => [label, label]);
  const most = pairsOf(state.model, state.against).length;
  const field = (id, title, attributes) => make("label", { class: "field" }, make("span", {}, title), make("input", { id, ...attributes }));
  const kept = keptSessions();
  byId("blind").replaceChildren(make("div", { class: "narrow" },
    make("h2", {}, "Blind vote"),
    make("p", { class: "dim" }, "You see pairs of images of the same prompt. Which model drew which image is hidden, and sides are " +
      "shuffled. Raters with the same seed see the same pairs, each in an order of their own."),
    make("form", { class: "card setup", id: "setup", onsubmit: startSession },
      field("rater", "Your name", { required: true, maxlength: 80, autocomplete: "nickname" }),
      make("div", { class: "row" },
        selectOf("vote-model", "Model", models, labelOf(state.model)), selectOf("vote-against", "Rival", models, labelOf(state.against))),
      make("div", { class: "row" },
        field("vote-number", "Number of pairs", { type: "number", min: 1, max: most || 1, value: Math.min(50, most), required: true }),
        field("vote-seed", "Seed", { type: "number", min: 0, max: 4294967295, step: 1, value: 0, required: true }),
        data.sets.length > 1 ? selectOf("vote-set", "Prompts", [["", "all"], ...data.sets.map((name) => [name, name])], "") : null),
      make("p", { id: "setup-problem", class: "problem", role: "alert" }),
      make("button", { class: "main", type: "submit" }, "Start")),
    kept.length ? make("section", {},
      make("h3", {}, "Kept in this browser"),
      make("ul", { class: "sessions" }, kept.map(sessionRow))) : null));
}

function sessionRow(session) {
  const size = session.plan.length;
  const isDone = session.outcomes.length >= size;
  return make("li", { class: "card" },
    make("span", {}, make("strong", {}, session.rater), ` · ${session.model} against ${session.against} · ` +
      `seed ${session.seed} · ${count(session.outcomes.length)} of ${counted(size, "pair")}`),
    make("span", { class: "choices" },
      make("button", { class: "quiet", type: "button", onclick: () => { forgetSession(session); showSetup(); } }, "Delete"),
      make("button", { type: "button", onclick: () => resume(session) }, isDone ? "Result" : "Continue")));
}

function startSession(event) {
  event.preventDefault();
  const session = {
    rater: byId("rater").value.trim(),
    model: byId("vote-model").value,
    against: byId("vote-against").value,
    number: Number(byId("vote-number").value),
    seed: Number(byId("vote-seed").value),
    set: byId("vote-set")?.value ?? "",
    outcomes: [],
  };
  session.plan = session.model === session.against ? [] : planOf(session);
  const problem = !session.rater ? "A name is needed: it is written into the votes."
    : session.model === session.against ? "Two different models are needed."
    : !session.plan.length ? "These two models have no pair of the same prompt and seed." : "";
  byId("setup-problem").textContent = problem;
  if (!problem) resume(keptSessions().find((kept) => keyOfSession(kept) === keyOfSession(session)) ?? session);
}

function resume(session) {
  Object.assign(blind, { session, imported: [] });
  showPhase(session.outcomes.length >= session.plan.length ? "result" : "voting");
}

/** Draw a picture onto a canvas, so that no element names its file, which would name its model. */
function drawOn(canvas, image) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => {
      [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
      canvas.getContext("2d").drawImage(picture, 0, 0);
      showPixels(canvas);
      resolve();
    };
    picture.onerror = reject;
    picture.src = addressOf(image);
  });
}

const sidesOf = ({ pair, left }) => (left === 0 ? [pair.ours, pair.theirs] : [pair.theirs, pair.ours]);

async function showVoting() {
  const place = blind.session.outcomes.length;
  const current = blind.session.plan[place];
  const canvases = [make("canvas", { class: "candidate" }), make("canvas", { class: "candidate" })];
  const button = (id, text, key, side) => make("button", { id, type: "button", class: "vote", onclick: () => vote(side) },
    text, make("kbd", {}, key));
  byId("blind").replaceChildren(make("div", { class: "ballot" },
    make("div", { class: "ballot-top" },
      make("progress", { max: blind.session.plan.length, value: place, "aria-label": "Progress" }),
      make("span", { class: "dim", id: "vote-place" }, `${count(place + 1)} of ${count(blind.session.plan.length)}`)),
    make("p", { class: "prompt whole", id: "vote-prompt" }, current.pair.prompt.text),
    make("div", { class: "candidates" }, canvases.map((canvas, side) =>
      make("div", { class: "candidate-frame", onclick: () => vote(side === 0 ? "left" : "right") }, canvas))),
    make("div", { class: "ballot-keys" }, button("vote-left", "Left is better", "←", "left"),
      button("vote-tie", "Tie", "↑", "tie"), button("vote-right", "Right is better", "→", "right")),
    make("div", { class: "ballot-more" },
      make("button", { class: "quiet", type: "button", id: "undo", disabled: place === 0, onclick: undo }, "Undo"),
      make("button", { class: "quiet", type: "button", id: "stop", onclick: () => showPhase(place ? "result" : "setup") },
        place ? "Stop and see the result" : "Back"),
      blind.kept ? null : make("span", { class: "problem" },
        "This browser keeps no progress for this page: export before you close it."))));
  blind.ready = false;
  const isCurrent = () => isVoting() && blind.session.outcomes.length === place && canvases[0].isConnected;
  try {
    const [left, right] = sidesOf(current);
    await Promise.all([drawOn(canvases[0], left), drawOn(canvases[1], right)]);
    if (isCurrent()) blind.ready = true;
    document.body.dataset.ready = String(place);
  } catch {
    if (isCurrent()) record(null); // an image is missing: the pair is left out
  }
  const next = blind.session.plan[place + 1];
  if (next) for (const image of sidesOf(next)) new Image().src = addressOf(image);
}

function vote(side) {
  if (!blind.ready) return;
  const { left } = blind.session.plan[blind.session.outcomes.length];
  record({ left, right: 1 - left, tie: 0.5 }[side]);
}

function record(outcome) {
  blind.session.outcomes.push(outcome);
  blind.kept = keepSession(blind.session);
  if (blind.session.outcomes.length >= blind.session.plan.length) blind.phase = "result";
  showBlind();
}

function undo() {
  const { outcomes } = blind.session;
  while (outcomes.length && outcomes.at(-1) === null) outcomes.pop();
  outcomes.pop();
  blind.kept = keepSession(blind.session);
  showPhase("voting");
}

function blindKey(event) {
  if (blind.phase !== "voting" || event.repeat) return false;
  const acts = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowUp: () => vote("tie"), Backspace: undo, u: undo };
  if (!(event.key in acts)) return false;
  acts[event.key]();
  return true;
}
