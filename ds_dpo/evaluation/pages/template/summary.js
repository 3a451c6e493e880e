// The summary: warnings, a card with plots for each scorer, the table of all comparisons, settings.

const MOST_ROWS = 40;
const isTable = { categories: false, all: true };

function showSummary() {
  const section = byId("summary");
  const chosen = comparisonsOf(state.model, state.against);
  const scorers = [...new Set([...data.scorers.map(({ name }) => name), ...data.comparisons.map((c) => c.scorer)])];
  const reach = reachOf(chosen);
  section.replaceChildren(
    lead(),
    ...(data.warnings.length ? [warningsBox()] : []),
    make("div", { class: "cards" }, scorers.map((scorer) => scorerCard(scorer, chosen, reach)).filter(Boolean)),
    isAlone ? "" : tableCard(),
    settingsCard(),
  );
}

function lead() {
  const pairs = pairsOf(state.model, state.against);
  if (isAlone) return leadAlone(pairs.length);
  const sets = data.sets.map((name) => `“${name}”`).join(", ");
  return make("div", { class: "lead" },
    make("h2", {}, make("span", { class: "ours-text" }, labelOf(state.model)), " against ", labelOf(state.against)),
    make("p", { class: "dim" },
      `${counted(pairs.length, "pair")} of images from the same prompt and seed, of ` +
      `${counted(new Set(pairs.map((pair) => pair.ours.prompt)).size, "prompt")} of ${sets}. ` +
      "A win rate above 50\u202f% favours the model on the left; a tie counts half. " +
      "Bars are 95\u202f% intervals over prompts."),
    make("p", { class: "dim small-text" }, `Evaluation ${data.evaluation}`),
  );
}

function leadAlone(size) {
  return make("div", { class: "lead" }, make("h2", {}, make("span", { class: "ours-text" }, labelOf(state.model))),
    make("p", { class: "dim" }, `${counted(size, "image")} of one model. Evaluate another one beside it to compare them.`),
    make("p", { class: "dim small-text" }, `Evaluation ${data.evaluation}`));
}

function warningsBox() {
  return make("aside", { class: "warnings", role: "note" },
    make("h3", {}, data.warnings.length === 1 ? "Warning" : `${data.warnings.length} warnings`),
    make("ul", {}, data.warnings.map((text) => make("li", {}, text))));
}

/** The comparisons of two models, turned around where they were made the other way. */
function comparisonsOf(model, against) {
  const [ours, theirs] = [labelOf(model), labelOf(against)];
  return data.comparisons.flatMap((comparison) => {
    if (comparison.model === ours && comparison.against === theirs) return [comparison];
    return comparison.model === theirs && comparison.against === ours ? [turned(comparison)] : [];
  });
}

function turned(comparison) {
  return {
    ...comparison,
    model: comparison.against,
    against: comparison.model,
    win_rate: 1 - comparison.win_rate,
    low: 1 - comparison.high,
    high: 1 - comparison.low,
    mean_difference: -comparison.mean_difference,
    mean_low: -comparison.mean_high,
    mean_high: -comparison.mean_low,
    median_difference: -comparison.median_difference,
  };
}

const titleOf = ({ prompts: set, category }) => category ?? (set === "all" ? "all prompts" : set);

/** Whole sets first, each before its categories. */
function inOrder(comparisons) {
  const sets = [...new Set(comparisons.map((comparison) => comparison.prompts))];
  sets.sort((one, other) => (other === "all") - (one === "all"));
  return sets.flatMap((set) => {
    const rows = comparisons.filter((comparison) => comparison.prompts === set);
    return [...rows.filter((row) => row.category === null), ...rows.filter((row) => row.category !== null)];
  });
}

function scorerCard(name, chosen, reach) {
  if (isAlone) return meanCard(name);
  const rows = inOrder(chosen.filter((comparison) => comparison.scorer === name));
  const place = data.scorers.findIndex((scorer) => scorer.name === name);
  const leads = place < 0 ? [] : pairsOf(state.model, state.against).map((pair) => pair.leads[place]).filter(isNumber);
  if (!rows.length && !leads.length) return null;
  const whole = rows.find((row) => row.category === null);
  const shown = rows.slice(0, MOST_ROWS);
  const lower = place >= 0 && data.scorers[place].better < 0;
  return make("article", { class: "card scorer", "data-scorer": name },
    make("header", {},
      make("h3", {}, name, lower ? make("span", { class: "dim" }, " lower is better") : null),
      whole ? make("p", { class: "big" }, percent(whole.win_rate),
        make("span", { class: "dim" }, ` ${percent(whole.low)} to ${percent(whole.high)}`)) : null,
      whole ? make("p", { class: "dim" }, verdict(whole)) : null),
    shown.length ? winRatePlot(shown, shown.map(titleOf), reach) : null,
    rows.length > MOST_ROWS ? make("p", { class: "dim" }, `The table below has ${rows.length - MOST_ROWS} more rows.`) : null,
    leads.length ? make("figure", {},
      leadsPlot(leads),
      make("figcaption", { class: "dim" }, `Difference of scores in ${counted(leads.length, "pair")}; `,
        make("span", { class: "ours-text" }, "to the right"), ` ${labelOf(state.model)} is better`)) : null);
}

function meanCard(name) {
  const place = data.scorers.findIndex((scorer) => scorer.name === name);
  const scores = images.map((image) => image.scores[place]).filter(isNumber);
  if (!scores.length) return null;
  const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
  return make("article", { class: "card scorer", "data-scorer": name }, make("h3", {}, name),
    make("p", { class: "big" }, number(mean), make("span", { class: "dim" }, " mean score")));
}

/** What the interval and the test say, in words. */
function verdict(comparison) {
  const needed = isNumber(comparison.prompts_needed)
    ? `; about ${counted(comparison.prompts_needed, "prompt")} would show a difference of this size` : "";
  if (comparison.low > 0.5) return `${comparison.model} is ahead: the interval is above 50\u202f%`;
  if (comparison.high < 0.5) return `${comparison.against} is ahead: the interval is below 50\u202f%`;
  return `No clear difference: the interval includes 50\u202f%${needed}`;
}

const COLUMNS = [
  ["model", (row) => row.model],
  ["against", (row) => row.against],
  ["scorer", (row) => row.scorer],
  ["prompts", (row) => row.prompts],
  ["category", (row) => row.category ?? "all"],
  ["pairs", (row) => count(row.n), true],
  ["win rate", (row) => percent(row.win_rate), true],
  ["95\u202f% interval", (row) => `${percent(row.low)} to ${percent(row.high)}`, true],
  ["", (row) => smallInterval(row)],
  ["mean lead", (row) => signed(row.mean_difference), true],
  ["95\u202f% interval", (row) => `${signed(row.mean_low)} to ${signed(row.mean_high)}`, true],
  ["p", (row) => pValue(row.p_value), true],
  ["p, corrected", (row) => pValue(row.adjusted_p_value), true],
  ["prompts needed", (row) => count(row.prompts_needed), true],
];

function tableCard() {
  const choice = (name, text) => make("label", { class: "check" },
    make("input", { type: "checkbox", id: `table-${name}`, checked: isTable[name], onchange: (event) => {
      isTable[name] = event.target.checked;
      byId("table-card").replaceWith(tableCard());
    } }), text);
  const all = isTable.all ? inOrderOfModels() : inOrder(comparisonsOf(state.model, state.against));
  const rows = all.filter((row) => isTable.categories || row.category === null);
  return make("article", { class: "card wide", id: "table-card" },
    make("header", { class: "with-choices" },
      make("h3", {}, "All comparisons"),
      make("div", { class: "choices" }, choice("categories", "categories"), choice("all", "all models"))),
    rows.length ? make("div", { class: "scroll" }, make("table", { id: "comparisons" },
      make("thead", {}, make("tr", {}, COLUMNS.map(([title, , right]) =>
        make("th", { scope: "col", class: right ? "right" : "" }, title)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, COLUMNS.map(([, cell, right]) =>
        make("td", { class: right ? "right" : "" }, cell(row))))))))
      : make("p", { class: "dim" }, "This evaluation compares no models by a scorer."));
}

function inOrderOfModels() {
  const pairs = new Map();
  for (const comparison of data.comparisons) {
    const key = JSON.stringify([comparison.model, comparison.against]);
    pairs.set(key, [...(pairs.get(key) ?? []), comparison]);
  }
  return [...pairs.values()].flatMap(inOrder);
}

function settingsCard() {
  const facts = (object) => make("dl", { class: "facts" }, Object.entries(object).flatMap(([name, value]) => [
    make("dt", {}, name.replaceAll("_", " ")),
    make("dd", {}, typeof value === "string" ? value : JSON.stringify(value)),
  ]));
  const models = Object.fromEntries(data.models.map(({ label, source, step }) =>
    [label, step === null ? source : `${source}, step ${step}`]));
  const scorers = Object.fromEntries(data.scorers.map(({ name, better, record }) =>
    [name, { better: better > 0 ? "higher" : "lower", ...record }]));
  return make("details", { class: "card wide" },
    make("summary", {}, "Settings, models and scorers"),
    make("h4", {}, "Drawn with"), facts(data.settings),
    make("h4", {}, "Models"), facts(models),
    make("h4", {}, "Scorers"), facts(scorers));
}
