// One open response: its text, drawn block by block as it comes into view, and a strip chart along it.
const BLOCK = 256; // tokens of a block

class CreditPane {
  /** `select(pane, token)` is called when a token is pointed at or reached by a key. */
  constructor(opened, title, select) {
    this.opened = opened;
    this.select = select;
    this.count = opened.ends.length;
    this.at = null;
    this.marked = [];
    this.element = document.createElement("article");
    this.element.className = "pane";
    this.strip = document.createElement("canvas");
    this.strip.className = "strip";
    this.strip.setAttribute("role", "img");
    this.text = document.createElement("div");
    this.text.className = "text";
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "region");
    this.text.setAttribute("aria-label", `Tokens of ${title}; arrow keys go from token to token`);
    this.element.append(this.heading(title), this.prompt(), this.strip, this.text);
    this.blocks = [];
    for (let from = 0; from < this.count; from += BLOCK) {
      const block = document.createElement("span"), to = Math.min(from + BLOCK, this.count);
      block.textContent = opened.text.slice(from ? opened.ends[from - 1] : 0, opened.ends[to - 1]);
      block.dataset.block = this.blocks.length;
      this.blocks.push({ element: block, from, to, spans: null });
    }
    this.text.append(...this.blocks.map((block) => block.element));
    this.watch();
  }

  heading(title) {
    const heading = document.createElement("h2");
    heading.textContent = title;
    return heading;
  }

  prompt() {
    const { prompt, ground_truth: right, answer } = this.opened.response;
    const details = document.createElement("details"), summary = document.createElement("summary");
    const pre = document.createElement("pre");
    summary.textContent = `prompt · right answer ${right || "(none)"} · answered ${answer || "(nothing)"}`;
    pre.textContent = prompt;
    details.append(summary, pre);
    return details;
  }

  watch() {
    this.observer = new IntersectionObserver(
      (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => this.draw(Number(entry.target.dataset.block))),
      { root: this.text, rootMargin: "300px" },
    );
    this.blocks.forEach((block) => this.observer.observe(block.element));
    const pointed = (event) => {
      const token = event.target.dataset.token;
      if (token !== undefined) this.go(Number(token), false);
    };
    this.text.addEventListener("mouseover", pointed);
    this.text.addEventListener("click", pointed);
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.strip.addEventListener("click", (event) => {
      this.go(Math.min(this.count - 1, Math.floor((event.offsetX / this.strip.clientWidth) * this.count)), true);
    });
    this.resized = new ResizeObserver(() => this.drawStrip());
    this.resized.observe(this.strip);
  }

  close() {
    this.observer.disconnect();
    this.resized.disconnect();
    this.element.remove();
  }

  key(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 50, PageUp: -50, Home: -this.count, End: this.count };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = this.at === null ? 0 : this.at + moves[event.key];
    this.go(Math.max(0, Math.min(this.count - 1, next)), true);
  }

  /** Make a token the present one. */
  go(token, scroll) {
    if (this.at !== null) this.span(this.at).classList.remove("here");
    this.at = token;
    const span = this.span(token);
    span.classList.add("here");
    if (scroll) {
      const top = span.offsetTop;
      if (top < this.text.scrollTop || top > this.text.scrollTop + this.text.clientHeight - 40) {
        this.text.scrollTop = top - this.text.clientHeight / 3;
      }
    }
    this.drawStrip();
    this.select(this, token);
  }

  /** Underline these tokens, and no others. */
  mark(tokens) {
    this.marked.forEach((span) => span.classList.remove("source"));
    this.marked = tokens.map((token) => this.span(token));
    this.marked.forEach((span) => span.classList.add("source"));
  }

  /** A token's element, which is drawn if it has not been yet. */
  span(token) {
    const place = Math.floor(token / BLOCK);
    this.draw(place);
    return this.blocks[place].spans[token - this.blocks[place].from];
  }

  draw(place) {
    const block = this.blocks[place];
    if (block.spans !== null) return;
    block.spans = [];
    for (let token = block.from; token < block.to; token++) {
      const text = creditData.token(this.opened, token);
      const span = document.createElement(text ? "span" : "b");
      span.textContent = text || "▯";
      span.dataset.token = token;
      if (!creditData.has(this.opened.state[token], "produced")) span.className = "told";
      block.spans.push(span);
    }
    block.element.replaceChildren(...block.spans);
    this.observer.unobserve(block.element);
    this.colourBlock(block);
  }

  /** Colour by a quantity, whose colours are full at `reach` from neutral. */
  colour(quantity, reach) {
    this.quantity = quantity;
    this.reach = reach;
    this.blocks.forEach((block) => this.colourBlock(block));
    this.strip.setAttribute("aria-label", `${quantity.name} along the response`);
    this.drawStrip();
  }

  colourBlock(block) {
    if (block.spans === null || !this.quantity) return;
    block.spans.forEach((span, index) => (span.style.background = this.paint(block.from + index)));
  }

  paint(token) {
    const value = this.quantity.of(this.opened, token);
    if (this.quantity.key === "state") return value ? creditPaint.state(value) : "";
    if (!creditData.has(this.opened.state[token], "produced")) return "";
    return creditPaint.number((value - this.quantity.neutral) / (this.reach || 1));
  }

  /** A bar for each pixel: the mean, from neutral in the middle, and the colours of states as parts of the height. */
  drawStrip() {
    const width = this.strip.clientWidth, height = this.strip.clientHeight, sharp = window.devicePixelRatio || 1;
    if (!width || !this.quantity || !this.count) return;
    this.strip.width = width * sharp;
    this.strip.height = height * sharp;
    const context = this.strip.getContext("2d");
    context.scale(sharp, sharp);
    const style = getComputedStyle(document.documentElement), bars = Math.min(width, this.count);
    for (let bar = 0; bar < bars; bar++) {
      const from = Math.floor((bar * this.count) / bars), to = Math.max(from + 1, Math.floor(((bar + 1) * this.count) / bars));
      this.drawBar(context, style, (bar * width) / bars, Math.max(1, width / bars), from, to, height);
    }
    context.fillStyle = style.getPropertyValue("--line");
    if (this.quantity.key !== "state") context.fillRect(0, height / 2 - 0.5, width, 1);
    if (this.at !== null) {
      context.fillStyle = style.getPropertyValue("--text");
      context.fillRect(((this.at + 0.5) / this.count) * width - 1, 0, 2, height);
    }
  }

  drawBar(context, style, left, width, from, to, height) {
    if (this.quantity.key === "state") {
      let top = height;
      for (let state = 1; state < creditData.states.length; state++) {
        let share = 0;
        for (let token = from; token < to; token++) share += this.quantity.of(this.opened, token) === state;
        const part = (share / (to - from)) * height;
        context.fillStyle = creditPaint.state(state, style);
        context.fillRect(left, (top -= part), width, part);
      }
      return;
    }
    let sum = 0, count = 0;
    for (let token = from; token < to; token++) {
      const value = this.quantity.of(this.opened, token);
      if (!creditData.has(this.opened.state[token], "produced") || Number.isNaN(value)) continue;
      sum += value - this.quantity.neutral;
      count++;
    }
    const share = count ? Math.max(-1, Math.min(1, sum / count / (this.reach || 1))) : 0;
    context.fillStyle = `rgb(${style.getPropertyValue(share > 0 ? "--up" : "--down")})`;
    context.fillRect(left, share > 0 ? (height / 2) * (1 - share) : height / 2, width, (Math.abs(share) * height) / 2);
  }
}

/** Colours. On a page they are variables, which follow light and dark; a canvas needs them resolved from `style`. */
const creditPaint = {
  number(share) {
    if (Number.isNaN(share) || share === 0) return "";
    return `rgb(var(${share > 0 ? "--up" : "--down"}) / ${(Math.min(1, Math.abs(share)) * 0.55).toFixed(3)})`;
  },
  state(number, style) {
    const name = ["", "--down", "--state-2", "--state-3", "--state-4", "--state-4"][number];
    return style ? `rgb(${style.getPropertyValue(name)})` : `rgb(var(${name}) / .5)`;
  },
};
