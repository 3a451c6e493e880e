// Votes: which pairs a rater sees, on which sides; how votes are kept in the browser, written and read.

const KEPT = "ds_dpo votes";
const OUTCOMES = { 0: "model_0", 1: "model_1", 0.5: "tie" };

/** A session is {rater, model, against, number, seed, set, plan, outcomes}; models and set by their names.
 *
 * plan: its pairs in order, and which model is on the left. outcomes: one for each pair so far, 0 or 1 for the model
 * that won, 0.5 for a tie, null for a pair of which an image is missing.
 */
const pairsOfSession = ({ model, against }) => pairsOf(placeOf(model), placeOf(against));

const placeOf = (label) => data.models.findIndex((model) => model.label === label);

/** The seed alone chooses the pairs, so that raters share them; seed and rater give order and sides. */
function planOf({ model, against, rater, number: size, seed, set }) {
  const pairs = pairsOfSession({ model, against }).filter((pair) => set === "" || data.sets[pair.prompt.set] === set);
  const name = `${data.evaluation}|${model}|${against}|${seed}`;
  const chosen = shuffled(pairs, generatorOf(name)).slice(0, size);
  const draw = generatorOf(`${name}|${rater}`);
  return shuffled(chosen, draw).map((pair) => ({ pair, left: draw() < 0.5 ? 0 : 1 }));
}

function keyOfSession({ rater, model, against, number: size, seed, set }) {
  return JSON.stringify([KEPT, data.evaluation, rater, model, against, size, seed, set]);
}

const markOf = (image) => `${image.path} ${image.sha256.slice(0, 16)}`;

/** Keep a session: the plan with it, since an evaluation may get more prompts later. False if the browser keeps nothing. */
function keepSession(session) {
  const plan = session.plan.map(({ pair, left }) => [markOf(pair.ours), markOf(pair.theirs), left]);
  try {
    localStorage.setItem(keyOfSession(session), JSON.stringify({ ...session, plan }));
    return true;
  } catch {
    return false;
  }
}

/** The sessions of this evaluation that the browser keeps. */
function keptSessions() {
  const start = JSON.stringify([KEPT, data.evaluation]).slice(0, -1);
  try {
    const keys = Array.from({ length: localStorage.length }, (_, place) => localStorage.key(place));
    return keys.filter((key) => key.startsWith(start)).map((key) => restored(key, localStorage.getItem(key))).filter(Boolean);
  } catch {
    return []; // the browser keeps nothing
  }
}

/** Return a kept session without the pairs whose images have changed or are gone; null if it is damaged. */
function restored(key, text) {
  try {
    const session = JSON.parse(text);
    if (keyOfSession(session) !== key || placeOf(session.model) < 0 || placeOf(session.against) < 0) return null;
    const found = new Map(pairsOfSession(session).map((pair) => [`${markOf(pair.ours)}|${markOf(pair.theirs)}`, pair]));
    const all = session.plan.map(([ours, theirs, left], place) => ({
      pair: found.get(`${ours}|${theirs}`), left, outcome: session.outcomes[place],
    }));
    const plan = all.filter(({ pair }) => pair);
    const outcomes = plan.map(({ outcome }) => outcome).filter((outcome) => outcome !== undefined);
    return { ...session, plan, outcomes };
  } catch {
    return null;
  }
}

function forgetSession(session) {
  try {
    localStorage.removeItem(keyOfSession(session));
  } catch {
    // nothing was kept
  }
}

/** The votes of a session: pairs with an outcome of 0, 1 or 0.5, the model that won or a tie. */
function votesOf(session) {
  return session.plan.flatMap(({ pair, left }, place) => {
    const outcome = session.outcomes[place];
    return isNumber(outcome) ? [{ pair, left, outcome, place, prompt: pair.ours.prompt, rater: session.rater }] : [];
  });
}

/** A session as JSON lines: each vote is a row of a preference file, label 1 if image 0 is the better one. */
function linesOf(session) {
  return votesOf(session).map(({ pair, left, outcome, place }) => JSON.stringify({
    prompt: pair.prompt.text,
    image_0: pair.ours.path,
    image_1: pair.theirs.path,
    label: 1 - outcome,
    model_0: session.model,
    model_1: session.against,
    outcome: OUTCOMES[outcome],
    rater: session.rater,
    evaluation: data.evaluation,
    shuffle_seed: session.seed,
    place,
    left: `model_${left}`,
    sha256_0: pair.ours.sha256,
    sha256_1: pair.theirs.sha256,
    image_seed: pair.seed,
    prompt_set: data.sets[pair.prompt.set],
    category: data.categories[pair.prompt.category] ?? null,
  })).join("\n") + "\n";
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

const fileNameOf = ({ rater }) => `votes-${rater.replaceAll(/[^\p{L}\p{N}_-]+/gu, "_").slice(0, 60) || "rater"}.jsonl`;

/** Read a vote file for the two models of a session: {votes, problem}. Rows that do not belong are counted. */
function readVotes(text, session) {
  const pairs = new Map(pairsOfSession(session).flatMap((pair) => [
    [JSON.stringify([pair.ours.path, pair.theirs.path]), { pair, turned: false }],
    [JSON.stringify([pair.theirs.path, pair.ours.path]), { pair, turned: true }],
  ]));
  const votes = [];
  const left = { foreign: 0, damaged: 0, changed: 0 };
  for (const line of text.split("\n")) {
    if (!line.trim()) continue;
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      row = null;
    }
    if (!row || ![0, 0.5, 1].includes(row.label) || typeof row.rater !== "string") left.damaged += 1;
    else if (row.evaluation !== data.evaluation) left.foreign += 1;
    else {
      const found = pairs.get(JSON.stringify([row.image_0, row.image_1]));
      const hashes = found && (found.turned ? [found.pair.theirs, found.pair.ours] : [found.pair.ours, found.pair.theirs]);
      if (!found) left.foreign += 1;
      else if (hashes[0].sha256 !== row.sha256_0 || hashes[1].sha256 !== row.sha256_1) left.changed += 1;
      else {
        const outcome = found.turned ? row.label : 1 - row.label;
        votes.push({ pair: found.pair, outcome, prompt: found.pair.ours.prompt, rater: row.rater });
      }
    }
  }
  const words = [[left.foreign, "of other models or another evaluation"], [left.damaged, "damaged"], [left.changed, "of changed images"]];
  const problem = words.filter(([size]) => size).map(([size, what]) => `${counted(size, "row")} ${what}`).join(", ");
  return { votes, problem };
}
