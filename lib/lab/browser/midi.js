// MIDI files: what a piano would make of one, and a file of what was played. Simpler than lib/music/midi.py: one
// sustain pedal for all channels, and no other pedal.
const SUSTAIN = 64, SOUND_OFF = 120, RESET = 121, NOTES_OFF = 123; // controllers
const DRUMS = 9, LOWEST = 21, HIGHEST = 108, LARGEST = 10_000_000;

// The notes of a file, [start, end, pitch, velocity] in seconds, the pedal in their lengths, by start and pitch.
// Throws an Error with a sentence for the reader.
function readMidi(bytes) {
  if (!bytes.length) throw new Error("This file is empty. Choose a MIDI file with notes.");
  if (bytes.length > LARGEST) throw new Error("This file is too large for music. Choose a .mid file under 10 MB.");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const name = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  let at = name(0) === "RIFF" ? Math.max(0, [...bytes.subarray(0, 64).keys()].findIndex((i) => name(i) === "MThd")) : 0;
  if (name(at) !== "MThd") throw new Error("This is not a MIDI file. Choose a file that ends in .mid.");
  try {
    const count = Math.max(1, view.getUint16(at + 10)), division = view.getInt16(at + 12);
    at += 8 + view.getUint32(at + 4);
    const events = [];
    let track = 0;
    while (at + 8 <= bytes.length) {
      const begin = at + 8, end = begin + view.getUint32(at + 4), known = events.length;
      try {
        if (end > bytes.length) throw new RangeError();
        if (name(at) === "MTrk") {
          readTrack(view, begin, end, track, events);
          track++;
        }
      } catch (error) {
        if (track < count) throw error;
        events.length = known; // behind the tracks that the header counts anything may lie
        break;
      }
      at = end;
    }
    events.sort((a, b) => a.tick - b.tick);
    return sounding(timed(events, division));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new Error("This MIDI file is damaged. Export it again, or choose another one.");
  }
}

// The events of one track, with their ticks, at the end of a list.
function readTrack(view, at, end, track, events) {
  let tick = 0, status = 0;
  const byte = () => {
    if (at >= end) throw new RangeError();
    return view.getUint8(at++);
  };
  const variable = () => {
    let value = 0, next;
    do {
      next = byte();
      value = value * 128 + (next & 127);
    } while (next & 128);
    return value;
  };
  while (at < end) {
    tick += variable();
    const first = byte();
    if (first === 0xff) {
      const type = byte(), length = variable();
      if (at + length > end) throw new RangeError();
      if (type === 0x51 && length === 3) events.push({ tick, tempo: view.getUint32(at - 1) & 0xffffff });
      at += length;
      if (type === 0x2f) break;
    } else if (first === 0xf0 || first === 0xf7) {
      const length = variable(); // it moves `at`, so it comes first
      at += length;
    } else if (first > 0xf0) {
      at += [0xf1, 0xf3].includes(first) ? 1 : first === 0xf2 ? 2 : 0;
    } else {
      const running = first < 0x80;
      if (!running) status = first;
      if (!status) throw new RangeError();
      const a = running ? first : byte(), type = status >> 4;
      const b = type === 12 || type === 13 ? 0 : byte();
      if ((status & 15) !== DRUMS) events.push({ tick, type, a, b, voice: (track * 16 + (status & 15)) * 128 + a });
    }
  }
  events.push({ tick }); // what is still down ends here
}

// Events with their seconds: a division below zero counts frames, another counts quarter notes.
function timed(events, division) {
  let factor = division < 0 ? 1 / (-(division >> 8) * (division & 255)) : 500_000 / (1e6 * division);
  if (!(factor > 0 && factor < 1e3)) throw new RangeError();
  let change = 0, at = 0; // where the tempo was set, in ticks and in seconds
  for (const event of events) {
    event.seconds = at + (event.tick - change) * factor;
    if (!event.tempo || division < 0) continue;
    at = event.seconds;
    change = event.tick;
    factor = event.tempo / (1e6 * division);
  }
  return events;
}

function sounding(events) {
  const down = new Map(), notes = [], ringing = new Map(); // notes of each voice; notes that the pedal holds
  const channel = (voice) => voice >> 7 & 15;
  let pedal = false;
  const end = events.at(-1)?.seconds ?? 0;
  const release = (note, seconds, voice) => {
    note[1] = seconds;
    if (pedal) ringing.set(note, voice);
  };
  const lift = (seconds) => {
    for (const note of ringing.keys()) note[1] = seconds;
    ringing.clear();
    pedal = false;
  };
  for (const { type, a, b, voice, seconds } of events) {
    if (type === 9 && b) {
      const note = [seconds, end, a, b];
      if (a >= LOWEST && a <= HIGHEST) notes.push(note);
      if (!down.has(voice)) down.set(voice, []);
      down.get(voice).push(note);
    } else if (type === 8 || type === 9) {
      const note = down.get(voice)?.shift();
      if (note) release(note, seconds, voice);
    } else if (type === 11 && a === SUSTAIN) {
      if (b < 64) lift(seconds);
      else pedal = true;
    } else if (type === 11 && a === RESET) {
      lift(seconds);
    } else if (type === 11 && (a === SOUND_OFF || a >= NOTES_OFF)) {
      for (const [other, held] of down) {
        if (channel(other) === channel(voice)) for (const note of held.splice(0)) release(note, seconds, other);
      }
      for (const [note, other] of a === SOUND_OFF ? ringing : []) {
        if (channel(other) !== channel(voice)) continue;
        note[1] = seconds;
        ringing.delete(note);
      }
    }
  }
  for (const note of ringing.keys()) note[1] = end;
  if (!notes.length) throw new Error("This file has no notes for a piano. Choose another one.");
  return clipRepeats(notes.sort((a, b) => a[0] - b[0] || a[2] - b[2] || a[1] - b[1] || a[3] - b[3]));
}

// Each note ends at the latest when its key is struck again.
function clipRepeats(notes) {
  const before = new Map();
  for (const note of notes) {
    const group = before.get(note[2]) ?? [];
    const again = group.length && group[0][0] < note[0];
    if (again) for (const earlier of group) earlier[1] = Math.min(earlier[1], note[0]);
    before.set(note[2], again ? [note] : [...group, note]);
  }
  return notes;
}

// The bytes of a file: 120 BPM, 960 ticks a second, one piano.
function writeMidi(notes) {
  const events = [];
  for (const [start, end, pitch, velocity] of clipRepeats(notes.map((note) => [...note]))) {
    const on = Math.round(start * 960), off = Math.max(on + 1, Math.round(end * 960));
    events.push([on, 1, 0x90, pitch, velocity], [off, 0, 0x80, pitch, 0]);
  }
  events.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const body = [0, 0xff, 0x51, 3, 0x07, 0xa1, 0x20, 0, 0xc0, 0];
  let now = 0;
  for (const [tick, , ...message] of events) {
    body.push(...variableLength(tick - now), ...message);
    now = tick;
  }
  body.push(0, 0xff, 0x2f, 0);
  const size = [24, 16, 8, 0].map((shift) => body.length >>> shift & 255);
  const text = (letters) => Array.from(letters, (letter) => letter.charCodeAt(0));
  return new Uint8Array([...text("MThd"), 0, 0, 0, 6, 0, 0, 0, 1, 1, 224, ...text("MTrk"), ...size, ...body]);
}

function variableLength(value) {
  const bytes = [value & 127];
  for (let rest = value >> 7; rest; rest >>= 7) bytes.unshift(rest & 127 | 128);
  return bytes;
}
