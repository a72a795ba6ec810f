// Hover values of the line charts: the step under the pointer, every series' value there.
"use strict";
for (const figure of document.querySelectorAll(".chart")) {
  const { x: [low, high, left, right], series } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const width = svg.viewBox.baseVal.width;
  const steps = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = low + ((event.clientX - box.left) / box.width * width - left) / (right - left) * (high - low);
    const step = steps.reduce((best, one) => (Math.abs(one - at) < Math.abs(best - at) ? one : best), steps[0]);
    const place = left + (high > low ? (step - low) / (high - low) : 0) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `step ${step}`;
    tip.append(head);
    for (const one of series) {
      const point = one.points.find((candidate) => candidate[0] === step);
      if (!point) continue;
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = `key bg-${one.color}`;
      row.append(key, ` ${one.title} ${Number(point[1].toPrecision(4))}`);
      tip.append(row);
    }
    tip.hidden = false;
    const x = place / width * box.width;
    tip.style.top = `${svg.offsetTop + 4}px`;
    tip.style.left = x > box.width / 2 ? `${x - tip.offsetWidth - 10}px` : `${x + 10}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
