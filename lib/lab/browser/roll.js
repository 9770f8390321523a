// The roll: time goes left under a line that stands, keys at the left light up while they sound.
const PAST = 7, COMING = 2.5; // seconds on either side of the line
const KEYS_WIDE = 46, BLACK = new Set([1, 3, 6, 8, 10]);
const INK = "#262626", GREY = "#7A7A7A", PALE = "#ECECEC", INPUT = "#0072B2", OUTPUT = "#009E73", LINE = "#D55E00";

class Roll {
  constructor(canvas, { colours, softest, loudest }) {
    Object.assign(this, { canvas, colours, softest, loudest });
    this.pen = canvas.getContext("2d");
  }

  colour(velocity) {
    const share = (velocity - this.softest) / (this.loudest - this.softest);
    return this.colours[Math.max(0, Math.min(this.colours.length - 1, Math.floor(share * this.colours.length)))];
  }

  // Notes around `now`, the second of the piece; the opening ends at `split`; `held` has the reader's keys, and
  // a note that is held ends at infinity.
  draw(now, notes, split, held) {
    const { canvas, pen } = this, scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    const foot = 20, row = (height - foot) / (HIGHEST - LOWEST + 1), bottom = height - foot;
    const perSecond = (width - KEYS_WIDE) / (PAST + COMING), line = KEYS_WIDE + PAST * perSecond;
    const x = (second) => line + (second - now) * perSecond;
    const y = (pitch) => bottom - (pitch - LOWEST + 1) * row;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, width, height);
    if (split > 0 && x(split) > KEYS_WIDE) {
      pen.fillStyle = "#E0EEF6";
      const left = Math.max(KEYS_WIDE, x(0));
      pen.fillRect(left, 0, Math.min(width, x(split)) - left, bottom);
    }
    pen.font = "12px system-ui, sans-serif";
    pen.textAlign = "center";
    for (let second = Math.max(0, Math.ceil(now - PAST)); second <= now + COMING; second++) {
      pen.fillStyle = PALE;
      pen.fillRect(x(second), 0, 1, bottom);
      pen.fillStyle = GREY;
      const room = x(second) > KEYS_WIDE + 12 && x(second) < width - 14;
      if (second % 2 === 0 && room) pen.fillText(clock(second), x(second), height - 5);
    }
    pen.fillStyle = PALE;
    for (let pitch = 24; pitch <= HIGHEST; pitch += 12) pen.fillRect(KEYS_WIDE, y(pitch - 1), width, 1);
    const lit = new Map([...held.keys()].map((pitch) => [pitch, INPUT]));
    for (const [start, up, pitch, velocity] of notes) {
      const end = up === Infinity ? now : up;
      if (x(end) < KEYS_WIDE || x(start) > width) continue;
      const sounds = start <= now && now < up;
      if (sounds) lit.set(pitch, start < split || held.has(pitch) ? INPUT : OUTPUT);
      const left = Math.max(KEYS_WIDE, x(start));
      pen.fillStyle = sounds ? lit.get(pitch) : this.colour(velocity);
      pen.globalAlpha = start > now ? 0.45 : 1;
      pen.fillRect(left, y(pitch), Math.max(2, x(end) - left - 1), Math.max(2, row - 0.5));
    }
    pen.globalAlpha = 1;
    pen.fillStyle = LINE;
    pen.fillRect(line - 1, 0, 2, bottom);
    this.keys(y, row, lit);
  }

  keys(y, row, lit) {
    const { pen } = this;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, KEYS_WIDE, y(LOWEST - 1));
    for (let pitch = LOWEST; pitch <= HIGHEST; pitch++) {
      const black = BLACK.has(pitch % 12);
      if (black || lit.has(pitch)) {
        pen.fillStyle = lit.get(pitch) ?? INK;
        pen.fillRect(22, y(pitch), black ? 15 : KEYS_WIDE - 22, row);
      }
    }
    pen.fillStyle = GREY;
    pen.textAlign = "right";
    for (let pitch = 24; pitch < HIGHEST; pitch += 12) pen.fillText(`C${pitch / 12 - 1}`, 19, y(pitch) + row / 2 + 4);
    pen.fillRect(KEYS_WIDE, 0, 1, y(LOWEST - 1));
  }
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}
