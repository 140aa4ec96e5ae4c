// A job's losses by step, drawn by uPlot.

import { html, useEffect, useRef, useState } from "/web/vendor/htm-preact.module.js";
import { loss } from "/web/formats.js";

const HEIGHT = 280;
const DARK = matchMedia("(prefers-color-scheme: dark)");

function options(width, steps, logarithmic) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const axis = { stroke: color("--muted"), font, grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
  const value = (_, number) => loss(number);
  return {
    width,
    height: HEIGHT,
    padding: [12, 12, 0, 0],
    scales: {
      x: { time: false, range: [0, steps] },
      y: logarithmic ? { distr: 3 } : { range: (_, least, most) => [Math.min(0, least), most * 1.05 || 1] },
    },
    axes: [{ ...axis, grid: { show: false } }, { ...axis, size: 48 }],
    cursor: { y: false, points: { size: 7 } },
    series: [
      { label: "Step" },
      { label: "Training loss", stroke: color("--accent"), fill: color("--accent-soft"), width: 2, points: { show: false }, value },
      { label: "Validation loss", stroke: color("--warm"), width: 2, spanGaps: true, points: { size: 6 }, value },
    ],
  };
}

// One column of steps for both: uPlot takes null where there is no figure.
function columns(train, valid) {
  const [trained, validated] = [new Map(train), new Map(valid)];
  const steps = [...new Set([...trained.keys(), ...validated.keys()])].sort((one, other) => one - other);
  return [steps, steps.map((step) => trained.get(step) ?? null), steps.map((step) => validated.get(step) ?? null)];
}

export function Curve({ train, valid, steps }) {
  const place = useRef();
  const plot = useRef();
  const [logarithmic, setLogarithmic] = useState(false);
  const data = columns(train, valid);
  const newest = useRef();
  newest.current = data;
  useEffect(() => {
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(options(place.current.clientWidth, steps, logarithmic), newest.current, place.current);
    };
    const resized = new ResizeObserver(([{ contentRect }]) => plot.current.setSize({ width: contentRect.width, height: HEIGHT }));
    draw();
    resized.observe(place.current);
    DARK.addEventListener("change", draw);
    return () => {
      resized.disconnect();
      DARK.removeEventListener("change", draw);
      plot.current.destroy();
      plot.current = undefined;
    };
  }, [logarithmic]);
  useEffect(() => plot.current?.setData(data), [data[0].length, train[train.length - 1]?.[1]]);
  const last = train[train.length - 1];
  const said = last ? `Training loss from ${loss(train[0][1])} at step ${train[0][0]} to ${loss(last[1])} at step ${last[0]}` : "No loss yet";
  return html`
    <figure class="curve">
      <div ref=${place} role="img" aria-label=${said}></div>
      <label class="check"><input type="checkbox" checked=${logarithmic} onChange=${() => setLogarithmic(!logarithmic)} /> Logarithmic</label>
    </figure>
  `;
}
