// The page: what the buttons do, when notes sound, who plays.
const $ = (id) => document.getElementById(id);
const AHEAD = 3; // seconds of music that the model is ahead of the ear
const SILENCE = 2; // seconds after which the model takes over
const KEPT = 3600; // seconds of music that can be saved: memory stays within bounds
const LETTERS = "awsedftgyhujkolp;'";
const SETTINGS = ["temperature", "density", "register", "loudness"];
const facts = JSON.parse($("facts").textContent);
const roll = new Roll($("roll"), facts);

let piano = null; // made at the first touch, as browsers want it
let engine = null; // the port behind which the model plays
const piece = {
  number: 0, // counts pieces, so that late answers to an earlier one are known
  state: "idle", // or "listening" to the reader, "reading" an opening, "playing", "paused"
  zero: 0, // the second of the piano's clock at which it began
  notes: [], // of the last hour: [start, end, pitch, velocity]
  asked: 0, // up to where the model has been asked for music
  split: 0, // where the opening ends
  live: false, // whether the opening has been heard already, as it was played here
};
const NOTHING = { notes: [], split: 0 };
let opening = NOTHING; // the last one that was given, for another piece from it
const held = new Map(); // keys that the reader holds: pitch -> [voice, note]
let lastTouch = 0;

function say(text, wrong = false) {
  $("says").textContent = text;
  $("says").classList.toggle("wrong", wrong);
}

// ---- the model ------------------------------------------------------------------------------

async function unpack(id) {
  const text = atob($(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  $(id).remove(); // eight megabytes that nobody reads again
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function widen(halves) {
  return Float32Array.from(new Uint16Array(halves), (bits) => {
    const exponent = bits >> 10 & 31, fraction = (bits & 1023) / 1024;
    return (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  });
}

// A worker where the browser gives one; else the same program between the frames of the page.
function port(program) {
  try {
    return new Worker(URL.createObjectURL(new Blob([program, "\nserve(self);"], { type: "text/javascript" })));
  } catch {
    const { port1, port2 } = new MessageChannel();
    new Function("port", `${program}\nserve(port);`)(port2);
    return port1;
  }
}

async function load() {
  const program = $("engine").textContent;
  const [wasm, weights, embeddings] = await Promise.all(["wasm", "weights", "embeddings"].map(unpack));
  engine = port(program);
  engine.onmessage = ({ data }) => answers[data.kind](data);
  engine.onerror = () => answers.failed({ why: "the browser stopped its program" });
  const wide = facts.sizes[9] ? widen(embeddings) : new Float32Array(embeddings);
  const message = { kind: "load", wasm, weights: new Float32Array(weights), embeddings: wide, facts };
  engine.postMessage(message, [wasm, message.weights.buffer, wide.buffer]);
}

const answers = {
  ready() {
    for (const id of ["play", "fresh"]) $(id).disabled = false;
    $("play").textContent = "Play";
  },
  failed({ why }) {
    say(`The model cannot run here: ${why}. A browser of 2023 or later should do.`, true);
  },
  notes({ piece: number, notes, heard }) {
    if (number !== piece.number) return;
    if (heard && piece.state === "reading") begin();
    for (const note of notes) sound(note);
  },
};

// ---- time -----------------------------------------------------------------------------------

function seconds() {
  return piano ? piano.now - piece.zero : 0;
}

function sound(note) {
  piece.notes.push(note);
  if (piano) piano.strike(note[2], note[3], piece.zero + note[0], piece.zero + note[1]);
}

// Ask for more music in good time, and let go of what nobody can see or save any more.
function tick() {
  const now = seconds();
  if (piece.state === "playing" && piece.asked < now + AHEAD) {
    piece.asked = now + AHEAD + 1;
    engine.postMessage({ kind: "play", piece: piece.number, until: piece.asked });
  }
  if (piece.state === "listening" && !held.size && performance.now() - lastTouch > SILENCE * 1000) takeOver();
  if (piece.notes[0]?.[1] < now - KEPT) piece.notes = piece.notes.filter((note) => note[1] >= now - KEPT);
}

function frame() {
  const now = seconds();
  let first = piece.notes.length;
  while (first > 0 && piece.notes[first - 1][0] > now - PAST - 17) first--; // no note lasts longer than 16 s
  roll.draw(now, piece.notes.slice(first), piece.split, held);
  requestAnimationFrame(frame);
}

// ---- pieces ---------------------------------------------------------------------------------

function settings() {
  const chosen = Object.fromEntries(SETTINGS.map((name) => [name, +$(name).value]));
  return { ...chosen, topP: facts.table.topP, minP: 0 };
}

function wake() {
  piano ??= new Piano();
  return piano.context.resume();
}

// A new piece: the model reads the opening, or nothing, and then plays.
function start(live = false) {
  if (!$("seed").reportValidity()) return;
  wake();
  if (!live) piano.silence();
  Object.assign(piece, { number: piece.number + 1, state: "reading", notes: [], asked: 0, split: opening.split, live });
  $("hint").hidden = true;
  $("save").disabled = false;
  $("nothing").hidden = opening === NOTHING;
  $("play").textContent = "Pause";
  say(opening === NOTHING ? "" : "It reads the opening …");
  engine.postMessage({ kind: "open", piece: piece.number, notes: opening.notes, begin: opening.split,
    seed: +$("seed").value, settings: settings() });
}

// The opening has been read. What was played here is heard already; a file is played from its first note.
function begin() {
  piece.state = "playing";
  if (piece.live) {
    piece.notes = [...opening.notes];
  } else {
    piece.zero = piano.now + 0.15;
    opening.notes.forEach(sound);
  }
  say(piece.split ? "Blue is the opening; then the model plays." : "");
  tick();
}

// The reader has fallen silent: the model goes on from here, in the reader's time.
function takeOver() {
  const notes = clipRepeats(piece.notes.sort((a, b) => a[0] - b[0] || a[2] - b[2]));
  opening = { notes, split: seconds() + 0.2 };
  start(true);
}

async function toggle() {
  if (piece.state === "playing") {
    await piano.context.suspend();
    piece.state = "paused";
    $("play").textContent = "Go on";
  } else if (piece.state === "paused") {
    await piano.context.resume();
    piece.state = "playing";
    $("play").textContent = "Pause";
  } else if (piece.state !== "reading") start();
}

function save() {
  const played = piece.notes.filter((note) => note[0] <= seconds());
  if (!played.length) return say("There is nothing to save yet.", true);
  const first = played.reduce((least, note) => Math.min(least, note[0]), Infinity);
  const moved = played.map(([start, end, ...rest]) => [start - first, end - first, ...rest]);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([writeMidi(moved)], { type: "audio/midi" }));
  link.download = `mamba-seed-${$("seed").value}.mid`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`Saved ${played.length} notes as ${link.download}.`);
}

// ---- openings -------------------------------------------------------------------------------

// The first seconds of a file, from its first note on; held keys keep their length. As `hear_prompt` in
// lib/generate/player.py: a shorter piece is heard out.
function firstSeconds(notes, wanted) {
  const first = notes[0][0], last = notes.at(-1)[0];
  const end = notes.reduce((most, note) => Math.max(most, note[1]), last + 0.01);
  const split = Math.min(wanted, end - first);
  const inside = notes.filter((note) => note[0] < first + split);
  return { notes: inside.map(([start, stop, ...rest]) => [start - first, stop - first, ...rest]), split };
}

async function open(file) {
  try {
    if (!$("seconds").reportValidity()) return;
    if (file.size > LARGEST) throw new Error("This file is too large for music. Choose a .mid file under 10 MB.");
    const notes = readMidi(new Uint8Array(await file.arrayBuffer()));
    opening = firstSeconds(notes, +$("seconds").value);
    start();
  } catch (error) {
    say(error.message, true);
  }
}

// A key of the reader's goes down or up, wherever it comes from.
function press(pitch, velocity) {
  if (pitch < LOWEST || pitch > HIGHEST || held.has(pitch) || !engine) return;
  wake();
  if (piece.state !== "listening") {
    piano.silence();
    Object.assign(piece, { number: piece.number + 1, state: "listening", notes: [], split: 0, zero: piano.now });
    $("hint").hidden = true;
    $("play").textContent = "Play";
    say("It listens …");
  }
  const note = [seconds(), Infinity, pitch, velocity];
  piece.notes.push(note);
  held.set(pitch, [piano.strike(pitch, velocity, piano.now), note]);
  lastTouch = performance.now();
  show(pitch, true);
}

function lift(pitch) {
  if (!held.has(pitch)) return;
  const [voice, note] = held.get(pitch);
  held.delete(pitch);
  piano.release(voice, piano.now);
  note[1] = Math.max(seconds(), note[0] + 0.03);
  lastTouch = performance.now();
  show(pitch, false);
}

// ---- the reader's keys ----------------------------------------------------------------------

let octave = 60; // the key of the first letter
const down = new Map(); // letters that are down, and the keys that they struck

function layKeys() {
  const whites = [...LETTERS].filter((_, i) => !BLACK.has(i % 12)).length, wide = 100 / whites;
  let white = 0;
  [...LETTERS].forEach((letter, i) => {
    const key = document.createElement("button"), black = BLACK.has(i % 12);
    key.type = "button";
    key.className = black ? "black" : "white";
    key.style.width = `${wide * (black ? 0.62 : 1)}%`;
    key.style.left = `${wide * (black ? white - 0.31 : white++)}%`;
    key.textContent = letter.toUpperCase();
    key.dataset.step = i;
    key.tabIndex = -1;
    key.setAttribute("aria-label", `Piano key ${letter}`);
    $("keys").append(key);
  });
}

function show(pitch, on) {
  $("keys").querySelector(`[data-step="${pitch - octave}"]`)?.classList.toggle("down", on);
}

function pointers() {
  const under = new Map(); // fingers and mice, and the keys below them
  const at = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest?.("#keys button");
  const move = (event) => {
    if (event.type !== "pointerdown" && !under.has(event.pointerId)) return;
    const key = at(event), pitch = key && octave + +key.dataset.step, before = under.get(event.pointerId);
    if (pitch === before) return;
    if (before) lift(before);
    under.set(event.pointerId, pitch);
    if (pitch) press(pitch, 70);
  };
  const up = (event) => {
    lift(under.get(event.pointerId));
    under.delete(event.pointerId);
  };
  $("keys").addEventListener("pointerdown", move);
  addEventListener("pointermove", move);
  for (const kind of ["pointerup", "pointercancel"]) addEventListener(kind, up);
}

function typing(event) {
  return event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input[type=number]");
}

function letterDown(event) {
  if (typing(event) || event.repeat) return;
  const letter = event.key.toLowerCase(), step = LETTERS.indexOf(letter);
  if (letter === "z" || letter === "x") {
    for (const pitch of [...held.keys()]) lift(pitch);
    octave = Math.max(24, Math.min(84, octave + (letter === "z" ? -12 : 12)));
    say(`The keys begin at C${octave / 12 - 1}.`);
  } else if (letter.length === 1 && step >= 0) {
    event.preventDefault();
    down.set(letter, octave + step);
    press(octave + step, 70);
  }
}

function letterUp(event) {
  const letter = event.key.toLowerCase();
  lift(down.get(letter));
  down.delete(letter);
}

async function useMidi() {
  if (!navigator.requestMIDIAccess) return say("This browser knows no MIDI keyboards. Chrome, Edge and Firefox do.", true);
  try {
    const access = await navigator.requestMIDIAccess();
    const ringing = new Set(); // keys that are up while the pedal is down
    let pedal = false;
    const hear = ({ data: [status, first, second] }) => {
      const kind = status >> 4;
      if (kind === 9 && second) {
        if (ringing.delete(first)) lift(first);
        press(first, second);
      } else if (kind === 8 || kind === 9) {
        if (pedal) ringing.add(first);
        else lift(first);
      } else if (kind === 11 && first === SUSTAIN) {
        pedal = second >= 64;
        if (!pedal) ringing.forEach(lift);
        if (!pedal) ringing.clear();
      }
    };
    const connect = () => {
      const names = [...access.inputs.values()].map((input) => {
        input.onmidimessage = hear;
        return input.name;
      });
      say(names.length ? `Play on ${names.join(", ")}.` : "No MIDI keyboard was found. Plug one in.", !names.length);
    };
    access.onstatechange = connect;
    connect();
  } catch {
    say("The browser does not allow MIDI keyboards here. Allow them for this page, and try again.", true);
  }
}

// ---- together -------------------------------------------------------------------------------

function showSettings() {
  for (const name of SETTINGS) {
    const value = +$(name).value, plus = name !== "temperature" && value > 0 ? "+" : "";
    document.querySelector(`label[for=${name}] output`).value = plus + value;
  }
}

function listen() {
  $("play").onclick = toggle;
  $("fresh").onclick = () => {
    if (!$("seed").reportValidity()) return;
    $("seed").value = (+$("seed").value + 1) % Number.MAX_SAFE_INTEGER;
    start();
  };
  $("save").onclick = save;
  $("seed").onchange = () => piece.state !== "idle" && start();
  $("settings").onsubmit = (event) => event.preventDefault();
  for (const name of SETTINGS) {
    $(name).oninput = () => {
      showSettings();
      engine?.postMessage({ kind: "settings", settings: settings() });
    };
  }
  $("file").onchange = () => {
    if ($("file").files[0]) open($("file").files[0]);
    $("file").value = "";
  };
  $("midi").onclick = useMidi;
  $("nothing").onclick = () => {
    opening = NOTHING;
    start();
  };
  addEventListener("keydown", letterDown);
  addEventListener("keyup", letterUp);
  addEventListener("blur", () => [...held.keys()].forEach(lift));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
  addEventListener("dragleave", () => $("stage").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) open(file);
    else say("Drop a MIDI file: a file that ends in .mid.", true);
  });
}

$("count").textContent = `${(facts.numbers / 1e6).toFixed(1)} million`;
layKeys();
pointers();
showSettings();
listen();
setInterval(tick, 200);
requestAnimationFrame(frame);
load().catch((error) => answers.failed({ why: error.message }));
