// Charts of a page, drawn by Plotly in the page's colours, light or dark.
//
// A chart is {title, x, y, percent, log, kind, wide, lines}. x and y name the axes with their units; kind is "lines" (the
// default), "stack" (bars on each other) or "timeline" (bars of {base, x} in the lanes named by y). A line is
// {name, x, y}, and may have low and high (a shaded band), dash, symbol, and points: markers on long lines too.
"use strict";

const charts = (() => {
  const FEW_POINTS = 60;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const drawn = new Map(); // plot element -> chart

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const series = (index) => colour(`series-${(index % 9) + 1}`);
  const translucent = (hex) => `${hex}33`;

  function traces(chart) {
    return chart.lines.flatMap((line, index) => {
      const own = series(line.colour ?? index);
      const common = { name: line.name, x: line.x, y: line.y };
      if (chart.kind === "stack") return [{ ...common, type: "bar", marker: { color: own } }];
      if (chart.kind === "timeline") {
        const text = { customdata: line.text, hovertemplate: "%{customdata}<extra></extra>" };
        return [{ ...common, ...text, type: "bar", orientation: "h", base: line.base, width: 0.7, marker: { color: own } }];
      }
      const mode = line.points || line.x.length <= FEW_POINTS ? "lines+markers" : "lines";
      const size = line.points || line.x.length === 1 ? 8 : 5;
      const shape = { line: { color: own, width: 2, dash: line.dash ?? "solid" }, marker: { color: own, size, symbol: line.symbol ?? "circle" } };
      const main = { ...common, ...shape, type: "scatter", mode, connectgaps: Boolean(line.points) };
      return line.low ? [...band(line, own), main] : [main];
    });
  }

  function band(line, own) {
    const edge = { x: line.x, type: "scatter", mode: "lines", line: { width: 0 }, showlegend: false, legendgroup: line.name };
    return [
      { ...edge, y: line.low, name: `${line.name}: least`, line: { width: 0, color: own } },
      { ...edge, y: line.high, name: `${line.name}: greatest`, fill: "tonexty", fillcolor: translucent(own), line: { width: 0, color: own } },
    ];
  }

  function layout(chart) {
    const [text, quiet, grid, line, card] = ["text", "quiet", "grid", "line", "card"].map(colour);
    const timeline = chart.kind === "timeline";
    const axis = { gridcolor: grid, linecolor: line, zerolinecolor: line, tickfont: { size: 12, color: quiet }, automargin: true };
    const title = (words) => ({ text: words, font: { size: 12, color: quiet }, standoff: 8 });
    const nothing = chart.percent && chart.lines.every((line) => line.y.every((value) => !value));
    const several = chart.lines.length > 1;
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
      paper_bgcolor: card,
      plot_bgcolor: card,
      margin: { l: 8, r: 14, t: several ? 8 : 14, b: 8 },
      xaxis: { ...axis, title: title(chart.x ?? "step"), hoverformat: timeline ? undefined : "d", ...steps(chart) },
      yaxis: {
        ...axis,
        title: timeline ? undefined : title(chart.y),
        type: chart.log ? "log" : timeline ? "category" : "linear",
        autorange: timeline ? "reversed" : !nothing,
        range: nothing ? [0, 0.01] : undefined,
        rangemode: chart.percent ? "tozero" : "normal",
        tickformat: chart.percent ? ",.3~%" : undefined,
        hoverformat: chart.percent ? ",.2~%" : ".4~g",
        exponentformat: "power",
        nticks: timeline ? undefined : 6,
        fixedrange: timeline,
      },
      showlegend: several,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, traceorder: "normal" },
      barmode: timeline ? "overlay" : "stack",
      bargap: 0.15,
      hovermode: timeline ? "closest" : "x unified",
      hoverlabel: { bgcolor: card, bordercolor: line, font: { size: 13, color: text } },
      // A finger scrolls the page; a mouse drags a range to look at.
      dragmode: coarse.matches ? false : "zoom",
    };
  }

  // Whole steps only, also where a run has two of them.
  function steps(chart) {
    if (chart.kind === "timeline") return {};
    const all = chart.lines.flatMap((line) => line.x);
    const [first, last] = [Math.min(...all), Math.max(...all)];
    const few = last - first < 8 ? { dtick: 1 } : { nticks: 8 };
    return { ...few, tickformat: "d", range: first === last ? [first - 1, last + 1] : undefined };
  }

  // Draw each of `all` into a figure of its own in `grid`, or draw it anew there; the zoom of whoever looks at it stays.
  // Figures are made first: a plot takes the width that the grid then leaves it.
  function drawAll(grid, all) {
    const places = all.map((chart) => [...grid.children].find((child) => child.dataset.title === chart.title) ?? place(grid, chart));
    all.forEach((chart, index) => draw(places[index].querySelector(".plot"), chart));
  }

  function place(grid, chart) {
    const figure = document.createElement("figure");
    figure.className = chart.wide ? "chart wide" : "chart";
    figure.dataset.title = chart.title;
    const [caption, plot] = [document.createElement("figcaption"), document.createElement("div")];
    caption.textContent = chart.title;
    plot.className = "plot";
    figure.append(caption, plot);
    grid.append(figure);
    return figure;
  }

  function draw(plot, chart) {
    drawn.set(plot, chart);
    const look = { ...layout(chart), uirevision: "stays" };
    Plotly.react(plot, traces(chart), look, { responsive: true, displayModeBar: false });
  }

  dark.addEventListener("change", () => drawn.forEach((chart, plot) => draw(plot, chart)));
  return { drawAll };
})();
