// The credit viewer's numbers: unpacks a response (credit_page/pack.py packs it), and works out quantities of tokens.
const creditData = {
  /** Read the page's data once; responses stay packed until `open`. */
  start(data) {
    Object.assign(this, data);
    this.opened = new Map();
  },

  /** A response's tokens, states and columns, unpacked; the same promise for every call. */
  open(index) {
    if (!this.opened.has(index)) this.opened.set(index, this.unpack(this.responses[index]));
    return this.opened.get(index);
  },

  async unpack(response) {
    const compressed = Uint8Array.from(atob(response.packed), (character) => character.charCodeAt(0));
    const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = new DataView(bytes.buffer).getUint32(0, true), count = response.tokens;
    const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(4, 4 + size));
    let at = 4 + size;
    const plane = () => bytes.subarray(at, (at += count));
    const codes = () => {
      const low = plane(), high = plane(), found = new Int16Array(count);
      for (let token = 0; token < count; token++) found[token] = low[token] | (high[token] << 8);
      return found;
    };
    const ends = new Uint32Array(count);
    let end = 0;
    codes().forEach((length, token) => (ends[token] = end += length));
    const state = plane(), values = {};
    for (const column of this.columns) values[column.name] = this.numbers(codes(), column);
    return { response, text, ends, state, values };
  },

  numbers(codes, column) {
    const { finest, perCode, missing } = this.scale;
    const number = column.step === null ? (code) => Math.sinh(code * perCode) * finest : (code) => code * column.step;
    return Float32Array.from(codes, (code) => (code === missing ? NaN : number(code)));
  },

  token(opened, token) {
    return opened.text.slice(token ? opened.ends[token - 1] : 0, opened.ends[token]);
  },

  has(state, bit) {
    return (state & this.bits[bit]) !== 0;
  },

  /** The later tokens that F of a token is the sum of, largest first: γ^(k−t) M_k Δ_k, and its share of F. */
  sources(opened, token, most) {
    const { gamma } = this.about, moved = opened.values.log_ratio;
    if (gamma === null || !this.has(opened.state[token], "produced")) return [];
    const found = [];
    for (let later = token, decay = 1; later < moved.length && decay > 1e-5; later++, decay *= gamma) {
      const term = this.has(opened.state[later], "takesPart") ? decay * moved[later] : 0;
      if (term !== 0) found.push({ token: later, term });
    }
    return found.sort((a, b) => Math.abs(b.term) - Math.abs(a.term)).slice(0, most);
  },

  /** What can be shown: its name, its value of a token, and the value without colour. */
  quantities() {
    const column = (name) => (opened, token) => opened.values[name][token];
    const known = new Set(this.columns.map((each) => each.name));
    const all = [
      { key: "influence", name: "influence f", of: column("influence"), neutral: 1, needs: "influence" },
      { key: "future_kl", name: "future-KL F", of: column("future_kl"), neutral: 0, needs: "future_kl" },
      { key: "log_ratio", name: "Δ = log π − log π_old", of: column("log_ratio"), neutral: 0, needs: "log_ratio" },
      {
        key: "advantage", name: "advantage × f", neutral: 0, needs: "influence",
        of: (opened, token) => opened.response.advantage * opened.values.influence[token],
      },
      {
        key: "ratio", name: "ratio π / π_old", neutral: 1, needs: "log_ratio",
        of: (opened, token) => Math.exp(opened.values.log_ratio[token]),
      },
      { key: "state", name: "clip state", of: (opened, token) => this.stateNumber(opened.state[token]), neutral: 0 },
      { key: "entropy", name: "entropy", of: column("entropy"), neutral: 0, needs: "entropy" },
      { key: "mismatch", name: "trainer − engine log-prob", of: column("mismatch"), neutral: 0, needs: "mismatch" },
      {
        key: "importance_weight", name: "importance weight", of: column("importance_weight"), neutral: 1,
        needs: "importance_weight",
      },
      { key: "old_log_prob", name: "log π_old", of: column("old_log_prob"), neutral: 0, needs: "old_log_prob" },
    ];
    return all.filter((each) => !each.needs || known.has(each.needs));
  },

  states: ["plain", "clipped", "dual clipped", "outside of F's sum", "not in the loss", "not produced by the policy"],

  /** Place of a token's state in `states`: the one that matters most. */
  stateNumber(state) {
    if (!this.has(state, "produced")) return 5;
    if (!this.has(state, "counts")) return 4;
    if (this.has(state, "dualClipped")) return 2;
    if (this.has(state, "clipped")) return 1;
    return this.about.gamma !== null && !this.has(state, "takesPart") ? 3 : 0;
  },

  /** The distance from neutral at which colours are full: that of the 98th percentile of the tokens. */
  reach(opened, quantity) {
    const far = [];
    for (let token = 0; token < opened.ends.length; token++) {
      if (this.has(opened.state[token], "produced")) far.push(Math.abs(quantity.of(opened, token) - quantity.neutral));
    }
    const sorted = Float64Array.from(far.filter((value) => !Number.isNaN(value))).sort();
    return sorted.length ? sorted[Math.floor(0.98 * (sorted.length - 1))] || sorted[sorted.length - 1] : 0;
  },
};
