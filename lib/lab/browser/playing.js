// Playing, as lib/generate does it: dice, grammar, controls, sampling, notes. The same seed gives the same tokens.

// numpy's PCG64 with its SeedSequence (https://www.pcg-random.org, O'Neill 2014): `lib.generate.moment.dice`.
class Dice {
  constructor(seed) {
    const [high, low, more, less] = seedWords(BigInt(seed));
    this.increment = ((more << 64n | less) << 1n | 1n) & MASK_128;
    this.state = (this.increment + (high << 64n | low)) & MASK_128;
    this.turn();
  }

  turn() {
    this.state = (this.state * MULTIPLIER + this.increment) & MASK_128;
  }

  // A number from 0 to below 1, of 53 bits.
  throw() {
    this.turn();
    const mixed = (this.state >> 64n ^ this.state) & MASK_64;
    const turns = this.state >> 122n;
    const drawn = (mixed >> turns | mixed << (64n - turns)) & MASK_64;
    return Number(drawn >> 11n) / 2 ** 53;
  }
}
const MASK_64 = 2n ** 64n - 1n, MASK_128 = 2n ** 128n - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

// Four words of 64 bits out of a seed.
function seedWords(seed) {
  const entropy = [];
  for (let rest = seed; rest > 0n || !entropy.length; rest >>= 32n) entropy.push(Number(rest & 0xffffffffn));
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ value >>> 16;
  };
  const mix = (x, y) => {
    const mixed = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y) | 0;
    return mixed ^ mixed >>> 16;
  };
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
    }
  }
  constant = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let word = pool[i % 4] ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    word = Math.imul(word, constant);
    return BigInt((word ^ word >>> 16) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => words[i] | words[i + 1] << 32n);
}

// What every token does: `Rules` of lib/generate/grammar.py. The table (`table` in build.py) has `pieces`, for
// each token the base tokens inside it as [kind, value], or null for what begins, ends and pads a piece.
function readMove(names) {
  const move = { bars: 0, position: null, struck: [], first: Infinity, struckNow: [] };
  for (const [kind, value] of names ?? []) {
    if (kind === "Bar") {
      move.bars++;
      move.position = -1;
      move.struck = [];
    } else if (kind === "Position") {
      if (move.position === null) move.first = value;
      move.position = value;
      move.struck = [];
    } else if (kind === "Pitch") {
      move.struck.push(value);
      if (move.position === null) move.struckNow.push(value);
    }
  }
  return move;
}

class Rules {
  constructor(table) {
    Object.assign(this, table);
    this.moves = table.pieces.map(readMove);
    this.begins = table.pieces.map((names) => names ? names[0]?.[0] ?? "mark" : "nothing");
    this.ends = table.pieces.map((names) => names ? names.at(-1)?.[0] ?? "mark" : "start");
    this.allowed = {}; // after what a token ended with
    for (const [end, kinds] of Object.entries(table.follows)) {
      this.allowed[end] = [...table.pieces.keys()].filter((token) => kinds.includes(this.begins[token]));
    }
    this.opens = this.begins.map((kind) => table.follows.Position.includes(kind)); // with another key
  }
}

class Grammar {
  constructor(rules) {
    Object.assign(this, { rules, end: "start", bar: -1, position: -1, struck: new Set() });
  }

  read(token) {
    const move = this.rules.moves[token];
    this.bar += move.bars;
    if (move.position === null) {
      this.struck = new Set([...this.struck, ...move.struck]);
    } else {
      this.struck = new Set(move.struck);
      this.position = move.position;
    }
    this.end = this.rules.ends[token];
  }

  // No onset before `until` seconds; the bar lines that this takes, for the model to read too.
  wait(until) {
    const { bar, grid, barToken } = this.rules;
    const bars = Array(Math.max(0, Math.floor(until / bar + 1e-9) - Math.max(this.bar, -1))).fill(barToken);
    for (const token of bars) this.read(token);
    const step = Math.ceil((until - this.bar * bar) / grid - 1e-6);
    this.position = Math.max(this.position, step - 1);
    this.end = "Bar";
    return bars;
  }

  // Where the last onset is.
  get seconds() {
    return Math.max(this.bar, 0) * this.rules.bar + Math.max(this.position, 0) * this.rules.grid;
  }

  // Seconds by which a token would move the clock.
  elapsed(token) {
    const { bars, position } = this.rules.moves[token];
    if (!bars && (position === null || position < 0)) return 0;
    const after = Math.max(this.bar + bars, 0) * this.rules.bar + Math.max(position ?? -1, 0) * this.rules.grid;
    return Math.max(after - this.seconds, 0);
  }

  // Which tokens may come next.
  choices() {
    const full = this.struck.size >= this.rules.fingers;
    return this.rules.allowed[this.end].filter((token) => {
      const move = this.rules.moves[token];
      return move.first > this.position && !(full && this.rules.opens[token]) &&
        !move.struckNow.some((key) => this.struck.has(key));
    });
  }
}

// Notes out of tokens, one after another: `NoteReader`. A note is [start, end, pitch, velocity].
class NoteReader {
  constructor(rules, grammar) {
    Object.assign(this, { rules, bar: grammar.bar, position: Math.max(grammar.position, 0), pitch: 0, velocity: 0 });
  }

  read(token) {
    const notes = [];
    for (const [kind, value] of this.rules.pieces[token] ?? []) {
      if (kind === "Bar") {
        this.bar++;
        this.position = 0;
      } else if (kind === "Position") this.position = value;
      else if (kind === "Pitch") this.pitch = value;
      else if (kind === "Velocity") this.velocity = value;
      else {
        const start = Math.max(this.bar, 0) * this.rules.bar + this.position * this.rules.grid;
        notes.push([start, start + value, this.pitch, this.velocity]);
      }
    }
    return notes;
  }
}

// The controls: `Steering` of lib/generate/control.py. For each, what is added to a token's logit; null for
// tokens that it does not choose among.
function tilts(rules, settings) {
  const { keys, touch } = rules.units;
  const wanted = [["Pitch", settings.register, keys], ["Velocity", settings.loudness, touch]];
  return wanted.filter(([, strength]) => strength).map(([kind, strength, unit]) => rules.pieces.map((names) => {
    const values = (names ?? []).filter((name) => name[0] === kind).map((name) => name[1]);
    return values.length ? strength * (values.reduce((a, b) => a + b) / values.length) / unit : null;
  }));
}

function logSum(values) {
  const most = Math.max(...values);
  return most + Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
}

// Logits of the tokens in `choices`, tilted in place.
function steer(logits, choices, grammar, tilted, density) {
  for (const tilt of tilted) {
    const group = [...choices.keys()].filter((i) => tilt[choices[i]] !== null);
    if (!group.length) continue;
    const before = logSum(group.map((i) => logits[i]));
    for (const i of group) logits[i] += tilt[choices[i]];
    const shift = before - logSum(group.map((i) => logits[i]));
    for (const i of group) logits[i] += shift;
  }
  if (!density) return;
  const { crowd, moment } = grammar.rules.units;
  choices.forEach((token, i) => { logits[i] -= crowd * density * Math.log1p(grammar.elapsed(token) / moment); });
}

// Logits to probabilities: `Sampling.probabilities`.
function probabilities(logits, { temperature, topP, minP }) {
  const most = Math.max(...logits);
  if (temperature === 0) {
    const likeliest = logits.indexOf(most);
    return logits.map((_, i) => i === likeliest ? 1 : 0);
  }
  const weights = logits.map((logit) => Math.exp((logit - most) / temperature));
  const sum = weights.reduce((a, b) => a + b);
  const p = weights.map((weight) => weight / sum);
  const order = [...p.keys()].sort((a, b) => p[b] - p[a]);
  const least = minP * p[order[0]];
  let before = 0, kept = 0;
  for (const i of order) {
    const share = p[i];
    if (topP < 1 && before >= topP || share < least) p[i] = 0;
    before += share;
    kept += p[i];
  }
  return p.map((share) => share / kept);
}

// The place at which the summed probabilities pass a number from 0 to below 1: `draw`.
function draw(p, number) {
  const total = p.reduce((a, b) => a + b);
  let sum = 0;
  const found = p.findIndex((share) => (sum += share) / total > number);
  return found < 0 ? p.findLastIndex((share) => share > 0) : found;
}

// A model that plays on, token by token, from an opening.
class Player {
  constructor(model, rules) {
    Object.assign(this, { model, rules });
  }

  // Hear an opening: its tokens, the first of them BOS; the new music enters at `begin` seconds.
  start(tokens, begin, seed) {
    this.model.forget();
    this.grammar = new Grammar(this.rules);
    for (const token of tokens) this.grammar.read(token);
    const bars = begin ? this.grammar.wait(begin) : [];
    this.unread = [...tokens, ...bars]; // by the model
    this.reader = new NoteReader(this.rules, this.grammar);
    this.dice = new Dice(seed);
  }

  set(settings) {
    this.settings = settings;
    this.tilts = tilts(this.rules, settings);
  }

  // Read a token of the opening or, where none is left, draw one and read that; the notes that it completes.
  step() {
    if (this.unread.length) {
      this.logits = this.model.step(this.unread.shift());
      return [];
    }
    const choices = this.grammar.choices();
    const logits = choices.map((token) => this.logits[token]);
    steer(logits, choices, this.grammar, this.tilts, this.settings.density);
    this.last = choices[draw(probabilities(logits, this.settings), this.dice.throw())];
    this.grammar.read(this.last);
    this.logits = this.model.step(this.last);
    return this.reader.read(this.last);
  }
}
