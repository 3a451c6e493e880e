// Arithmetic of votes: win rate with an interval over prompts, agreement between raters and with scorers.

const RESAMPLES = 2000;

/** Win rate of model 0 over votes {outcome, prompt}: outcome 0 or 1 is the model that won, 0.5 a tie. */
function winRateOf(votes) {
  const sums = new Map();
  for (const { outcome, prompt } of votes) {
    const sum = sums.get(prompt) ?? [0, 0];
    sums.set(prompt, [sum[0] + 1 - outcome, sum[1] + 1]);
  }
  const groups = [...sums.values()];
  const rate = votes.reduce((sum, { outcome }) => sum + 1 - outcome, 0) / votes.length;
  if (groups.length < 2) return { rate, low: NaN, high: NaN };
  const draw = generatorOf("interval");
  const rates = Array.from({ length: RESAMPLES }, () => {
    let [wins, all] = [0, 0];
    for (let time = 0; time < groups.length; time += 1) {
      const group = groups[Math.floor(draw() * groups.length)];
      wins += group[0];
      all += group[1];
    }
    return wins / all;
  }).sort((one, other) => one - other);
  return { rate, low: rates[Math.floor(0.025 * RESAMPLES)], high: rates[Math.ceil(0.975 * RESAMPLES) - 1] };
}

/** Cohen's kappa of two lists of outcomes of the same pairs; NaN if both always give one same answer. */
function cohenKappa(one, other) {
  const n = one.length;
  const share = (list, outcome) => list.filter((each) => each === outcome).length / n;
  const same = one.filter((outcome, place) => outcome === other[place]).length / n;
  const chance = [0, 0.5, 1].reduce((sum, outcome) => sum + share(one, outcome) * share(other, outcome), 0);
  return { n, same, kappa: (same - chance) / (1 - chance) };
}

/** Fleiss' kappa over pairs with two votes or more; the number of votes may differ between pairs. */
function fleissKappa(outcomesOfPairs) {
  const rated = outcomesOfPairs.filter((outcomes) => outcomes.length > 1);
  const all = rated.reduce((sum, outcomes) => sum + outcomes.length, 0);
  const totals = [0, 0, 0];
  let same = 0;
  for (const outcomes of rated) {
    const counts = [0, 0, 0];
    for (const outcome of outcomes) counts[2 * outcome] += 1;
    counts.forEach((size, place) => { totals[place] += size; });
    same += counts.reduce((sum, size) => sum + size * (size - 1), 0) / (outcomes.length * (outcomes.length - 1));
  }
  const chance = totals.reduce((sum, size) => sum + (size / all) ** 2, 0);
  return { n: rated.length, kappa: (same / rated.length - chance) / (1 - chance) };
}

/** Agreement of votes with a scorer, over pairs where neither says tie. */
function agreementWith(votes, scorer) {
  const both = votes.map(({ outcome, pair }) => [outcome, winnerOf(pair, scorer)])
    .filter(([outcome, winner]) => outcome !== 0.5 && winner);
  return cohenKappa(both.map(([outcome]) => outcome), both.map(([, winner]) => (winner === 1 ? 0 : 1)));
}
