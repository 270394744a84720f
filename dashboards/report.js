
// One trial is picked, by a click on a point, in the list, or by the address (#trial-7): its layers are shown.
const runData = document.getElementById("run");
if (runData) {
  const run = JSON.parse(runData.textContent);
  const list = document.getElementById("pick");
  const front = document.getElementById("figure-front");
  const network = document.getElementById("figure-network");
  const cost = document.getElementById("figure-cost");
  const rows = [...document.querySelectorAll("#layers tbody tr")];
  const FLOAT_LEVEL = 9; // bits as which a float tensor is drawn
  const colours = Object.fromEntries(
    ["uniform", "shift", "apot", "float"].map((name) => {
      const chip = Object.assign(document.createElement("span"), { className: `chip ${name}`, hidden: true });
      document.body.append(chip);
      const colour = getComputedStyle(chip).backgroundColor;
      chip.remove();
      return [name, colour];
    }),
  );

  const layersOf = (trial) =>
    run.prices.map((prices, index) => {
      const [weight, input] = [trial.w[index], trial.a[index]];
      return { weight: run.precisions[weight], input: run.precisions[input], cost: prices[weight + input] };
    });

  function showRow(row, layer) {
    [layer.weight, layer.input].forEach((precision, side) => {
      const chip = Object.assign(document.createElement("span"), { className: `chip ${precision.quantizer}` });
      row.cells[4 + side].replaceChildren(chip, precision.text);
    });
    row.cells[6].textContent = layer.cost.toFixed(2);
  }

  function showNetwork(layers) {
    const sides = [layers.map((layer) => layer.weight), layers.map((layer) => layer.input)];
    const about = network.data.slice(0, 2).map((trace) => trace.customdata.map(([text]) => text));
    Plotly.restyle(
      network,
      {
        y: sides.map((side, index) => side.map((p) => (index ? -1 : 1) * Math.min(p.bits, FLOAT_LEVEL))),
        text: sides.map((side) => side.map((p) => p.mark)),
        "marker.color": sides.map((side) => side.map((p) => colours[p.quantizer])),
        customdata: sides.map((side, index) => side.map((p, i) => [about[index][i], p.text])),
      },
      [0, 1],
    );
  }

  // As many names as fit below the strip: those of thin bars are left out where they would be over each other.
  const names = network.layout.xaxis.tickvals.map((at, index) => [at, network.layout.xaxis.ticktext[index]]);
  function nameLayers() {
    const room = 15 / Math.max(1, network.clientWidth - 60);
    let last = -1;
    const kept = names.filter(([at]) => at - last >= room && ((last = at), true));
    Plotly.relayout(network, { "xaxis.tickvals": kept.map(([at]) => at), "xaxis.ticktext": kept.map(([, name]) => name) });
  }

  function showCost(layers, number) {
    const length = cost.layout.meta.run; // neighbours that share a bar
    const sums = [];
    layers.forEach((layer, index) => {
      const bar = Math.floor(index / length);
      sums[bar] = (sums[bar] ?? 0) + layer.cost;
    });
    const total = sums.reduce((sum, value) => sum + value, 0);
    Plotly.restyle(cost, { x: [sums], name: `trial ${number}: ${total.toFixed(1)} %` }, [1]);
  }

  function pick(number) {
    const trial = run.trials[number];
    if (!trial) return;
    const layers = layersOf(trial);
    if (![...list.options].some((option) => option.value === String(number))) {
      list.append(new Option(trial.title, number));
    }
    list.value = String(number);
    document.getElementById("layers-title").textContent = trial.title;
    rows.forEach((row, index) => showRow(row, layers[index]));
    showNetwork(layers);
    showCost(layers, number);
    const last = front.data.length - 1;
    Plotly.restyle(front, { x: [[trial.cost]], y: [[trial.score]] }, [last]);
  }

  function choose(number) {
    history.replaceState(null, "", `#trial-${number}`);
    pick(number);
  }

  Plotly.addTraces(front, {
    x: [null],
    y: [null],
    name: "picked",
    mode: "markers",
    marker: { symbol: "circle-open", size: 26, color: "#E69F00", line: { width: 3 } },
    hoverinfo: "skip",
  });
  front.on("plotly_click", (event) => {
    const point = event.points.find((candidate) => candidate.customdata);
    if (point) choose(point.customdata[0]);
  });
  list.addEventListener("change", () => choose(list.value));
  addEventListener("resize", nameLayers);
  nameLayers();
  const asked = /^#trial-(\d+)$/.exec(location.hash);
  pick(asked && run.trials[asked[1]] ? asked[1] : run.picked);
}
