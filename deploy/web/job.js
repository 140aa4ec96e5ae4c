// One job: its losses as they come, what has happened to it, and what it was made with.

import { html, useState } from "/web/vendor/htm-preact.module.js";
import { get, history, jobPath, post } from "/web/api.js";
import { Curve } from "/web/curve.js";
import { clock, count, day, duration, loss, percent } from "/web/formats.js";
import { ACTIVE, Bar, Confirm, Problem, Status, Tile, chatWith, figures, tell, usePolled } from "/web/parts.js";

async function load(id) {
  const [job, events] = await Promise.all([get(jobPath(id)), history(id)]);
  return { job, events };
}

export function Job({ id, onChange }) {
  const { value, error, again } = usePolled(() => load(id), 1.5);
  const [refused, setRefused] = useState(null);
  if (!value) return html`<section class="detail"><${Problem} error=${error} /></section>`;
  const { job, events } = value;
  const act = async (verb, said) => {
    setRefused(null);
    try {
      await post(`${jobPath(id)}/${verb}`);
      tell(`${job.suffix}: ${said}`);
    } catch (problem) {
      setRefused(problem);
    }
    again();
    onChange();
  };
  const train = figures(events, "train_loss");
  const valid = figures(events, "valid_loss");
  return html`
    <section class="detail" aria-labelledby="job">
      <a class="back" href="#/jobs">All jobs</a>
      <header>
        <div>
          <h2 id="job">${job.suffix} <${Status} of=${job.status} /></h2>
          <p class="muted"><code>${job.id}</code> on ${job.model}</p>
        </div>
        <${Actions} job=${job} act=${act} />
      </header>
      <${Problem} error=${refused ?? error} />
      ${job.error && html`<p class="problem">${job.error.message}</p>`}
      ${job.status === "queued" && html`<${Reason} events=${events} />`}
      ${job.steps && html`<${Bar} label="Progress" part=${job.step} whole=${job.steps} />`}
      <${Figures} job=${job} valid=${valid} />
      ${train.length > 1 && html`<${Curve} train=${train} valid=${valid} steps=${job.steps} />`}
      <${Checkpoints} base=${job.model.split(":")[0]} events=${events} />
      <div class="halves">
        <${Events} events=${events} />
        <${Configuration} job=${job} />
      </div>
      <${Log} id=${id} />
    </section>
  `;
}

function Actions({ job, act }) {
  const [asking, setAsking] = useState(false);
  const running = job.status === "running";
  return html`
    <div class="actions">
      ${job.fine_tuned_model && html`<a class="button primary" href=${chatWith(job.fine_tuned_model.split(":")[0], job.fine_tuned_model)}>Chat with it</a>`}
      ${["queued", "running"].includes(job.status) && !job.requested && html`<button type="button" onClick=${() => act("pause", running ? "pauses after its step" : "paused")}>Pause</button>`}
      ${(job.status === "paused" || job.requested === "pause") && html`<button type="button" onClick=${() => act("resume", "goes on")}>Resume</button>`}
      ${job.requested && html`<span class="muted">asked to ${job.requested}</span>`}
      ${ACTIVE.includes(job.status) && job.requested !== "cancel" && html`<button type="button" class="danger" onClick=${() => setAsking(true)}>Cancel</button>`}
      ${asking && html`<${Confirm} question="Cancel ${job.suffix}? What it has learned is lost." yes="Cancel it" onYes=${() => act("cancel", running ? "is cancelled after its step" : "cancelled")} onClose=${() => setAsking(false)} />`}
    </div>
  `;
}

// Why a job waits is in its history.
function Reason({ events }) {
  const waits = events.find((event) => event.kind === "waits");
  return waits && html`<p class="notice">${waits.message}</p>`;
}

function Figures({ job, valid }) {
  const left = job.estimated_finish && job.estimated_finish - Date.now() / 1000;
  const took = job.finished_at && job.finished_at - job.created_at;
  return html`
    <dl class="tiles small">
      <${Tile} label="Step" value=${count(job.step)} unit=${job.steps ? `of ${count(job.steps)}` : ""} />
      <${Tile} label="Training loss" value=${loss(job.loss)} />
      <${Tile} label="Validation loss" value=${loss(valid[valid.length - 1]?.[1])} />
      <${Tile} label="Tokens/s" value=${count(job.tokens_per_second)} />
      <${Tile} label=${took ? "Took" : "Left"} value=${took ? duration(took) : left ? duration(left) : "–"} />
    </dl>
  `;
}

// What the adapter was after some epochs: models, of which the newest stands first.
function Checkpoints({ base, events }) {
  const kept = events.filter((event) => event.kind === "checkpoint");
  if (!kept.length) return null;
  return html`
    <section class="card aliases" aria-labelledby="checkpoints">
      <h3 id="checkpoints">Checkpoints</h3>
      ${kept.map(({ id, data }) => html`
        <a class="tag" key=${id} href=${chatWith(base, data.model)} aria-label="Chat with step ${data.metrics.step}">step ${count(data.metrics.step)} · ${loss(data.metrics.validation_loss ?? data.metrics.loss)}</a>
      `)}
    </section>
  `;
}

function Events({ events }) {
  const [all, setAll] = useState(false);
  const shown = all ? events : events.filter((event) => event.type !== "metrics");
  return html`
    <section class="card" aria-labelledby="events">
      <header>
        <h3 id="events">Events</h3>
        <label class="check"><input type="checkbox" checked=${all} onChange=${() => setAll(!all)} /> Every step</label>
      </header>
      <ol class="events" tabindex="0" aria-labelledby="events">
        ${shown.map((event) => html`<li key=${event.id} class=${event.level}><time>${clock(event.created_at)}</time><span>${event.message}</span></li>`)}
      </ol>
    </section>
  `;
}

// The log is read while somebody looks at it.
function Log({ id }) {
  const [open, setOpen] = useState(false);
  return html`
    <details class="card" onToggle=${(event) => setOpen(event.target.open)}>
      <summary>Log</summary>
      ${open && html`<${Lines} id=${id} />`}
    </details>
  `;
}

function Lines({ id }) {
  const { value, error } = usePolled(() => get(`${jobPath(id)}/logs`), 3);
  const lines = value?.data.map(({ created_at, level, message }) => `${clock(created_at)} ${level} ${message}`);
  return html`<${Problem} error=${error} />${lines && html`<pre tabindex="0" aria-label="Log">${lines.join("\n")}</pre>`}`;
}

function Configuration({ job }) {
  const { lora, train } = job;
  const targets = Array.isArray(lora.target_modules) ? lora.target_modules.join(", ") : lora.target_modules;
  const rows = {
    Created: day(job.created_at),
    Rows: job.training_file,
    Validation: typeof job.validation_file === "number" ? percent(job.validation_file) : job.validation_file,
    Rank: `${lora.r}, alpha ${lora.lora_alpha}`,
    Modules: targets,
    Method: job.method.type,
    Epochs: train.epochs,
    "Batch size": train.batch_size,
    "Learning rate": `${train.learning_rate}, ${train.lr_scheduler}`,
    "Longest row": `${count(train.max_seq_len)} tokens`,
    Precision: job.precision,
    Workers: job.num_workers,
    Seed: job.seed,
    "Time limit": job.time_limit && duration(job.time_limit),
    After: job.depends_on.join(", ") || null,
    ...job.metadata,
  };
  return html`
    <section class="card" aria-labelledby="configuration">
      <header><h3 id="configuration">Configuration</h3></header>
      <dl class="table">
        ${Object.entries(rows).filter(([, value]) => value ?? false).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${String(value)}</dd></div>`)}
      </dl>
      <details><summary>All options</summary><pre tabindex="0">${JSON.stringify({ lora, train }, null, 2)}</pre></details>
    </section>
  `;
}
