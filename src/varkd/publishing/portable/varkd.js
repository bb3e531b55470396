// Sampling in the browser: the random numbers of `varkd.generate` and its inverse CDF, over two ONNX graphs.
// The same label, seed and settings give the same codes as `varkd.generate`, image by image.

const MASK = (1n << 64n) - 1n;
const IV = [0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n];
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8",
  "905724afe1bc683d", "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a",
  "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));

// BLAKE2b (RFC 7693) of a short text, 8 bytes of it: a BigInt, little-endian.
function blake2b64(text) {
  const bytes = new Uint8Array(128), content = new TextEncoder().encode(text);
  bytes.set(content);
  const view = new DataView(bytes.buffer);
  const m = Array.from({ length: 16 }, (_, i) => view.getBigUint64(8 * i, true));
  const h = [...IV];
  h[0] ^= 0x01010000n ^ 8n;
  const v = [...h, ...IV];
  v[12] ^= BigInt(content.length);
  v[14] ^= MASK;
  const turned = (x, n) => ((x >> n) | (x << (64n - n))) & MASK;
  const mix = (a, b, c, d, x, y) => {
    v[a] = (v[a] + v[b] + x) & MASK; v[d] = turned(v[d] ^ v[a], 32n);
    v[c] = (v[c] + v[d]) & MASK; v[b] = turned(v[b] ^ v[c], 24n);
    v[a] = (v[a] + v[b] + y) & MASK; v[d] = turned(v[d] ^ v[a], 16n);
    v[c] = (v[c] + v[d]) & MASK; v[b] = turned(v[b] ^ v[c], 63n);
  };
  const lanes = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];
  for (let round = 0; round < 12; round++) {
    const s = SIGMA[round % 10];
    lanes.forEach(([a, b, c, d], i) => mix(a, b, c, d, m[s[2 * i]], m[s[2 * i + 1]]));
  }
  return h[0] ^ v[0] ^ v[8];
}

// Numbers in [0, 1) from a Mersenne Twister (MT19937), 24 bits each, as PyTorch draws float32 on the CPU.
function twister(seed, count) {
  const state = new Uint32Array(624), numbers = new Float32Array(count);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  for (let n = 0, at = 624; n < count; n++, at++) {
    if (at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = state[at];
    y ^= y >>> 11; y ^= (y << 7) & 0x9d2c5680; y ^= (y << 15) & 0xefc60000; y ^= y >>> 18;
    numbers[n] = (y & 0xffffff) / 2 ** 24;
  }
  return numbers;
}

export function uniform(seed, row, length) {
  const key = blake2b64(`${seed}/0/sample/${row}`) >> 1n;
  return twister(Number(key & 0xffffffffn), length);
}

// The code at which the CDF of the filtered distribution passes `u`: temperature, top-k, top-p, inverse CDF.
export function draw(logits, u, { temperature, top_k: topK, top_p: topP }) {
  const size = logits.length;
  if (temperature === 0) return logits.indexOf(Math.max(...logits));
  const heated = Float32Array.from(logits, (x) => x / Math.fround(Math.max(temperature, 1e-5)));
  const order = [...heated.keys()].sort((a, b) => heated[b] - heated[a] || a - b);
  const kept = new Uint8Array(size).fill(1);
  if (topK > 0 && topK < size) {
    const threshold = heated[order[topK - 1]];
    heated.forEach((x, i) => { if (x < threshold) kept[i] = 0; });
  }
  const highest = heated[order[0]];
  const weight = Float64Array.from(heated, (x, i) => (kept[i] ? Math.exp(x - highest) : 0));
  if (topP < 1) {
    const total = weight.reduce((sum, x) => sum + x, 0);
    let above = 0;
    for (const i of order) {
      if (above / total > topP) kept[i] = 0;
      above += weight[i];
    }
    kept.forEach((keep, i) => { if (!keep) weight[i] = 0; });
  }
  const target = u * weight.reduce((sum, x) => sum + x, 0);
  let passed = 0;
  for (let i = 0; i < size; i++) {
    passed += weight[i];
    if (passed > target) return i;
  }
  return order[0];
}

export class Sampler {
  constructor(ort, about, step, decoder) { Object.assign(this, { ort, about, step, decoder }); }

  static async load(ort, base = "./") {
    const about = await (await fetch(`${base}about.json`)).json();
    const [step, decoder] = await Promise.all(["step.onnx", "decoder.onnx"].map((name) =>
      ort.InferenceSession.create(base + name, { executionProviders: ["wasm"] })));
    return new Sampler(ort, about, step, decoder);
  }

  // Codes of one image per label, Int32Array (N * L); `seen(codes, slot)` is told of every slot, and may stop by `false`.
  async codes(labels, seed, settings, seen = () => true) {
    const { about, ort } = this;
    const [rows, columns] = about.grid, length = rows * columns, num = labels.length, nil = about.num_classes;
    const guided = settings.guidance > 1, total = guided ? 2 * num : num;
    const width = about.heads * length * about.head_dim;
    const cache = new Float32Array(about.layers * 2 * total * width);
    const noise = labels.map((_, row) => uniform(seed, row, length));
    const codes = new Int32Array(num * length);
    let inputs = Int32Array.from(guided ? [...labels, ...labels.map(() => nil)] : labels);
    for (let slot = 0; slot < length; slot++) {
      const result = await this.step.run({
        input: new ort.Tensor("int32", inputs, [total]), slot: new ort.Tensor("int32", [slot], [1]),
        cache: new ort.Tensor("float32", cache, [about.layers, 2, total, about.heads, length, about.head_dim]),
      });
      const logits = result.logits.data, fresh = result.new.data, size = about.vocab_size, d = about.head_dim;
      for (let i = 0; i < fresh.length / d; i++) cache.set(fresh.subarray(i * d, (i + 1) * d), (i * length + slot) * d);
      const next = new Int32Array(total);
      for (let n = 0; n < num; n++) {
        let own = logits.subarray(n * size, (n + 1) * size);
        if (guided) {
          const other = logits.subarray((num + n) * size, (num + n + 1) * size);
          own = own.map((x, i) => other[i] + Math.fround(settings.guidance) * (x - other[i]));
        }
        const code = draw(own, noise[n][slot], settings);
        codes[n * length + slot] = code;
        next[n] = code + nil + 1;
        if (guided) next[num + n] = next[n];
      }
      inputs = next;
      if (await seen(codes, slot) === false) return null;
    }
    return codes;
  }

  // RGBA pixels of codes, one ImageData per image.
  async images(codes) {
    const [channels, height, width] = this.about.image_shape, length = this.about.grid[0] * this.about.grid[1];
    const num = codes.length / length;
    const result = await this.decoder.run({ codes: new this.ort.Tensor("int32", codes, [num, length]) });
    const pixels = result.images.data, area = height * width;
    return Array.from({ length: num }, (_, n) => {
      const image = new ImageData(width, height);
      for (let i = 0; i < area; i++) {
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[(n * channels + (channels === 1 ? 0 : c)) * area + i];
        image.data[4 * i + 3] = 255;
      }
      return image;
    });
  }
}
