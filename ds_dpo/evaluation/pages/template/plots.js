// Drawings: win rates with their intervals, and how the differences of a scorer are spread.

const LABEL = 124;
const VALUE = 56;
const ROW = 22;
const BINS = 41;

/** Units of a drawing from left to right; fewer on a phone, where letters would be too small. */
const widthOfPlots = () => (window.innerWidth < 700 ? 330 : 420);

function drawn(tag, attributes, ...children) {
  return make(`svg:${tag}`, attributes, ...children);
}

function shortened(text, letters = 20) {
  return text.length > letters ? `${text.slice(0, letters - 1)}…` : text;
}

/** Half the width of the scale around 50 %, in whole tenths, which holds all intervals. */
function reachOf(comparisons) {
  const far = comparisons.flatMap(({ low, high }) => [Math.abs(low - 0.5), Math.abs(high - 0.5)]).filter(isNumber);
  return Math.min(0.5, Math.max(0.1, Math.ceil(10 * Math.max(0, ...far) - 1e-9) / 10));
}

/** One row for each comparison: its win rate, and a bar for the interval. */
function winRatePlot(comparisons, titles, reach) {
  const width = widthOfPlots();
  const height = ROW * comparisons.length + 24;
  const x = (share) => LABEL + ((share - 0.5 + reach) / (2 * reach)) * (width - LABEL - VALUE - 12);
  const bottom = height - 20;
  const plot = drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "img" });
  plot.append(drawn("title", {}, "Win rate with its 95 % interval"));
  for (const share of [0.5 - reach, 0.5, 0.5 + reach]) {
    plot.append(drawn("line", { x1: x(share), x2: x(share), y1: 0, y2: bottom, class: share === 0.5 ? "even" : "grid" }));
    plot.append(drawn("text", { x: x(share), y: height - 6, class: "axis", "text-anchor": "middle" }, percent(share, 0)));
  }
  comparisons.forEach((comparison, place) => {
    const y = ROW * place + ROW / 2;
    const title = titles[place];
    const strong = comparison.category === null;
    plot.append(
      drawn("g", { class: strong ? "row strong" : "row" },
        drawn("title", {}, `${title}: ${percent(comparison.win_rate)}, 95 % interval ${percent(comparison.low)} to ` +
          `${percent(comparison.high)}, ${counted(comparison.n, "pair")}`),
        drawn("rect", { x: 0, y: y - ROW / 2, width: width, height: ROW, class: "catch" }),
        drawn("text", { x: strong ? 0 : 10, y: y + 4, class: "label" }, shortened(title, strong ? 19 : 17)),
        drawn("line", { x1: x(comparison.low), x2: x(comparison.high), y1: y, y2: y, class: "interval" }),
        drawn("circle", { cx: x(comparison.win_rate), cy: y, r: strong ? 5 : 3.5, class: "rate" }),
        drawn("text", { x: width, y: y + 4, class: "value", "text-anchor": "end" }, percent(comparison.win_rate)),
      ),
    );
  });
  return plot;
}

/** A histogram of leads; right of 0 the model is better. Leads beyond the 99th percentile count in the last bars. */
function leadsPlot(leads, height = 92) {
  const sizes = leads.map(Math.abs).sort((one, other) => one - other);
  const reach = sizes[Math.min(sizes.length - 1, Math.floor(0.99 * sizes.length))] || 1;
  const bins = new Array(BINS).fill(0);
  for (const lead of leads) {
    const share = (Math.max(-reach, Math.min(reach, lead)) / reach + 1) / 2;
    bins[Math.min(BINS - 1, Math.floor(share * BINS))] += 1;
  }
  const width = widthOfPlots();
  const most = Math.max(1, ...bins);
  const bottom = height - 20;
  const step = width / BINS;
  const plot = drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "img" });
  plot.append(drawn("title", {}, "Number of pairs by the difference of their scores"));
  bins.forEach((size, bin) => {
    const tall = size ? Math.max(1.5, ((bottom - 4) * size) / most) : 0;
    const side = bin === (BINS - 1) / 2 ? "bar middle" : bin > (BINS - 1) / 2 ? "bar ours" : "bar theirs";
    const bar = { x: bin * step + 0.75, y: bottom - tall, width: step - 1.5, height: tall, rx: 1, class: side };
    plot.append(drawn("rect", bar, drawn("title", {}, counted(size, "pair"))));
  });
  plot.append(drawn("line", { x1: 0, x2: width, y1: bottom, y2: bottom, class: "grid" }));
  plot.append(drawn("line", { x1: width / 2, x2: width / 2, y1: 0, y2: bottom, class: "even" }));
  const marks = [[0, "start", number(-reach)], [width / 2, "middle", "0"], [width, "end", signed(reach)]];
  for (const [x, anchor, text] of marks) {
    plot.append(drawn("text", { x, y: height - 6, class: "axis", "text-anchor": anchor }, text));
  }
  return plot;
}

/** A bar as long as a table's column: the interval and the win rate on a scale of 0 to 100 %. */
function smallInterval({ win_rate: rate, low, high }) {
  const x = (share) => 2 + 96 * share;
  return drawn("svg", { viewBox: "0 0 100 14", class: "small plot", "aria-hidden": "true" },
    drawn("line", { x1: x(0.5), x2: x(0.5), y1: 0, y2: 14, class: "even" }),
    drawn("line", { x1: x(low), x2: x(high), y1: 7, y2: 7, class: "interval" }),
    drawn("circle", { cx: x(rate), cy: 7, r: 3, class: "rate" }),
  );
}
