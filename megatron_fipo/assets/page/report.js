// report.html of a run: its state, its numbers as charts, and the newest numbers while it trains.
//
// `page` has the panels and phases of panels.py. report-data.js calls `report.show` with the numbers that report.py took
// from the run's files.
"use strict";

const report = (() => {
  const POLL_MS = 3000;
  const LONGEST_SILENCE_S = 180;
  let shown = null;
  let missing = false;

  const by = (id) => document.getElementById(id);
  const last = (values) => (values ?? []).findLast((value) => value !== null);
  const first = (values) => (values ?? []).find((value) => value !== null);

  function element(kind, text, attributes = {}) {
    const made = Object.assign(document.createElement(kind), attributes);
    made.append(text);
    return made;
  }

  function duration(seconds) {
    const whole = Math.round(seconds);
    if (whole < 60) return seconds < 10 ? `${seconds.toFixed(1)} s` : `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
    return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  }

  function show(next) {
    if (shown && shown.written === next.written) return;
    shown = next;
    showState();
    showTiles(next);
    const charts_ = [...page.panels.map((panel) => chart(panel, next)).filter(Boolean), ...timeline(next)];
    charts.drawAll(by("charts"), charts_);
    showHeldOut(next);
    showSamples(next.samples);
    showExcerpts(next.excerpts);
  }

  // ---- State

  function showState() {
    const { state, written, training, total_steps: total } = shown;
    const done = training.step.at(-1) ?? 0;
    const silent = Date.now() / 1000 - written;
    const words = {
      running: done ? `In progress: ${done} of ${total} steps done.` : "In progress: no step is done yet.",
      finished: `Finished: ${done} steps in ${state.words}.`,
      stopped: `Stopped after step ${done} of ${total}, by request or by a signal. To resume it from its newest checkpoint, start it again with the same run.directory.`,
      failed: `Failed after step ${done} of ${total}: ${state.words}`,
    };
    by("state").textContent = words[state.kind];
    by("state").className = state.kind;
    const usual = Math.max(LONGEST_SILENCE_S, 5 * median(training.seconds_step ?? []));
    let note = "";
    if (state.kind === "running" && missing) {
      note = `${page.data_file} was not found beside this page, which shows the run as of ${time(written)}. Copy that file too, or open the page again when the run has ended: it then contains everything.`;
    } else if (state.kind === "running" && silent > usual) {
      note = `Nothing new for ${duration(silent)}: a long step, or the run was killed.`;
    }
    if (shown.steps_per_point > 1) note = `Each point of a curve is the mean of ${shown.steps_per_point} steps. ${note}`;
    by("note").textContent = note;
    by("note").hidden = !note;
  }

  function time(seconds) {
    return new Date(seconds * 1000).toLocaleString();
  }

  function median(values) {
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
  }

  // ---- The most important numbers

  function showTiles({ training, held_out: heldOut, state, total_steps: total, k }) {
    const done = training.step.at(-1) ?? 0;
    const tiles = [[`${done} of ${total}`, "steps"]];
    const change = (values, text) => (values.length > 1 ? `${text(first(values))} → ${text(last(values))}` : text(first(values)));
    const add = (rows, key, words, text) => {
      const values = (rows[key] ?? []).filter((value) => value !== null);
      if (values.length) tiles.push([change(values, text), words]);
    };
    add(heldOut, "accuracy", `held-out accuracy, avg@${k}`, (value) => value.toFixed(3));
    add(training, "reward_mean", "mean reward", (value) => value.toFixed(2).replace("-", "−"));
    add(training, "response_length_mean", "tokens per response", (value) => value.toFixed(value < 1000 ? 1 : 0));
    const step = median(training.seconds_step ?? []);
    if (step) tiles.push([duration(step), "per step (median)"]);
    if (step && state.kind === "running" && done < total) tiles.push([`≈ ${duration(step * (total - done))}`, "left, without validations"]);
    by("tiles").replaceChildren(...tiles.map(([value, words]) => {
      const tile = element("div", element("b", value), { className: "tile" });
      tile.append(element("span", words));
      return tile;
    }));
  }

  // ---- Charts

  function chart(panel, data) {
    const lines = panel.lines.flatMap((curve, index) => {
      const rows = curve.held_out ? data.held_out : data.training;
      return rows[curve.key] ? [{ ...line(curve, rows, data.k), colour: index }] : [];
    });
    // With one sample per problem the three accuracies are one.
    const apart = data.k === 1 ? lines.filter((_, index) => !panel.lines[index].key.match(/^(cons_at|pass_at)_k$/)) : lines;
    return lines.length ? { ...panel, x: "step", lines: apart } : null;
  }

  function line(curve, rows, k) {
    const spread = rows[curve.spread];
    const away = (sign) => rows[curve.key].map((value, index) => (value === null || spread[index] === null ? null : value + sign * spread[index]));
    return {
      name: curve.name.replace("{k}", k),
      x: rows.step,
      y: rows[curve.key],
      low: spread ? away(-1) : rows[curve.low],
      high: spread ? away(1) : rows[curve.high],
      points: curve.held_out,
      dash: curve.dash,
      symbol: curve.symbol,
    };
  }

  // The latest phases as bars over the time since the run, or its last resume, began.
  function timeline({ spans: latest }) {
    if (!latest.length) return [];
    const start = Math.min(...latest.map(([, at]) => at));
    const total = Math.max(...latest.map(([, at, seconds]) => at + seconds)) - start;
    const [unit, size] = total > 10800 ? ["hours", 3600] : total > 300 ? ["minutes", 60] : ["seconds", 1];
    const lanes = page.phases.filter((phase) => latest.some(([name]) => name === phase));
    const lines = lanes.map((phase) => {
      const own = latest.filter(([name]) => name === phase);
      return {
        name: phase,
        colour: page.phases.indexOf(phase) + 8, // of nine: those of the seconds by phase, which have no start
        y: own.map(() => phase),
        base: own.map(([, at]) => (at - start) / size),
        x: own.map(([, , seconds]) => seconds / size),
        text: own.map(([, at, seconds]) => `${phase}: ${duration(seconds)}, from ${duration(at - start)} on`),
      };
    });
    const whole = latest[0][0] === "start";
    const since = whole ? "the last start" : "the first phase shown";
    return [{ title: "Timeline of the latest phases", kind: "timeline", wide: true, x: `${unit} since ${since}`, y: "", lines }];
  }

  // ---- Tables and links

  function showHeldOut({ held_out: heldOut, sources, k, samples }) {
    const head = ["after step", `avg@${k}`, `cons@${k}`, `pass@${k}`, "tokens", "seconds"];
    const digits = (value, places) => (value === null || value === undefined ? "–" : value.toFixed(places));
    const row = (name, values, index, where) => [
      name, ...["accuracy", "cons_at_k", "pass_at_k"].map((key) => digits(values[key]?.[index], 3)),
      digits(values.response_length_mean?.[index], 1), where,
    ];
    const rows = heldOut.step.flatMap((step, index) => {
      const name = `validation-${String(step).padStart(6, "0")}.txt`;
      const label = samples.validation.includes(name) ? link(`samples/${name}`, `${step}`) : `${step}`;
      const each = Object.entries(sources);
      return [
        row(label, heldOut, index, digits(heldOut.seconds_validate?.[index], 1)),
        ...(each.length > 1 ? each.map(([source, values]) => row(source, values, index, "")) : []),
      ];
    });
    const line = (cells, kind) => {
      const made = document.createElement("tr");
      made.append(...cells.map((cell) => element(kind, cell)));
      return made;
    };
    by("held-out").replaceChildren(...(rows.length ? [line(head, "th"), ...rows.toReversed().map((cells) => line(cells, "td"))] : []));
    by("held-out").closest("section").hidden = !rows.length;
  }

  function link(address, text) {
    return element("a", text, { href: address });
  }

  function showSamples(samples) {
    const list = (words, names, prefix) => {
      const made = element("p", `${words}: `);
      const latest = names.slice(-12);
      for (const name of latest) made.append(link(`samples/${name}`, `${parseInt(name.slice(prefix.length), 10)}`), " ");
      made.append(link("samples/", "all"));
      return made;
    };
    const lists = [];
    if (samples.step.length) lists.push(list("of the latest steps", samples.step, "step-"));
    if (samples.validation.length) lists.push(list("of held-out problems, after step", samples.validation, "validation-"));
    by("samples").replaceChildren(...lists);
    by("samples").closest("section").hidden = !lists.length;
  }

  // Two responses each from early, in the middle and late. Those that someone has opened stay open.
  function showExcerpts(all) {
    const open = new Set([...by("excerpts").querySelectorAll("details[open]")].map((one) => one.dataset.key));
    by("excerpts").replaceChildren(...all.map(({ step, length, accuracy, text }, index) => {
      const made = document.createElement("details");
      made.dataset.key = `${step}/${index % 2}`;
      made.open = open.has(made.dataset.key);
      const verdict = accuracy === null ? "not judged" : accuracy >= 0.5 ? "right" : "wrong";
      made.append(element("summary", `step ${step}: ${length} tokens, ${verdict}`), element("pre", text));
      return made;
    }));
  }

  // ---- The newest numbers

  // By a <script>: a page that is a file may load one from beside it, and may fetch nothing.
  function follow() {
    if (shown.state.kind !== "running") return;
    if (document.hidden) return void setTimeout(follow, POLL_MS);
    const script = document.createElement("script");
    const ended = (failed) => {
      script.remove();
      missing = failed;
      showState();
      setTimeout(follow, POLL_MS);
    };
    script.onload = () => ended(false);
    script.onerror = () => ended(true);
    script.src = `${page.data_file}?${Date.now()}`;
    document.head.append(script);
  }

  return { show, follow };
})();
