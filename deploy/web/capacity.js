// What computes where, who shares it, and what waits.

import { html } from "/web/vendor/htm-preact.module.js";
import { get, history } from "/web/api.js";
import { ago, bytes, count, plural } from "/web/formats.js";
import { Bar, Empty, Problem, Tile, usePolled } from "/web/parts.js";

// Waiting jobs whose reasons are asked for: each is a request, of which a key has so many a minute.
const TOLD = 10;

async function load() {
  const capacity = await get("/v1/capacity");
  if (!capacity.own_jobs.waiting) return { capacity, waiting: [] };
  const jobs = (await get("/v1/fine_tuning/jobs?limit=100")).data.filter((job) => job.status === "queued").slice(0, TOLD);
  const histories = await Promise.all(jobs.map((job) => history(job.id)));
  return { capacity, waiting: jobs.map((job, index) => ({ job, why: histories[index].find((event) => event.kind === "waits") })) };
}

// Replicas and sessions by the device that they are on.
function places({ bases, sessions }) {
  const found = new Map();
  const at = (place) => found.get(place) ?? found.set(place, { replicas: [], sessions: [] }).get(place);
  for (const base of bases) for (const replica of base.replicas ?? []) at(replica.place).replicas.push({ base: base.id, ...replica });
  for (const session of sessions) {
    for (const place of new Set(session.places.length ? session.places : ["Starting"])) at(place).sessions.push(session);
  }
  return [...found].sort(([one], [other]) => one.localeCompare(other));
}

export function Capacity() {
  const { value, error } = usePolled(load, 5);
  const capacity = value?.capacity;
  return html`
    <section class="capacity" aria-labelledby="capacity">
      <h1 id="capacity" tabindex="-1">Capacity</h1>
      <${Problem} error=${error} />
      ${capacity && html`
        <h2>Bases</h2>
        <div class="cards">${capacity.bases.map((base) => html`<${Base} key=${base.id} base=${base} />`)}</div>
        <h2>Who shares what</h2>
        ${!places(capacity).length && html`<${Empty}><p>Nothing is loaded.</p><//>`}
        <div class="cards">${places(capacity).map(([place, on]) => html`<${Place} key=${place} place=${place} on=${on} />`)}</div>
        <h2>Queue</h2>
        <${Queue} jobs=${capacity.jobs} waiting=${value.waiting} />
      `}
    </section>
  `;
}

const Base = ({ base }) => html`
  <section class="card" aria-label=${base.id}>
    <header><h3>${base.id}</h3><span class="muted">${base.resident ? "loaded" : base.replicas ? "not loaded" : "does not answer now"}</span></header>
    <dl class="tiles small">
      <${Tile} label="Training" value=${count(base.jobs.running)} unit="jobs" />
      <${Tile} label="Waiting" value=${count(base.jobs.waiting)} unit="jobs" />
      <${Tile} label="Trained" value=${count(base.tokens_per_second.training)} unit="tokens/s" />
      <${Tile} label="Answered" value=${count(base.tokens_per_second.serving)} unit="tokens/s" />
    </dl>
  </section>
`;

const Place = ({ place, on }) => html`
  <section class="card" aria-label=${place}>
    <header><h3>${place}</h3></header>
    ${on.replicas.map((replica) => html`
      <div class="holder">
        <h4>Serves ${replica.base} <span class="muted">${replica.precision}, ${bytes(replica.base_bytes)}</span></h4>
        <${Measure} label="Requests" part=${replica.running} whole=${replica.slots} said="${replica.running} of ${replica.slots}${replica.waiting ? `, ${replica.waiting} wait` : ""}" />
        <${Measure} label="Adapter memory" part=${replica.adapter_bytes} whole=${replica.adapter_capacity} said="${plural(replica.adapters, "adapter")}, room for ${count(replica.free_adapter_slots)} more of rank 16" />
      </div>
    `)}
    ${on.sessions.map((session) => html`
      <div class="holder">
        <h4>Trains ${session.base ?? "another tenant's base"} <span class="muted">${session.precision}, ${plural(session.num_workers, "worker")}, ${session.state}</span></h4>
        <${Measure} label="Jobs" part=${session.jobs.length + session.other_jobs} whole=${session.jobs.length + session.other_jobs + session.free_slots} said="${plural(session.jobs.length + session.other_jobs, "job")}, ${count(session.tokens_per_second)} tokens/s" />
        <p class="tags">
          ${session.jobs.map((job) => html`<a class="tag" key=${job.id} href="#/jobs/${job.id}">${job.model}</a> `)}
          ${session.other_jobs > 0 && html`<span class="muted">and ${session.other_jobs} of other tenants</span>`}
        </p>
      </div>
    `)}
  </section>
`;

const Measure = ({ label, part, whole, said }) => html`
  <div class="measure"><span>${label}</span><span class="muted">${said}</span><${Bar} label=${label} part=${part} whole=${whole} /></div>
`;

const Queue = ({ jobs, waiting }) => html`
  <p class="muted">${plural(jobs.running, "job")} in training, ${count(jobs.waiting)} waiting, ${count(jobs.paused)} paused, of all tenants.</p>
  <ul class="queue">
    ${waiting.map(({ job, why }) => html`
      <li key=${job.id}><a class="card row" href="#/jobs/${job.id}">
        <span class="name">${job.suffix}</span><span class="muted">${ago(job.created_at)}</span>
        <span class="muted">${why?.message ?? "waits for its turn"}</span>
      </a></li>
    `)}
  </ul>
`;
