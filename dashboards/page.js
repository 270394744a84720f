"use strict";

const drawnFigures = () => [...document.querySelectorAll(".js-plotly-plot")];

// Paper is not as wide as the window, and a figure does not notice by itself.
addEventListener("beforeprint", () => {
  for (const figure of drawnFigures()) {
    const small = figure.closest(".small-multiples") !== null;
    Plotly.relayout(figure, { width: small ? 320 : 680 });
  }
});
addEventListener("afterprint", () => {
  for (const figure of drawnFigures()) Plotly.relayout(figure, { width: null, autosize: true });
});

// A finger that moves over a figure scrolls the page; only a mouse can choose a part to enlarge.
if (matchMedia("(pointer: coarse)").matches) {
  for (const figure of drawnFigures()) Plotly.relayout(figure, { dragmode: false });
}
