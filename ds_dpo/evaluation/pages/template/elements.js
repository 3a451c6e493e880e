// Small tools: elements made of text alone, numbers as people read them, draws that a seed fixes.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element. Children that are strings become text, never markup. A name onNAME listens to an event. */
function make(tag, attributes = {}, ...children) {
  const isDrawing = tag.startsWith("svg:");
  const node = isDrawing ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

/** Fill a select with [value, text] pairs. */
function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  select.value = String(chosen);
}

function selectOf(id, title, options, chosen, onchange) {
  const select = make("select", { id, onchange });
  fillSelect(select, options, chosen);
  return make("label", { class: "field" }, make("span", {}, title), select);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const NONE = "–";

function percent(share, digits = 1) {
  return isNumber(share) ? `${(100 * share).toFixed(digits)}\u202f%` : NONE;
}

/** A score with about four digits. */
function number(value) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  const digits = size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 ? 3 : 4;
  return value.toFixed(digits).replace("-", "\u2212");
}

function threeDigits(value) {
  return isNumber(value) ? value.toFixed(3).replace("-", "\u2212") : NONE;
}

function signed(value) {
  return isNumber(value) && value > 0 ? `+${number(value)}` : number(value);
}

function pValue(value) {
  if (!isNumber(value)) return NONE;
  return value < 0.001 ? "<\u202f0.001" : value.toFixed(3);
}

function count(value) {
  return isNumber(value) ? value.toLocaleString("en-US") : NONE;
}

function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Return a function that draws numbers in [0, 1), the same ones for the same text (xmur3 seeds sfc32). */
function generatorOf(text) {
  let hash = 1779033703 ^ text.length;
  for (let place = 0; place < text.length; place += 1) {
    hash = Math.imul(hash ^ text.charCodeAt(place), 3432918353);
    hash = (hash << 13) | (hash >>> 19);
  }
  const word = () => {
    hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
    hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
    hash ^= hash >>> 16;
    return hash >>> 0;
  };
  let [a, b, c, d] = [word(), word(), word(), word()];
  const draw = () => {
    const sum = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return (sum >>> 0) / 4294967296;
  };
  for (let round = 0; round < 12; round += 1) draw();
  return draw;
}

function shuffled(items, draw) {
  const mixed = [...items];
  for (let last = mixed.length - 1; last > 0; last -= 1) {
    const other = Math.floor(draw() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}
