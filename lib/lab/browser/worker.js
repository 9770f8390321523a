// Answers the page through a port: in a worker of its own, or, where a browser starts none from a file, in
// slices between the page's frames.
const SLICE = 15; // milliseconds

function serve(port) {
  let player, encoder, piece = 0, until = 0, waiting = false;

  function work() {
    waiting = false;
    const last = performance.now() + SLICE, notes = [];
    while (player.unread.length || player.grammar.seconds < until) {
      notes.push(...player.step());
      if (performance.now() > last) break;
    }
    const heard = !player.unread.length;
    if (notes.length || heard) port.postMessage({ kind: "notes", piece, notes, heard, seconds: player.grammar.seconds });
    if (!heard || player.grammar.seconds < until) go();
  }
  function go() {
    if (!waiting) setTimeout(work);
    waiting = true;
  }

  const answers = {
    load({ wasm, weights, embeddings, facts }) {
      const rules = new Rules(facts.table);
      encoder = new Encoder(rules);
      player = new Player(new Model(wasm, weights, embeddings, facts.sizes, facts.epsilon), rules);
      port.postMessage({ kind: "ready" });
    },
    // A new piece: notes of an opening, none for none, and the second at which the new music enters.
    open(data) {
      piece = data.piece;
      until = 0;
      player.start(encoder.encode(data.notes), data.begin, data.seed);
      player.set(data.settings);
      go();
    },
    settings(data) {
      player.set(data.settings);
    },
    play(data) {
      until = data.until;
      if (data.piece === piece) go();
    },
  };
  port.onmessage = ({ data }) => {
    try {
      answers[data.kind](data);
    } catch (error) {
      port.postMessage({ kind: "failed", why: String(error.message ?? error) });
    }
  };
}
