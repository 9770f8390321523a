// A small piano: strings that are sums of decaying sines, softer ones darker, in a room.
const RATE = 24000; // Hz
const PARTIALS = 12;
const RELEASE = 0.09; // seconds in which a damped string falls to a third

class Piano {
  constructor(context = new AudioContext({ latencyHint: "interactive" })) {
    this.context = context;
    this.strings = new Map(); // a buffer a key, made when it is first struck
    this.limiter = new DynamicsCompressorNode(context, { threshold: -14, knee: 12, ratio: 6, release: 0.2 });
    this.limiter.connect(context.destination);
    const room = new ConvolverNode(context, { buffer: this.echo(1.6) });
    this.wet = new GainNode(context, { gain: 0.16 });
    this.wet.connect(room).connect(this.limiter);
    this.open();
  }

  get now() {
    return this.context.currentTime;
  }

  // Where the strings of one piece meet.
  open() {
    this.out = new GainNode(this.context, { gain: 0.28 });
    this.out.connect(this.limiter);
    this.out.connect(this.wet);
    this.voices = new Map(); // the last voice of each key
  }

  // Nothing sounds any more, nor will what was to come.
  silence() {
    const old = this.out;
    old.gain.setTargetAtTime(0, this.now, 0.04);
    setTimeout(() => old.disconnect(), 400);
    this.open();
  }

  // Strike a key at a time of the context's clock; `end` may come later, through `release`.
  strike(pitch, velocity, start, end = Infinity) {
    start = Math.max(start, this.now);
    const loud = velocity / 127, before = this.voices.get(pitch);
    if (before && before.end > start) this.release(before, start);
    const source = new AudioBufferSourceNode(this.context, { buffer: this.string(pitch) });
    const dark = new BiquadFilterNode(this.context, { type: "lowpass", Q: 0.3, frequency: 500 + 9000 * loud ** 1.7 });
    const level = new GainNode(this.context, { gain: 0.05 + 0.75 * loud ** 1.7 });
    source.connect(dark).connect(level).connect(this.out);
    source.start(start);
    const voice = { source, level, end: Infinity };
    source.onended = () => level.disconnect();
    this.voices.set(pitch, voice);
    if (end < Infinity) this.release(voice, Math.max(end, start + 0.02));
    return voice;
  }

  release(voice, when) {
    voice.end = when;
    voice.level.gain.cancelScheduledValues(when);
    voice.level.gain.setTargetAtTime(0, when, RELEASE);
    voice.source.stop(when + 8 * RELEASE);
  }

  // One string: each partial a little sharp, as steel is stiff, and dying in two steps, fast and slow.
  string(pitch) {
    if (this.strings.has(pitch)) return this.strings.get(pitch);
    const hertz = 440 * 2 ** ((pitch - 69) / 12);
    const decay = 0.4 * 2 ** ((pitch - 60) / 16); // a second
    const length = Math.round(RATE * Math.min(7, Math.max(1, 4 / decay)));
    const buffer = new AudioBuffer({ length, sampleRate: RATE });
    const wave = buffer.getChannelData(0);
    for (let k = 1; k <= PARTIALS; k++) {
      const frequency = k * hertz * Math.sqrt(1 + 3e-4 * k * k);
      if (frequency > 0.45 * RATE) break;
      const strength = Math.abs(Math.sin(Math.PI * k / 7.3)) / k ** 1.1; // the hammer strikes at a seventh
      for (const [share, speed] of [[0.7, 2.2], [0.3, 0.6]]) {
        ring(wave, share * strength, frequency / RATE, decay * speed * (0.6 + 0.4 * k) / RATE);
      }
    }
    for (let i = 0; i < 60; i++) wave[i] *= i / 60;
    this.strings.set(pitch, buffer);
    return buffer;
  }

  echo(seconds) {
    const rate = this.context.sampleRate, length = Math.round(seconds * rate);
    const buffer = new AudioBuffer({ length, sampleRate: rate, numberOfChannels: 2 });
    for (const side of [0, 1]) {
      const wave = buffer.getChannelData(side);
      for (let i = 0; i < length; i++) wave[i] = (2 * Math.random() - 1) * Math.exp(-5 * i / length) * Math.min(1, i / 400);
    }
    return buffer;
  }
}

// Add a decaying sine: two products a sample.
function ring(wave, strength, cycles, decay) {
  const fall = Math.exp(-decay), turn = 2 * Math.PI * cycles;
  const a = 2 * fall * Math.cos(turn), b = fall * fall;
  let before = 0, now = strength * fall * Math.sin(turn);
  for (let i = 1; i < wave.length; i++) {
    wave[i] += now;
    [before, now] = [now, a * now - b * before];
  }
}
