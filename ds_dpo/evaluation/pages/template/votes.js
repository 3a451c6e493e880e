// Votes: which pairs a rater sees, on which sides; how votes are kept in the browser, written and read.

const KEPT = "ds_dpo votes";
const OUTCOMES = { 0: "model_0", 1: "model_1", 0.5: "tie" };

/** The pairs of a session in its order, and for each whether model 0 is on the left.
 *
 * The seed alone chooses the pairs, so that raters share them; seed and rater give order and sides.
 */
function planOf({ model, against, rater, number: size, seed, set }) {
  const pairs = pairsOf(model, against).filter((pair) => set === "" || pair.prompt.set === Number(set));
  const name = `${data.evaluation}|${labelOf(model)}|${labelOf(against)}|${seed}`;
  const chosen = shuffled(pairs, generatorOf(name)).slice(0, size);
  const draw = generatorOf(`${name}|${rater}`);
  return shuffled(chosen, draw).map((pair) => ({ pair, left: draw() < 0.5 ? 0 : 1 }));
}

function keyOfSession({ rater, model, against, number: size, seed, set }) {
  const place = set === "" ? "all" : data.sets[set];
  return JSON.stringify([KEPT, data.evaluation, rater, labelOf(model), labelOf(against), size, seed, place]);
}

/** Keep a session's outcomes. Returns false if the browser keeps nothing for this page. */
function keepSession(session) {
  try {
    localStorage.setItem(keyOfSession(session), JSON.stringify({ session, outcomes: session.outcomes }));
    return true;
  } catch {
    return false;
  }
}

/** The sessions of this evaluation that the browser keeps. */
function keptSessions() {
  const sessions = [];
  try {
    for (let place = 0; place < localStorage.length; place += 1) {
      const key = localStorage.key(place);
      if (!key.startsWith(JSON.stringify([KEPT, data.evaluation]).slice(0, -1))) continue;
      const { session, outcomes } = JSON.parse(localStorage.getItem(key));
      if (Array.isArray(outcomes) && keyOfSession(session) === key) sessions.push({ ...session, outcomes });
    }
  } catch {
    return sessions; // the browser keeps nothing, or another program wrote there
  }
  return sessions;
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
  return planOf(session).flatMap(({ pair, left }, place) => {
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
    model_0: labelOf(session.model),
    model_1: labelOf(session.against),
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
function readVotes(text, { model, against }) {
  const pairs = new Map(pairsOf(model, against).flatMap((pair) => [
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
