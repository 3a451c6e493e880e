// The data of the page, and the pairs of images of two models.

const data = JSON.parse(byId("data").textContent);
const prompts = data.prompts.map(([text, set, category]) => ({
  text,
  set,
  category,
  lower: text.toLowerCase(),
}));
const images = data.images.map(([model, prompt, seed, path, sha256, scores]) => ({
  model,
  prompt,
  seed,
  path,
  sha256,
  scores,
}));
const state = { model: 0, against: 0 };
const isAlone = data.models.length < 2; // one model has no rival: the page shows its images
const labelOf = (model) => data.models[model].label;
const keyOf = (image) => `${image.prompt} ${image.seed}`;
const made = new Map();

/** The address of an image: its path below the page's folder. */
function addressOf(image) {
  return image.path.split("/").map(encodeURIComponent).join("/");
}

/** An element for an image, which loads when it comes into view; without its file it says so. */
function imageElement(image, attributes = {}) {
  const picture = make("img", { loading: "lazy", decoding: "async", alt: "", draggable: "false", ...attributes });
  picture.addEventListener("load", () => showPixels(picture));
  picture.addEventListener("error", () => {
    picture.replaceWith(make("span", { class: "missing" }, "This image is missing."));
  });
  picture.src = addressOf(image);
  return picture;
}

/** A small picture keeps its pixels when it is enlarged. */
function showPixels(picture) {
  const size = Math.max(picture.naturalWidth || picture.width, picture.naturalHeight || picture.height);
  picture.classList.toggle("pixels", size > 0 && size <= 128);
}

/**
 * The pairs of two models: images of the same prompt and seed.
 * leads: by scorer, the score's difference, positive if the model is better than its rival; null without both scores.
 * disagreement: share of scorers that favour the image that most do not. spread: of leads, each in units of its
 * scorer's typical lead.
 */
function pairsOf(model, against) {
  const key = `${model} ${against}`;
  if (!made.has(key)) made.set(key, makePairs(model, against));
  return made.get(key);
}

function makePairs(model, against) {
  const rivals = new Map(images.filter((image) => image.model === against).map((image) => [keyOf(image), image]));
  const pairs = [];
  for (const image of images) {
    const rival = image.model === model ? rivals.get(keyOf(image)) : undefined;
    if (!rival) continue;
    const leads = data.scorers.map(({ better }, scorer) => {
      const [ours, theirs] = [image.scores[scorer], rival.scores[scorer]];
      return isNumber(ours) && isNumber(theirs) ? (ours - theirs) * better : null;
    });
    pairs.push({ place: pairs.length, prompt: prompts[image.prompt], seed: image.seed, ours: image, theirs: rival, leads });
  }
  const typical = data.scorers.map((_, scorer) => typicalLead(pairs, scorer));
  for (const pair of pairs) addDisagreement(pair, typical);
  return pairs;
}

function typicalLead(pairs, scorer) {
  const leads = pairs.map((pair) => pair.leads[scorer]).filter(isNumber);
  return Math.sqrt(leads.reduce((sum, lead) => sum + lead * lead, 0) / Math.max(1, leads.length)) || 1;
}

function addDisagreement(pair, typical) {
  const leads = pair.leads.map((lead, scorer) => (lead === null ? null : lead / typical[scorer])).filter(isNumber);
  const ahead = leads.filter((lead) => lead > 0).length;
  const behind = leads.filter((lead) => lead < 0).length;
  pair.disagreement = leads.length ? Math.min(ahead, behind) / leads.length : 0;
  pair.spread = leads.length ? Math.max(...leads) - Math.min(...leads) : 0;
}

/** 1 if the model wins by a scorer, 0 for a tie, -1 if its rival wins, null without scores. */
function winnerOf(pair, scorer) {
  const lead = pair.leads[scorer];
  return isNumber(lead) ? Math.sign(lead) : null;
}
