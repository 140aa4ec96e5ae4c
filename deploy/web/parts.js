// What several views are made of.

import { html, useEffect, useRef, useState } from "/web/vendor/htm-preact.module.js";

export const ACTIVE = ["validating_files", "queued", "running", "paused"];

const HIDDEN_SECONDS = 15; // between looks while nobody sees the page
const LONGEST_SECONDS = 30; // after looks that failed one after the other

// What `load` returns, asked for again and again; what was known stays while it cannot be had.
export function usePolled(load, seconds, inputs = []) {
  const [state, setState] = useState({ value: undefined, error: null });
  const again = useRef();
  useEffect(() => {
    let timer;
    let newest = 0;
    let wait = seconds;
    const run = async () => {
      const mine = ++newest;
      clearTimeout(timer);
      let found;
      try {
        found = { value: await load(), error: null };
        wait = seconds;
      } catch (error) {
        found = { error };
        wait = Math.min(2 * wait, LONGEST_SECONDS);
      }
      if (mine !== newest) return;
      setState((before) => ({ ...before, ...found }));
      timer = setTimeout(run, 1000 * (document.hidden ? HIDDEN_SECONDS : wait));
    };
    const seen = () => document.hidden || run();
    again.current = run;
    document.addEventListener("visibilitychange", seen);
    run();
    return () => {
      newest = -1;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, inputs);
  return { ...state, again: () => again.current() };
}

export const Status = ({ of }) => html`<span class="status ${of}"><i aria-hidden="true"></i>${of.replace("_", " ")}</span>`;

export const Tile = ({ label, value, unit }) => html`
  <div class="tile">
    <dt>${label}</dt>
    <dd>${value}${unit && html` <small>${unit}</small>`}</dd>
  </div>
`;

export const Bar = ({ label, part, whole }) => html`
  <progress aria-label=${label} value=${Math.min(part, whole)} max=${whole || 1}></progress>
`;

// Where a base and an adapter on it are asked side by side.
export const chatWith = (base, adapter) => `#/chat?models=${encodeURIComponent(`${base},${adapter}`)}`;

export const Problem = ({ error }) => error && html`<p class="problem" role="alert">${error.message}</p>`;

export const Empty = ({ children }) => html`<div class="empty">${children}</div>`;

const WIDTH = 96;
const HEIGHT = 28;

// The curve of a job's loss, without axes: what it says is beside it in words.
export function Spark({ points }) {
  if (points.length < 2) return html`<svg class="spark" aria-hidden="true"></svg>`;
  const [first, last] = [points[0][0], points[points.length - 1][0]];
  const most = Math.max(...points.map(([, value]) => value)) || 1;
  const line = points.map(([step, value]) => {
    const x = (WIDTH * (step - first)) / (last - first || 1);
    return `${x.toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 4) * (value / most)).toFixed(1)}`;
  });
  return html`
    <svg class="spark" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" aria-hidden="true">
      <polygon points="0,${HEIGHT} ${line.join(" ")} ${WIDTH},${HEIGHT}" />
      <polyline points=${line.join(" ")} />
    </svg>
  `;
}

// The figures of one kind that a job's history has: [step, value] by step, the newest of each.
export function figures(events, name) {
  const found = new Map();
  for (const { type, data } of events) {
    if (type === "metrics" && typeof data[name] === "number" && !found.has(data.step)) found.set(data.step, data[name]);
  }
  return [...found].sort(([one], [other]) => one - other);
}

// Asks before something that cannot be taken back.
export function Confirm({ question, yes, onYes, onClose }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  return html`
    <dialog ref=${dialog} onClose=${onClose} aria-label=${question}>
      <p>${question}</p>
      <div class="actions">
        <button type="button" onClick=${() => dialog.current.close()}>No</button>
        <button type="button" class="danger" onClick=${() => (dialog.current.close(), onYes())}>${yes}</button>
      </div>
    </dialog>
  `;
}

// Says what has happened, to eyes and ears: `tell` fills it.
let listener = () => {};
export const tell = (text) => listener(text);

export function Told() {
  const [text, setText] = useState("");
  useEffect(() => {
    let timer;
    listener = (said) => {
      clearTimeout(timer);
      setText(said);
      timer = setTimeout(() => setText(""), 6000);
    };
  }, []);
  return html`<div class="told" role="status" aria-live="polite">${text && html`<span>${text}</span>`}</div>`;
}
