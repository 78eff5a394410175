"use strict";
// Reads values off the curves: the step under the pointer, in every chart at once. Arrow keys do the same.
(() => {
  const TOP = 6;
  const write = {
    number(value) {
      const size = Math.abs(value);
      if (value === 0) return "0";
      if (size >= 1e-3 && size < 1e6) {
        const most = Math.max(3 - Math.floor(Math.log10(size)), 0);
        const least = size < 100 ? most : 0;
        return value.toLocaleString("en", { minimumFractionDigits: least, maximumFractionDigits: most });
      }
      return value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
    },
    count(value) {
      let power = 0;
      while (Math.abs(value) >= 999.5 && power < 4) { value /= 1000; power += 1; }
      const text = power ? value.toPrecision(3) : String(Math.round(value * 100) / 100);
      return text + ["", "k", "M", "B", "T"][power];
    },
    percent: (value) => `${(100 * value).toFixed(1)} %`,
    seconds: (value) => (value < 10 ? `${value.toFixed(value < 1 ? 3 : 2)} s` : `${value.toFixed(0)} s`),
  };

  const nearest = (steps, step) => {
    let low = 0;
    let high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };

  const charts = JSON.parse(document.getElementById("data").textContent).map((data) => {
    const figure = document.querySelector(`[data-chart="${data.key}"]`);
    const output = figure.querySelector("output");
    return {
      ...data,
      plot: figure.querySelector(".plot"),
      cursor: figure.querySelector(".cursor"),
      place: figure.querySelector(".place"),
      marks: [...figure.querySelectorAll(".mark")],
      wide: figure.classList.contains("wide"),
      height: figure.querySelector(".curves").height.baseVal.value,
      output,
      note: figure.querySelector("small"),
      words: figure.querySelector("small").textContent,
    };
  });
  if (!charts.length) return;

  const read = (chart, step) => chart.curves.map((curve, index) => {
    if (!curve.steps.length) return null;
    const at = step === null ? curve.steps.length - 1 : nearest(curve.steps, step);
    const place = chart.log ? Math.log10 : (value) => value;
    const [low, high, value] = [...chart.y, curve.values[at]].map(place);
    return {
      label: curve.label,
      css: chart.marks[index].classList.contains("held-out") ? "key held-out" : "key",
      value: write[chart.unit](curve.values[at]),
      x: `${100 * (curve.steps[at] - chart.x[0]) / (chart.x[1] - chart.x[0])}%`,
      y: TOP + chart.height * (1 - (value - low) / (high - low)),
    };
  });

  const show = (step) => {
    document.body.classList.toggle("reading", step !== null);
    for (const chart of charts) {
      const found = read(chart, step);
      const hidden = step === null ? "hidden" : "visible";
      chart.cursor.setAttribute("visibility", hidden);
      if (step !== null) {
        const percent = 100 * (step - chart.x[0]) / (chart.x[1] - chart.x[0]);
        chart.cursor.setAttribute("x1", `${percent}%`);
        chart.cursor.setAttribute("x2", `${percent}%`);
        chart.place.setAttribute("x", `${percent}%`);
        chart.place.setAttribute("text-anchor", percent < 15 ? "start" : percent > 85 ? "end" : "middle");
        chart.place.textContent = Math.round(step).toLocaleString("en");
      }
      found.forEach((point, index) => {
        const mark = chart.marks[index];
        mark.setAttribute("visibility", point ? hidden : "hidden");
        if (point) { mark.setAttribute("cx", point.x); mark.setAttribute("cy", point.y); }
      });
      const points = found.filter(Boolean);
      if (chart.wide && chart.curves.length > 1) {
        chart.output.replaceChildren(...points.map((point) => {
          const key = document.createElement("span");
          key.className = point.css;
          key.textContent = `${point.label} ${point.value}`;
          return key;
        }));
      } else if (points.length) {
        chart.output.textContent = points[0].value;
      }
      const held = chart.wide || step === null ? null : found[1];
      chart.note.textContent = held ? `held-out ${held.value}` : chart.words;
    }
  };

  let current = null;
  let waiting = false;
  const request = (step) => {
    current = step;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(current); });
  };
  for (const chart of charts) {
    const [first, last] = chart.x;
    const move = (event) => {
      const box = chart.plot.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      request(first + share * (last - first));
    };
    chart.plot.addEventListener("pointermove", move);
    chart.plot.addEventListener("pointerdown", move);
    chart.plot.addEventListener("pointerleave", () => request(null));
    chart.plot.addEventListener("blur", () => request(null));
    chart.plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 }[event.key];
      if (event.key === "Escape") request(null);
      if (!by) return;
      event.preventDefault();
      const from = current === null ? last : current;
      request(Math.min(Math.max(from + by * (last - first) / 100, first), last));
    });
  }
  show(null);
})();
