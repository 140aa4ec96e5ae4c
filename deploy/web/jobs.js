// All jobs: how far each is and what it has come to; beside them the one that is chosen.

import { html, useRef, useState } from "/web/vendor/htm-preact.module.js";
import { get, history, knownHistory } from "/web/api.js";
import { ago, count, loss } from "/web/formats.js";
import { Job } from "/web/job.js";
import { Bar, Empty, Problem, Spark, Status, Tile, figures, usePolled } from "/web/parts.js";

const PAGE = 20;

// The newest jobs, with the history of those that train, and of the others once.
async function load(pages) {
  const jobs = [];
  let more = true;
  for (let page = 0; page < pages && more; page += 1) {
    const after = jobs.length ? `&after=${jobs[jobs.length - 1].id}` : "";
    const found = await get(`/v1/fine_tuning/jobs?limit=${PAGE}${after}`);
    jobs.push(...found.data);
    more = found.has_more;
  }
  const unknown = (job) => job.status === "running" || (job.steps && !knownHistory(job.id).length);
  await Promise.all(jobs.filter(unknown).map((job) => history(job.id)));
  return { jobs, more };
}

export function Jobs({ chosen }) {
  const [pages, setPages] = useState(1);
  const { value, error, again } = usePolled(() => load(pages), 2, [pages]);
  const jobs = value?.jobs ?? [];
  const first = useRef(); // what is shown until somebody chooses stays the same
  first.current ??= (jobs.find((job) => job.status === "running") ?? jobs[0])?.id;
  const wide = chosen || first.current;
  return html`
    <${Overview} />
    <${Problem} error=${error} />
    <div class="split ${chosen ? "chosen" : ""}">
      <section aria-labelledby="jobs" class="list">
        <header>
          <h1 id="jobs" tabindex="-1">Jobs</h1>
          <a class="button primary" href="#/new">New job</a>
        </header>
        ${value && !jobs.length && html`<${Empty}><p>No job yet.</p><p>Upload rows, and train an adapter on them.</p><//>`}
        <ul>${jobs.map((job) => html`<${Row} key=${job.id} job=${job} chosen=${job.id === wide} />`)}</ul>
        ${value?.more && html`<button type="button" onClick=${() => setPages(pages + 1)}>Older jobs</button>`}
      </section>
      ${wide && html`<${Job} key=${wide} id=${wide} onChange=${again} />`}
    </div>
  `;
}

function Row({ job, chosen }) {
  const points = figures(knownHistory(job.id), "train_loss");
  const said = job.steps ? `step ${count(job.step)} of ${count(job.steps)}` : ago(job.created_at);
  return html`
    <li>
      <a class="card row" href="#/jobs/${job.id}" aria-current=${chosen ? "true" : undefined}>
        <span class="name">${job.suffix}</span>
        <${Status} of=${job.status} />
        <span class="muted">${job.model} · ${said}</span>
        <span class="figure">${job.steps ? loss(job.loss) : ""}</span>
        ${job.steps && html`<${Bar} label="Progress of ${job.suffix}" part=${job.step} whole=${job.steps} />`}
        ${job.steps && html`<${Spark} points=${points} />`}
      </a>
    </li>
  `;
}

function Overview() {
  const { value } = usePolled(() => get("/v1/capacity"), 2);
  const sum = (kind) => value?.bases.reduce((total, base) => total + base.tokens_per_second[kind], 0);
  return html`
    <dl class="tiles">
      <${Tile} label="Training" value=${count(value?.jobs.running)} unit="jobs" />
      <${Tile} label="Waiting" value=${count(value?.jobs.waiting)} unit="jobs" />
      <${Tile} label="Trained" value=${count(sum("training"))} unit="tokens/s" />
      <${Tile} label="Answered" value=${count(sum("serving"))} unit="tokens/s" />
    </dl>
  `;
}
