// Notes to tokens, as lib/music/tokens.py does with MidiTok: the grid, the nearest value, byte-pair merges.

// The nearest of some numbers in rising order; halfway, the larger.
function closest(numbers, value) {
  const after = numbers.findIndex((number) => number >= value);
  if (after === 0) return numbers[0];
  const [low, high] = after < 0 ? [numbers.at(-1), Infinity] : [numbers[after - 1], numbers[after]];
  return value - low < high - value ? low : high;
}

// To a whole number; halfway, to the even one, as numpy rounds.
function roundEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

class Encoder {
  constructor(rules) {
    this.rules = rules;
    this.base = {};
    rules.pieces.forEach((names, token) => {
      if (names?.length === 1) this.base[names[0].join(" ")] ??= token;
    });
    const values = (kind) => rules.pieces.filter((names) => names?.length === 1 && names[0][0] === kind)
      .map((names) => names[0][1]).sort((a, b) => a - b);
    this.velocities = values("Velocity");
    this.durations = values("Duration");
    this.steps = this.durations.map((seconds) => Math.round(seconds / rules.grid));
    this.merges = new Map(rules.merges.map(([left, right, made], rank) => [left * 65536 + right, [rank, made]]));
  }

  // Base tokens of notes [start, end, pitch, velocity] in the order of start and pitch: a list for each bar with
  // notes. Bars without go with the next one. No merge of the model reaches from a note into the next bar.
  bars(notes) {
    const { grid, bar, barToken } = this.rules;
    const perBar = Math.round(bar / grid);
    const found = [];
    let now = -1, position = -1;
    for (const note of this.onGrid(notes)) {
      const later = Math.floor(note.step / perBar) - now;
      if (later > 0) {
        found.push(Array(later).fill(barToken));
        now += later;
        position = -1;
      }
      const here = found.at(-1), place = note.step % perBar;
      if (place !== position) here.push(this.base[`Position ${place}`]);
      position = place;
      here.push(this.base[`Pitch ${note.pitch}`], this.base[`Velocity ${closest(this.velocities, note.velocity)}`],
        this.base[`Duration ${this.durations[this.steps.indexOf(closest(this.steps, note.length))]}`]);
    }
    return found;
  }

  // Ticks of a file at 120 BPM first, 960 a second, and then steps of the grid.
  onGrid(notes) {
    const perStep = 960 * this.rules.grid;
    return notes.map(([start, end, pitch, velocity]) => {
      const from = roundEven(start * 960), long = Math.max(1, roundEven(end * 960) - from);
      return { step: Math.round(from / perStep), length: Math.max(1, Math.round(long / perStep)), pitch, velocity };
    });
  }

  // Merge neighbours, the earliest learnt first, until none is left.
  merge(tokens) {
    for (;;) {
      let best = null;
      for (let i = 0; i + 1 < tokens.length; i++) {
        const found = this.merges.get(tokens[i] * 65536 + tokens[i + 1]);
        if (found && (!best || found[0] < best.rank)) best = { rank: found[0], made: found[1], at: i };
      }
      if (!best) return tokens;
      tokens = [...tokens.slice(0, best.at), best.made, ...tokens.slice(best.at + 2)];
    }
  }

  // All tokens of an opening, the first of them BOS.
  encode(notes) {
    const { bos, mark } = this.rules;
    const bars = this.bars(notes);
    if (bars.length && mark !== null) bars[0] = [mark, ...bars[0]];
    return [bos, ...bars.flatMap((tokens) => this.merge(tokens))];
  }
}
