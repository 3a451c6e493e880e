// The result of blind votes: win rate, agreement with scorers and between raters, export and import.

function showResult() {
  const { session } = blind;
  const own = votesOf(session);
  const left = session.outcomes.filter((outcome) => outcome === null).length;
  const raters = [{ rater: session.rater, votes: own }, ...blind.imported];
  const votes = raters.flatMap((each) => each.votes);
  byId("blind").replaceChildren(make("div", { class: "narrow", id: "result" },
    make("h2", {}, session.model, " against ", session.against),
    make("p", { class: "dim" }, `${counted(own.length, "vote")} of ${session.rater}, seed ${session.seed}` +
      (left ? `; ${counted(left, "pair")} left out, since an image is missing` : "")),
    votes.length ? rateCard(votes) : make("p", {}, "There is no vote."),
    make("div", { class: "actions" },
      make("button", { class: "main", id: "export", type: "button", disabled: !own.length,
        onclick: () => download(fileNameOf(session), linesOf(session)) }, "Export votes"),
      make("label", { class: "button" }, "Add vote files",
        make("input", { id: "import", type: "file", multiple: true, accept: ".jsonl,.json,.txt", class: "visually-hidden",
          onchange: importFiles })),
      session.outcomes.length < blind.session.plan.length
        ? make("button", { type: "button", onclick: () => resume(session) }, "Go on voting") : null,
      session.outcomes.length ? make("button", { class: "quiet", id: "undo", type: "button", onclick: undo }, "Undo the last vote") : null,
      make("button", { class: "quiet", type: "button", onclick: () => showPhase("setup") }, "Another session")),
    make("p", { class: "dim small-text" }, "Put the exported file beside this page, and it is a data set: " +
      `--data.dataset ${fileNameOf(session)} --data.format manifest. scripts/evaluate.py --votes reads it too.`),
    raters.length > 1 ? ratersCard(raters) : null,
    blind.imported.filter((each) => each.problem).map((each) =>
      make("p", { class: "problem" }, `${each.file}: left out ${each.problem}`)),
    data.scorers.length && votes.length ? scorersCard(votes) : null));
}

function rateCard(votes) {
  const { rate, low, high } = winRateOf(votes);
  const byRater = [...ofRaters(votes)];
  const groups = byRater.length > 1 ? [["all raters", votes, null], ...byRater.map(([rater, own]) => [rater, own, rater])]
    : [["all votes", votes, null]];
  const rows = groups.map(([title, own, category]) => {
    const found = winRateOf(own);
    return { title, category, win_rate: found.rate, low: found.low, high: found.high, n: own.length };
  }).filter((row) => isNumber(row.low));
  const sizes = [0, 0.5, 1].map((outcome) => votes.filter((vote) => vote.outcome === outcome).length);
  return make("article", { class: "card scorer" },
    make("p", { class: "big" }, percent(rate), isNumber(low)
      ? make("span", { class: "dim" }, ` ${percent(low)} to ${percent(high)}, 95\u202f% interval over prompts`) : null),
    rows.length ? winRatePlot(rows, rows.map(({ title }) => title), reachOf(rows)) : null,
    make("p", { class: "dim" }, `${counted(sizes[0], "win")}, ${counted(sizes[1], "tie")}, ${counted(sizes[2], "loss", "losses")} of ` +
      `${blind.session.model}; a tie counts half`));
}

function plainTable(id, titles, rows) {
  const cells = (tag, row) => row.map((cell, place) => make(tag, { class: place > 0 ? "right" : "" }, cell));
  return make("div", { class: "scroll" }, make("table", { id }, make("thead", {}, make("tr", {}, cells("th", titles))),
    make("tbody", {}, rows.map((row) => make("tr", {}, cells("td", row))))));
}

function scorersCard(votes) {
  const rows = data.scorers.map(({ name }, scorer) => {
    const { n, same, kappa } = agreementWith(votes, scorer);
    return [name, count(n), percent(same), threeDigits(kappa)];
  });
  return make("article", { class: "card" }, make("h3", {}, "Agreement with scorers"),
    plainTable("with-scorers", ["scorer", "pairs without ties", "same winner", "Cohen's kappa"], rows));
}

function ofRaters(votes) {
  const found = new Map();
  for (const each of votes) found.set(each.rater, [...(found.get(each.rater) ?? []), each]);
  return found;
}

/** Outcomes of each rater by pair; a later vote on the same pair takes the place of an earlier one. */
const byPair = (votes) => new Map(votes.map((each) => [each.pair, each.outcome]));

function ratersCard(raters) {
  const named = [...ofRaters(raters.flatMap((each) => each.votes))].map(([rater, votes]) => [rater, byPair(votes)]);
  const rows = [];
  named.forEach(([one, ofOne], place) => {
    for (const [other, ofOther] of named.slice(place + 1)) {
      const common = [...ofOne.keys()].filter((pair) => ofOther.has(pair));
      const { n, same, kappa } = cohenKappa(common.map((pair) => ofOne.get(pair)), common.map((pair) => ofOther.get(pair)));
      rows.push([`${one} and ${other}`, count(n), percent(same), threeDigits(kappa)]);
    }
  });
  const pairs = new Map();
  for (const [, outcomes] of named) for (const [pair, outcome] of outcomes) pairs.set(pair, [...(pairs.get(pair) ?? []), outcome]);
  const { n, kappa } = fleissKappa([...pairs.values()]);
  return make("article", { class: "card" }, make("h3", {}, "Agreement between raters"),
    plainTable("between-raters", ["raters", "common pairs", "same answer", "Cohen's kappa"], rows),
    named.length > 2 ? make("p", { class: "dim" },
      `Fleiss' kappa ${threeDigits(kappa)} over ${counted(n, "pair")} with two votes or more`) : null);
}

async function importFiles(event) {
  for (const file of event.target.files) {
    const { votes, problem } = readVotes(await file.text(), blind.session);
    blind.imported = blind.imported.filter((each) => each.file !== file.name);
    blind.imported.push({ file: file.name, rater: votes[0]?.rater ?? file.name, votes, problem });
  }
  showResult();
}
