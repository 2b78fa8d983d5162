
/** Scores of a method or of one axis: whole numbers [panel, concept, frame, row, column] between low and high. */
class Scores {
  constructor(entry) {
    const raw = bytes(entry.data);
    this.numbers = entry.bits === 16 ? new Uint16Array(raw.buffer) : raw;
    this.top = entry.bits === 16 ? 65535 : 254;
    this.missing = entry.bits === 16 ? -1 : 255;
    [this.frames, this.height, this.width] = entry.grid;
    this.low = entry.low;
    this.high = entry.high;
  }

  /** One map as shares of its concept's scale, 0 to 1; NaN is what was never recorded. */
  share(panel, concept, frame) {
    const cells = this.height * this.width;
    const start = ((panel * this.low.length + concept) * this.frames + frame) * cells;
    return Float32Array.from(this.numbers.subarray(start, start + cells), (number) =>
      number === this.missing ? NaN : number / this.top,
    );
  }

  /** The score that a share of the scale stands for. */
  score(concept, share) {
    return this.low[concept] + share * (this.high[concept] - this.low[concept]);
  }

  /** Mean or highest share of every frame. */
  curve(concept, peak) {
    return Array.from({ length: this.frames }, (_, frame) => {
      const share = this.share(0, concept, frame);
      return peak ? share.reduce((a, b) => Math.max(a, b)) : share.reduce((a, b) => a + b, 0) / share.length;
    });
  }
}

/** Between which cells a pixel lies, and how far from the first: centers are aligned, not corners. */
function between(cells, pixels) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const place = Math.max(0, ((pixel + 0.5) * cells) / pixels - 0.5);
    const first = Math.min(Math.floor(place), cells - 1);
    return [first, Math.min(first + 1, cells - 1), place - first];
  });
}

/** A map in pixels, bilinear. */
function enlarge(share, height, width, rows, columns) {
  const across = between(width, columns);
  const target = new Float32Array(rows * columns);
  between(height, rows).forEach(([top, bottom, down], row) => {
    for (let column = 0; column < columns; column++) {
      const [left, right, over] = across[column];
      const upper = share[top * width + left] * (1 - over) + share[top * width + right] * over;
      const lower = share[bottom * width + left] * (1 - over) + share[bottom * width + right] * over;
      target[row * columns + column] = upper * (1 - down) + lower * down;
    }
  });
  return target;
}

function readable(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  return Math.abs(number) >= 1e5 || (number !== 0 && Math.abs(number) < 1e-3)
    ? number.toExponential(2)
    : String(Number(number.toPrecision(4)));
}
