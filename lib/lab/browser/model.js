// One token through the whole model: lib/mamba/step_cpu.cpp, compiled to WebAssembly, and its memory.
class Model {
  // wasm: bytes of the module. weights: Float32Array as `pack` in lib/mamba/step_cpu.py lays them out for
  // vectors of four. embeddings: Float32Array (V, width). sizes: the ten numbers of `Sizes`.
  constructor(wasm, weights, embeddings, sizes, epsilon) {
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(wasm));
    exports._initialize();
    this.exports = exports;
    this.vocabulary = sizes[1];
    this.epsilon = epsilon;
    this.end = exports.__heap_base.value;
    this.sizes = this.room(sizes.length);
    this.counts = this.room(4);
    new Int32Array(exports.memory.buffer, this.sizes, sizes.length).set(sizes);
    exports.mamba_sizes(this.sizes, 1, this.counts);
    const counts = new Int32Array(exports.memory.buffer, this.counts, 4).slice();
    if (counts[0] !== weights.length) throw new Error("the weights do not fit the program: build the page again");
    [this.weights, this.windows, this.states, this.scratch] = Array.from(counts, (count) => this.room(count));
    this.embeddings = this.room(embeddings.length);
    this.token = this.room(2); // 64 bits
    this.logits = this.room(this.vocabulary);
    this.floats(this.weights, weights.length).set(weights);
    this.floats(this.embeddings, embeddings.length).set(embeddings);
  }

  // The address of so many numbers of 32 bits, at a multiple of 64 bytes.
  room(count) {
    const memory = this.exports.memory;
    const start = Math.ceil(this.end / 64) * 64;
    this.end = start + 4 * count;
    const missing = this.end - memory.buffer.byteLength;
    if (missing > 0) memory.grow(Math.ceil(missing / 65536));
    return start;
  }

  floats(address, count) {
    return new Float32Array(this.exports.memory.buffer, address, count);
  }

  // Forget everything that was read.
  forget() {
    this.floats(this.windows, this.states - this.windows >> 2).fill(0);
    this.floats(this.states, this.scratch - this.states >> 2).fill(0);
  }

  // Read a token; the logits of the next one, in a place that the next call writes over.
  step(token) {
    const { exports } = this;
    new BigInt64Array(exports.memory.buffer, this.token, 1)[0] = BigInt(token);
    const failed = exports.mamba_step(this.sizes, this.epsilon, this.weights, this.embeddings, this.windows,
      this.states, this.scratch, this.token, this.logits, 1);
    if (failed) throw new Error(`token ${token} is not in the vocabulary`);
    return this.floats(this.logits, this.vocabulary);
  }
}
