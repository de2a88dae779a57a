"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const tip = document.getElementById("tip");
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
// Named one by one: Plotly's own choice has a button that sends the data to its server.
const buttons = [...(touch ? [] : ["toImage", "zoom2d", "pan2d"]), "zoomIn2d", "zoomOut2d", "resetScale2d"];

function template() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, panel] = ["--ink", "--line", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, title: { standoff: 6 } };
  return { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 }, xaxis: axis, yaxis: axis,
    hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink } }, modebar: { bgcolor: panel, color: ink },
    margin: { l: 8, r: 10, t: touch ? 34 : 12, b: 8 }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { size: 11 } }, showlegend: false,
    dragmode: touch ? false : "zoom",  // a finger scrolls the page
    hovermode: "x", hoverdistance: -1,  // the nearest step of every run
  } };
}

function draw() {
  for (const { id, data, layout } of figures) {
    Plotly.react(id, data, { ...layout, template: template() },
      { responsive: true, displaylogo: false, modeBarButtons: [buttons] });
  }
}

function showImage(sheet, event) {
  const [position, words] = event.points[0].customdata;
  tip.firstElementChild.className = "thumb pixels sheet" + sheet.number;
  tip.firstElementChild.style.cssText = place(sheet, position);
  tip.lastElementChild.textContent = words;
  tip.style.display = "block";
  const at = event.event.changedTouches?.[0] ?? event.event;
  tip.style.left = Math.max(4, Math.min(at.clientX + 14, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, Math.min(at.clientY + 14, innerHeight - tip.offsetHeight - 4)) + "px";
}

function hideImage() { tip.style.display = "none"; }

function place({ columns, rows }, position) {
  const x = 100 * (position % columns) / Math.max(columns - 1, 1);
  const y = 100 * Math.floor(position / columns) / Math.max(rows - 1, 1);
  return "background-position:" + x + "% " + y + "%";
}

draw();
if (touch) for (const name of ["scroll", "touchstart"]) addEventListener(name, hideImage, { passive: true });
dark.addEventListener("change", draw);
for (const { id, sheet } of figures.filter((figure) => figure.sheet)) {
  const plot = document.getElementById(id);
  for (const name of ["plotly_hover", "plotly_click"]) plot.on(name, (event) => showImage(sheet, event));  // a tap clicks
  if (!touch) plot.on("plotly_unhover", hideImage);
}
document.body.dataset.drawn = figures.length;
