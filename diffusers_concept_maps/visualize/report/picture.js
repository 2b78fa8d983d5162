
/** The large picture: a frame, what is laid over it, and points on a canvas above. */
class Picture {
  constructor(data, canvas, above) {
    [this.height, this.width] = data.size;
    this.canvas = canvas;
    this.above = above;
    this.tracks = data.tracks && readTracks(data.tracks);
    this.colors = data.tracks && data.tracks.colors;
    this.images = data.frames.map((source) => {
      const image = new Image();
      image.src = source;
      return image;
    });
    this.shares = new Map();
  }

  /** Wait for the frames, whose size is that of the picture unless they were made smaller to save room. */
  async open() {
    await Promise.all(this.images.map((image) => image.decode()));
    const [first] = this.images;
    this.scale = first ? first.naturalWidth / this.width : 1;
    this.canvas.parentElement.style.maxWidth = `calc(72vh * ${this.width / this.height})`;
    for (const layer of [this.canvas, this.above]) {
      layer.width = first ? first.naturalWidth : this.width;
      layer.height = first ? first.naturalHeight : this.height;
    }
    const fine = Math.max(1, Math.ceil(960 / this.above.width));
    this.above.width *= fine;
    this.above.height *= fine;
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
  }

  /** Shares of the scale at every pixel of the frame shown; kept until the frame or the method changes. */
  share(scores, concept, token) {
    const key = `${token} ${concept}`;
    if (this.source !== scores || this.token !== token) this.shares.clear();
    [this.source, this.token] = [scores, token];
    if (!this.shares.has(key)) {
      const { height, width } = scores;
      const share = scores.share(0, concept, token);
      this.shares.set(key, enlarge(share, height, width, this.canvas.height, this.canvas.width));
    }
    return this.shares.get(key);
  }

  draw(view, scores, token) {
    const { width, height } = this.canvas;
    if (this.images.length) this.pen.drawImage(this.images[view.frame], 0, 0);
    else this.pen.clearRect(0, 0, width, height);
    if (scores) {
      const pixels = this.pen.getImageData(0, 0, width, height);
      const opacity = this.images.length ? view.opacity : 1;
      if (view.mode === "heat") this.heat(pixels.data, this.share(scores, view.concept, token), view, opacity);
      else if (view.mode === "threshold") this.mask(pixels.data, this.share(scores, view.concept, token), view, opacity);
      else this.winners(pixels.data, scores, token, opacity);
      this.pen.putImageData(pixels, 0, 0);
    }
    if (this.tracks) this.drawTracks(view.frame);
  }

  /** Where the score is low the frame shows through; without a frame the colors stand alone. */
  heat(data, share, view, opacity) {
    const table = COLORMAPS[view.colors];
    const color = new Float32Array(3);
    for (let pixel = 0; pixel < share.length; pixel++) {
      colorize(table, share[pixel], color, 0);
      blend(data, pixel, color, this.images.length ? opacity * share[pixel] : 1);
    }
  }

  mask(data, share, view, opacity) {
    const color = hue(view.concept);
    for (let pixel = 0; pixel < share.length; pixel++) {
      blend(data, pixel, color, share[pixel] >= view.threshold ? opacity : 0);
    }
  }

  /** The concept of the highest score at every pixel; the first one on ties. */
  winners(data, scores, token, opacity) {
    const best = this.winner(scores, token);
    const colors = scores.low.map((_, concept) => hue(concept));
    for (let pixel = 0; pixel < best.length; pixel++) blend(data, pixel, colors[best[pixel]], opacity);
  }

  winner(scores, token) {
    const shares = scores.low.map((_, concept) => this.share(scores, concept, token));
    return Uint16Array.from(shares[0], (_, pixel) => {
      let best = 0;
      for (let concept = 1; concept < shares.length; concept++) {
        if (scores.score(concept, shares[concept][pixel]) > scores.score(best, shares[best][pixel])) best = concept;
      }
      return best;
    });
  }

  /** Points as discs, as rings where they are not visible, with trails of twelve frames. */
  drawTracks(frame) {
    const pen = this.above.getContext("2d");
    const scale = this.above.width / this.width;
    const radius = Math.max(2.5, this.above.width / 180);
    pen.clearRect(0, 0, this.above.width, this.above.height);
    this.tracks.forEach((track, point) => {
      const place = (at) => [(track[at].x + 0.5) * scale, (track[at].y + 0.5) * scale];
      pen.strokeStyle = pen.fillStyle = css(this.colors[point]);
      for (let at = Math.max(1, frame - 11); at <= frame; at++) {
        if (!track[at].visible || !track[at - 1].visible) continue;
        pen.globalAlpha = 1 - (frame - at) / 12;
        pen.lineWidth = radius * 0.7;
        pen.beginPath();
        pen.moveTo(...place(at - 1));
        pen.lineTo(...place(at));
        pen.stroke();
      }
      pen.globalAlpha = 1;
      pen.beginPath();
      pen.arc(...place(frame), radius, 0, 2 * Math.PI);
      if (track[frame].visible) pen.fill();
      pen.strokeStyle = track[frame].visible ? "black" : pen.fillStyle;
      pen.lineWidth = track[frame].visible ? radius / 4 : radius / 2;
      pen.stroke();
    });
  }
}

function blend(data, pixel, color, alpha) {
  for (let channel = 0; channel < 3; channel++) {
    const place = 4 * pixel + channel;
    data[place] = data[place] * (1 - alpha) + color[channel] * alpha;
  }
  data[4 * pixel + 3] = 255;
}

/** Per point, its place and visibility in every frame. */
function readTracks(entry) {
  const places = new Float32Array(bytes(entry.places).buffer);
  const visible = bytes(entry.visible);
  const frames = entry.points ? visible.length / entry.points : 0;
  return Array.from({ length: entry.points }, (_, point) =>
    Array.from({ length: frames }, (__, frame) => {
      const at = point * frames + frame;
      return { x: places[2 * at], y: places[2 * at + 1], visible: visible[at] === 1 };
    }),
  );
}
