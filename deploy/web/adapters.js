// What has been published: each adapter with its versions, and the names that move among them.

import { html, useState } from "/web/vendor/htm-preact.module.js";
import { get, modelPath, post } from "/web/api.js";
import { ago, day, loss } from "/web/formats.js";
import { Empty, Problem, chatWith, tell, usePolled } from "/web/parts.js";

export function Adapters({ chosen }) {
  const { value, error, again } = usePolled(() => get("/v1/models"), 3);
  const [sought, setSought] = useState("");
  const all = (value?.data ?? []).filter(({ id }) => id.includes(":"));
  const adapters = all.filter(({ id }) => id.includes(sought.trim())).sort((one, other) => other.created - one.created);
  const wide = chosen || adapters[0]?.id;
  return html`
    <${Problem} error=${error} />
    <div class="split ${chosen ? "chosen" : ""}">
      <section class="list" aria-labelledby="adapters">
        <header><h1 id="adapters" tabindex="-1">Adapters</h1></header>
        ${all.length > 5 && html`<input type="search" aria-label="Find an adapter" placeholder="Find" value=${sought} onInput=${(event) => setSought(event.target.value)} />`}
        ${value && !all.length && html`<${Empty}><p>No adapter yet: a job that succeeds publishes one.</p><//>`}
        <ul>${adapters.map((adapter) => html`<${Row} key=${adapter.id} adapter=${adapter} chosen=${adapter.id === wide} />`)}</ul>
      </section>
      ${wide && html`<${Adapter} key=${wide} id=${wide} onChange=${again} />`}
    </div>
  `;
}

// What was kept of a job on its way has no number.
const named = ({ id, version }) => (version ? `Version ${version}` : `Checkpoint ${id.split("@")[1]}`);

const Row = ({ adapter, chosen }) => html`
  <li>
    <a class="card row" href="#/adapters/${encodeURIComponent(adapter.id)}" aria-current=${chosen ? "true" : undefined}>
      <span class="name">${adapter.id.slice(adapter.root.length + 1)}</span>
      <span class="muted">version ${adapter.version}</span>
      <span class="muted">${adapter.root} · ${ago(adapter.created)}</span>
      <span class="tags">${Object.keys(adapter.aliases).map((alias) => html`<b class="tag" key=${alias}>${alias}</b>`)}</span>
    </a>
  </li>
`;

function Adapter({ id, onChange }) {
  const { value, error, again } = usePolled(() => get(`${modelPath(id)}/versions`), 3);
  const [alias, setAlias] = useState("prod");
  const [refused, setRefused] = useState(null);
  const versions = value?.data ?? [];
  const aliases = [...new Set(versions.flatMap((version) => version.aliases))].filter((name) => name !== "latest");
  const move = async (model, verb, body, said) => {
    setRefused(null);
    try {
      const moved = await post(`${modelPath(model)}/${verb}`, body);
      tell(said(moved.version));
    } catch (problem) {
      setRefused(problem);
    }
    again();
    onChange();
  };
  const promote = (version) => move(version.id, "promote", { alias }, (number) => `${alias} is version ${number} now`);
  const back = (name) => move(`${id}@${name}`, "rollback", {}, (number) => `${name} is version ${number} again`);
  return html`
    <section class="detail" aria-labelledby="adapter">
      <a class="back" href="#/adapters">All adapters</a>
      <header>
        <h2 id="adapter">${id}</h2>
        <div class="actions">
          <a class="button" href=${chatWith(id.split(":")[0], id)}>Chat with it</a>
        </div>
      </header>
      <${Problem} error=${refused ?? error} />
      <div class="card aliases">
        <div class="field inline">
          <label for="alias">Promote to</label>
          <input id="alias" value=${alias} size="10" autocomplete="off" spellcheck="false" onInput=${(event) => setAlias(event.target.value)} />
        </div>
        ${aliases.map((name) => html`<span key=${name}><b class="tag">${name}</b> <button type="button" onClick=${() => back(name)}>Roll back ${name}</button></span>`)}
      </div>
      <ul class="versions">
        ${versions.map((version) => html`
          <li class="card version" key=${version.id}>
            <div>
              <h3>${named(version)} ${version.aliases.map((name) => html`<b class="tag" key=${name}>${name}</b> `)}</h3>
              <p class="muted">${day(version.created)} · <code>${version.digest.slice(0, 12)}</code></p>
            </div>
            <dl>
              ${version.metrics && html`<div><dt>Loss</dt><dd>${loss(version.metrics.loss)}</dd></div>`}
              ${version.metrics?.validation_loss !== undefined && html`<div><dt>Validation</dt><dd>${loss(version.metrics.validation_loss)}</dd></div>`}
              ${version.job && html`<div><dt>Job</dt><dd><a href="#/jobs/${version.job}">${version.job}</a></dd></div>`}
            </dl>
            <button type="button" disabled=${!alias || version.aliases.includes(alias)} aria-label="Promote ${named(version).toLowerCase()} to ${alias}" onClick=${() => promote(version)}>Promote to ${alias || "…"}</button>
          </li>
        `)}
      </ul>
    </section>
  `;
}
