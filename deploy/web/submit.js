// A new job: rows, a model to start from, and what may be chosen beside them.

import { html, useState } from "/web/vendor/htm-preact.module.js";
import { get, post, upload } from "/web/api.js";
import { bytes, count, percent, plural } from "/web/formats.js";
import { Problem, Tile, tell, usePolled } from "/web/parts.js";

const DEFAULTS = {
  suffix: "", model: "", file: "", validation: "", method: "supervised", epochs: "", batch: "", rate: "", rank: "", more: "",
};
const RATES = { supervised: "2e-4", dpo: "2e-5" }; // what the multiplier is of

async function load() {
  const [models, files] = await Promise.all([get("/v1/models"), get("/v1/files?limit=100")]);
  return { models: models.data, files: files.data };
}

// What the API takes, of what was filled in: what was not has its default there.
function request(form, model, file) {
  const own = { model, training_file: file, suffix: form.suffix || undefined };
  const hyperparameters = {
    n_epochs: number(form.epochs),
    batch_size: number(form.batch),
    learning_rate_multiplier: number(form.rate),
  };
  const { hyperparameters: others, lora, ...more } = form.more.trim() ? JSON.parse(form.more) : {};
  return {
    ...own,
    validation: number(form.validation),
    method: { type: form.method, [form.method]: { hyperparameters: { ...hyperparameters, ...others } } },
    ...more,
    lora: { r: number(form.rank), ...lora },
  };
}

const number = (text) => (text === "" ? undefined : Number(text));

export function Submit() {
  const { value, error } = usePolled(load, 30);
  const [form, setForm] = useState(DEFAULTS);
  const [chosen, setChosen] = useState(null); // a File, and its id once it is there
  const [sent, setSent] = useState(null);
  const [problem, setProblem] = useState(null);
  const [estimate, setEstimate] = useState(null);
  const [busy, setBusy] = useState(false);
  const model = form.model || value?.models[0]?.id || "";
  const field = (name) => ({
    id: name,
    value: form[name],
    onInput: (event) => {
      setEstimate(null);
      setForm({ ...form, [name]: event.target.value });
    },
  });

  async function fileId() {
    if (!chosen) return form.file;
    if (chosen.id) return chosen.id;
    setSent(0);
    const stored = await upload(chosen.file, setSent).finally(() => setSent(null));
    if (stored.status === "error") throw new Error(`${stored.filename} has mistakes:\n${stored.status_details}`);
    setChosen({ ...chosen, id: stored.id });
    return stored.id;
  }

  async function send(dryRun) {
    setBusy(true);
    setProblem(null);
    setEstimate(null);
    try {
      if (!chosen && !form.file) throw new Error("Choose a file with rows to train on.");
      let body;
      try {
        body = request(form, model, await fileId());
      } catch (wrong) {
        if (wrong instanceof SyntaxError) throw new Error(`Other options are no JSON: ${wrong.message}.`);
        throw wrong;
      }
      const answer = await post("/v1/fine_tuning/jobs", dryRun ? { ...body, dry_run: true } : body);
      if (dryRun) setEstimate(answer);
      else {
        tell(`${answer.suffix} is ${answer.status}`);
        location.hash = `#/jobs/${answer.id}`;
      }
    } catch (wrong) {
      setProblem(wrong);
    }
    setBusy(false);
  }

  return html`
    <form class="sheet" onSubmit=${(event) => (event.preventDefault(), send(false))} aria-labelledby="new">
      <h1 id="new" tabindex="-1">New job</h1>
      <${Problem} error=${error} />
      <fieldset>
        <legend>Rows</legend>
        <div class="field">
          <label for="upload">Upload a file</label>
          <input id="upload" type="file" accept=".jsonl,.json,.csv,.parquet" onChange=${(event) => (setEstimate(null), setChosen(event.target.files[0] ? { file: event.target.files[0] } : null))} />
          <small>Chats, prompts with completions, texts or preferences: .jsonl, .json, .csv or .parquet</small>
        </div>
        <div class="field">
          <label for="file">or take one that is there</label>
          <select ...${field("file")} disabled=${Boolean(chosen)}>
            <option value="">–</option>
            ${value?.files.filter((file) => file.status === "processed").map((file) => html`<option value=${file.id}>${file.filename} · ${bytes(file.bytes)}</option>`)}
          </select>
        </div>
        <div class="field">
          <label for="validation">Rows kept for validation</label>
          <select ...${field("validation")}>
            ${["", "0.05", "0.1", "0.2"].map((share) => html`<option value=${share}>${share ? percent(share) : "none"}</option>`)}
          </select>
        </div>
      </fieldset>
      <fieldset>
        <legend>Model</legend>
        <div class="field">
          <label for="model">Start from</label>
          <select ...${field("model")} value=${model}>
            ${value?.models.map(({ id }) => html`<option value=${id}>${id}${id.includes(":") ? "" : " (base)"}</option>`)}
          </select>
        </div>
        <div class="field">
          <label for="suffix">Name of the adapter</label>
          <input ...${field("suffix")} placeholder="triage" pattern="[a-z0-9][a-z0-9._\\-]*" maxlength="64" autocomplete="off" required />
          <small>Lower-case letters, digits, '.', '_' and '-'</small>
        </div>
      </fieldset>
      <fieldset>
        <legend>Training</legend>
        <div class="field">
          <label for="method">Method</label>
          <select ...${field("method")}>
            <option value="supervised">Examples (supervised)</option>
            <option value="dpo">Preferences (DPO)</option>
          </select>
        </div>
        <div class="field"><label for="epochs">Epochs</label><input ...${field("epochs")} type="number" min="1" placeholder="3" /></div>
        <div class="field"><label for="batch">Batch size</label><input ...${field("batch")} type="number" min="1" placeholder="8" /></div>
        <div class="field"><label for="rate">Learning rate, times ${RATES[form.method]}</label><input ...${field("rate")} type="number" min="0" step="any" placeholder="1" /></div>
        <div class="field"><label for="rank">Rank</label><input ...${field("rank")} type="number" min="1" placeholder="16" /></div>
        <details>
          <summary>Other options</summary>
          <label for="more">As JSON, by their names in the API</label>
          <textarea ...${field("more")} rows="4" spellcheck="false" placeholder=${'{"num_workers": 2, "lora": {"lora_dropout": 0.1}}'}></textarea>
        </details>
      </fieldset>
      ${sent !== null && html`<p role="status">Uploading: ${percent(sent)}</p>`}
      ${problem && html`<p class="problem lines" role="alert">${problem.message}</p>`}
      ${estimate && html`<${Estimate} of=${estimate} />`}
      <div class="actions">
        <button type="button" disabled=${busy} onClick=${() => send(true)}>Estimate</button>
        <button type="submit" class="primary" disabled=${busy}>Start training</button>
      </div>
    </form>
  `;
}

const Estimate = ({ of }) => html`
  <dl class="tiles small" role="status">
    <${Tile} label="Rows" value=${count(of.examples)} />
    <${Tile} label="Tokens" value=${count(of.tokens)} />
    <${Tile} label="Steps" value=${count(of.steps)} />
    <${Tile} label="Memory" value=${bytes(of.memory.bytes)} />
    <${Tile} label="Waits for" value=${plural(of.queue.before, "job")} />
  </dl>
`;
