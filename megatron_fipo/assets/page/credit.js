// The credit viewer: a list of responses with filters, the open ones, and the values of the token that is pointed at.
const MOST_SOURCES = 12;
const element = (id) => document.getElementById(id);
const number = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};

const credit = {
  panes: [],

  start(data) {
    creditData.start(data);
    this.quantities = creditData.quantities();
    const option = (value, name) => Object.assign(document.createElement("option"), { value, textContent: name });
    element("quantity").append(...this.quantities.map((each) => option(each.key, each.name)));
    const reasons = [...new Set(data.responses.map((each) => each.finish_reason))].sort();
    element("finish").append(...reasons.map((reason) => option(reason, reason)));
    element("controls").addEventListener("submit", (event) => event.preventDefault());
    // A number counts while it is typed. Not every way of choosing from a list tells of "input".
    const changed = (event) => {
      if (event.type !== (event.target.type === "number" ? "input" : "change")) return;
      if (event.target.id === "quantity") this.colour();
      else if (event.target.id === "siblings") this.open(this.first);
      else this.list();
    };
    for (const kind of ["input", "change"]) element("controls").addEventListener(kind, changed);
    const last = Math.max(...data.responses.map((each) => each.update));
    this.first = Math.max(0, data.responses.findIndex((each) => each.update === last));
    this.buttons = data.responses.map((response, index) => this.button(response, index));
    element("responses").append(...this.buttons);
    this.list();
    if (data.responses.length) this.open(this.first);
  },

  title(response) {
    const reward = response.reward === null ? "–" : `${response.reward > 0 ? "+" : ""}${number(response.reward)}`;
    return `${response.group + 1}.${response.index + 1} · reward ${reward} · ${response.tokens} tokens`;
  },

  button(response, index) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = this.title(response);
    button.title = `problem ${response.problem}, update ${response.update + 1}, ended by ${response.finish_reason}`;
    button.addEventListener("click", () => this.open(index));
    return button;
  },

  /** Whether the filters let a response through. */
  isWanted(response) {
    const inside = (value, name) => {
      const [low, high] = ["low", "high"].map((end) => element(`${name}-${end}`).value);
      return (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
    };
    const is = (fact, name) => ["", fact ? "yes" : "no"].includes(element(name).value);
    return inside(response.reward, "reward") && inside(response.tokens, "length")
      && ["", response.finish_reason].includes(element("finish").value)
      && is(response.truncated, "truncated") && is(response.dropped, "dropped");
  },

  list() {
    const wanted = creditData.responses.map((response) => this.isWanted(response));
    this.buttons.forEach((button, index) => (button.hidden = !wanted[index]));
    const shown = wanted.filter(Boolean).length;
    element("found").textContent = `${shown} of ${wanted.length} responses`;
  },

  /** Show a response, or all of its group. */
  async open(index) {
    const started = performance.now(), response = creditData.responses[index];
    this.first = index;
    const wanted = element("siblings").checked
      ? creditData.responses.flatMap((each, place) => (each.group === response.group ? [place] : []))
      : [index];
    const opened = await Promise.all(wanted.map((place) => creditData.open(place)));
    if (this.first !== index) return; // another one was opened meanwhile
    this.panes.forEach((pane) => pane.close());
    element("token").hidden = true;
    this.panes = opened.map((each) => new CreditPane(each, this.describe(each.response), (...found) => this.show(...found)));
    element("panes").append(...this.panes.map((pane) => pane.element));
    this.buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(wanted.includes(place))));
    this.colour();
    requestAnimationFrame(() => setTimeout(() => {
      element("panes").dataset.openedMs = (performance.now() - started).toFixed(0);
    }));
  },

  describe(response) {
    const more = [`advantage ${number(response.advantage)}`, `update ${response.update + 1}`, `ended by ${response.finish_reason}`];
    if (response.dropped) more.push("dropped from the loss");
    return [this.title(response), ...more].join(" · ");
  },

  /** Colour all open responses alike, so that siblings can be compared. */
  colour() {
    const quantity = this.quantities.find((each) => each.key === element("quantity").value);
    const reach = Math.max(0, ...this.panes.map((pane) => creditData.reach(pane.opened, quantity)));
    this.panes.forEach((pane) => pane.colour(quantity, reach));
    this.legend(quantity, reach);
  },

  legend(quantity, reach) {
    const part = (text, background) => {
      const shown = document.createElement("i");
      shown.textContent = text;
      shown.style.background = background;
      return shown;
    };
    if (quantity.key === "state") {
      element("legend").replaceChildren(...creditData.states.slice(1).map((name, place) => part(name, creditPaint.state(place + 1))));
      return;
    }
    const low = part(number(quantity.neutral - reach), creditPaint.number(-1));
    const high = part(number(quantity.neutral + reach), creditPaint.number(1));
    const neutral = document.createElement("span");
    neutral.textContent = `no colour at ${number(quantity.neutral)}, full at`;
    element("legend").replaceChildren(neutral, low, high);
  },

  /** The values of a token, and the later tokens that its F comes from. */
  show(pane, token) {
    const { opened } = pane, state = creditData.stateNumber(opened.state[token]);
    const sources = creditData.sources(opened, token, MOST_SOURCES);
    this.panes.forEach((each) => each.mark(each === pane ? sources.map((source) => source.token) : []));
    const rows = this.quantities.filter((each) => each.key !== "state")
      .map((each) => [each.name, number(each.of(opened, token))]);
    const name = JSON.stringify(creditData.token(opened, token));
    rows.unshift([`token ${token + 1}`, name], ["state", creditData.states[state]]);
    element("token").replaceChildren(this.table(rows.slice(0, 7)), this.table(rows.slice(7)), this.sourceTable(opened, token, sources));
    element("token").hidden = false;
  },

  sourceTable(opened, token, sources) {
    const total = opened.values.future_kl ? opened.values.future_kl[token] : NaN;
    const rows = sources.slice(0, 6).map(({ token: later, term }) => {
      const share = total ? ` (${Math.round((100 * term) / total)} %)` : "";
      return [`+${later - token} ${JSON.stringify(creditData.token(opened, later))}`, `${number(term)}${share}`];
    });
    const title = sources.length ? ["F comes from", "γ^distance × Δ"] : ["F", "no later token moved"];
    return this.table(creditData.about.gamma === null ? [] : [title, ...rows]);
  },

  table(rows) {
    const list = document.createElement("dl");
    for (const [name, value] of rows) {
      const term = document.createElement("dt"), shown = document.createElement("dd");
      term.textContent = name;
      shown.textContent = value;
      list.append(term, shown);
    }
    return list;
  },
};
