
/** Small maps of every layer, step or head of one method, of the concept and frame that are shown. */
class Panels {
  constructor(axis, entry, place) {
    this.axis = axis;
    this.names = entry.names;
    this.rows = entry.rows || [null];
    this.values = entry.scores;
    this.scores = new Scores(entry);
    this.row = 0;
    this.place = place;
    this.cards = entry.names.map((name) => this.card(`${axis} ${name}`));
    place.replaceChildren(...this.cards.map((card) => card.figure));
  }

  card(label) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    canvas.width = this.scores.width;
    canvas.height = this.scores.height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `map of ${label}`);
    figure.append(canvas, caption);
    const card = { figure, canvas, caption, label };
    if (this.values) {
      card.bar = document.createElement("div");
      card.bar.className = "bar";
      figure.append(card.bar);
    }
    return card;
  }

  /** Draw the maps at a share of the clip, since there may be fewer frames of them than tokens. */
  draw(view, token, tokens) {
    const frame = Math.min(this.scores.frames - 1, Math.floor((token * this.scores.frames) / tokens));
    const values = this.values && this.values[this.row];
    const highest = values && Math.max(...values.map((value) => value ?? 0));
    this.cards.forEach((card, index) => {
      const share = this.scores.share(this.row * this.cards.length + index, view.concept, frame);
      drawShare(card.canvas, share, COLORMAPS[view.colors]);
      const mean = this.scores.score(view.concept, share.reduce((a, b) => a + b, 0) / share.length);
      card.caption.textContent = card.label;
      card.figure.title = `${card.label}, mean ${readable(mean)}`;
      if (!values) return;
      card.caption.textContent = `${card.label}: ${readable(values[index])}`;
      card.bar.style.width = `${highest > 0 ? (100 * Math.max(0, values[index] ?? 0)) / highest : 0}%`;
    });
  }
}

function drawShare(canvas, share, table) {
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(canvas.width, canvas.height);
  share.forEach((value, pixel) => {
    if (Number.isNaN(value)) return;
    colorize(table, value, pixels.data, 4 * pixel);
    pixels.data[4 * pixel + 3] = 255;
  });
  pen.putImageData(pixels, 0, 0);
}

/** A curve for each concept over the frames, and a line at the frame shown. */
class Timeline {
  constructor(svg, lowest, highest) {
    this.svg = svg;
    this.ends = [lowest, highest];
  }

  element(name, attributes) {
    const element = document.createElementNS(this.svg.namespaceURI, name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    return element;
  }

  /** Curves anew: shares of each concept's own scale, or scores, which have one scale together. */
  draw(scores, tokens, view) {
    const [shown, unit] = view.curve.split(" ");
    const curves = scores.low.map((_, concept) => {
      const shares = scores.curve(concept, shown === "peak");
      return tokens.map((token) => (unit === "own" ? shares[token] : scores.score(concept, shares[token])));
    });
    const all = curves.flat();
    const low = unit === "own" ? 0 : Math.min(...all);
    const high = Math.max(...all);
    const x = (frame) => (1000 * frame) / Math.max(1, tokens.length - 1);
    const y = (value) => 195 - 190 * (high > low ? (value - low) / (high - low) : 0);
    const order = [...curves.keys()].sort((a, b) => (a === view.concept) - (b === view.concept));
    const lines = order.map((concept) => {
      const points = curves[concept].map((value, frame) => `${x(frame).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      const picked = concept === view.concept;
      const style = { "stroke-dasharray": DASHES[Math.floor(concept / 2) % 4], stroke: css(hue(concept)) };
      return this.element("polyline", { points, class: picked ? "curve picked" : "curve", ...style });
    });
    this.cursor = this.element("line", { y1: 0, y2: 200, class: "cursor" });
    this.svg.replaceChildren(...lines, this.cursor);
    this.ends[0].textContent = readable(low);
    this.ends[1].textContent = readable(high);
    this.x = x;
  }

  point(frame) {
    if (!this.cursor) return;
    this.cursor.setAttribute("x1", this.x(frame));
    this.cursor.setAttribute("x2", this.x(frame));
  }
}
