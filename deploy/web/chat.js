// The same question to several models, side by side.

import { html, useEffect, useRef, useState } from "/web/vendor/htm-preact.module.js";
import { chat, get } from "/web/api.js";
import { count } from "/web/formats.js";
import { Empty, Problem, usePolled } from "/web/parts.js";

const MOST = 4;

// Until somebody chooses: a base, and the newest adapter on it.
function usual(models) {
  const newest = models.filter(({ id }) => id.includes(":")).sort((one, other) => other.created - one.created)[0];
  const base = newest ? newest.root : models[0]?.id;
  return [base, newest?.id].filter(Boolean);
}

// What a model has been told and has answered.
function messages(turns, model, system) {
  const answered = turns.filter((turn) => turn.answers[model] && !turn.answers[model].error);
  const said = answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answers[model].text },
  ]);
  return system ? [{ role: "system", content: system }, ...said] : said;
}

export function Chat({ wanted }) {
  const { value, error } = usePolled(() => get("/v1/models"), 10);
  const [chosen, setChosen] = useState(wanted.length ? wanted : null);
  const [turns, setTurns] = useState([]);
  const [form, setForm] = useState({ question: "", system: "", temperature: "0", tokens: "256" });
  const stop = useRef(null);
  const end = useRef();
  const all = value?.data ?? [];
  const models = chosen ?? usual(all);
  const [busy, setBusy] = useState(false);
  useEffect(() => () => stop.current?.abort(), []);

  const put = (index, model, change) =>
    setTurns((now) => now.map((turn, at) => (at === index ? { ...turn, answers: { ...turn.answers, [model]: { ...turn.answers[model], ...change } } } : turn)));

  async function answer(index, model, body, signal) {
    const began = performance.now();
    let [text, tokens] = ["", 0];
    try {
      for await (const chunk of chat({ ...body, stream_options: { include_usage: true } }, signal)) {
        text += chunk.choices[0]?.delta.content ?? "";
        tokens = chunk.usage?.completion_tokens ?? tokens;
        const pace = tokens && (1000 * tokens) / (performance.now() - began);
        put(index, model, { text, tokens, pace, digest: chunk.system_fingerprint });
      }
    } catch (problem) {
      if (problem.name !== "AbortError") put(index, model, { error: problem.message });
    }
    put(index, model, { done: true });
  }

  async function send() {
    const question = form.question.trim();
    if (!question || busy || !models.length) return;
    const index = turns.length;
    const began = Object.fromEntries(models.map((model) => [model, { text: "" }]));
    setTurns([...turns, { question, answers: began }]);
    setForm({ ...form, question: "" });
    setBusy(true);
    stop.current = new AbortController();
    const common = { temperature: Number(form.temperature), max_tokens: Number(form.tokens) };
    await Promise.all(
      models.map((model) => {
        const told = [...messages(turns, model, form.system.trim()), { role: "user", content: question }];
        return answer(index, model, { ...common, model, messages: told }, stop.current.signal);
      }),
    );
    setBusy(false);
  }

  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [turns]);
  const field = (name) => ({ id: name, value: form[name], onInput: (event) => setForm({ ...form, [name]: event.target.value }) });
  const left = all.filter(({ id }) => !models.includes(id));
  return html`
    <section class="chat" aria-labelledby="chat">
      <header>
        <h1 id="chat" tabindex="-1">Chat</h1>
        <ul class="chips" aria-label="Models that answer">
          ${models.map((model) => html`<li key=${model}>${model}<button type="button" aria-label="Remove ${model}" onClick=${() => setChosen(models.filter((one) => one !== model))}>×</button></li>`)}
          ${models.length < MOST && left.length > 0 && html`
            <li class="add">
              <select aria-label="Add a model" value="" onChange=${(event) => event.target.value && setChosen([...models, event.target.value])}>
                <option value="">Add a model</option>
                ${left.map(({ id }) => html`<option value=${id}>${id}</option>`)}
              </select>
            </li>`}
        </ul>
        ${turns.length > 0 && html`<button type="button" disabled=${busy} onClick=${() => setTurns([])}>Clear</button>`}
      </header>
      <${Problem} error=${error} />
      <div class="turns">
        ${!turns.length && html`<${Empty}><p>Ask the base and its adapters the same question.</p><//>`}
        ${turns.map((turn, index) => html`<${Turn} key=${index} turn=${turn} />`)}
        <div ref=${end}></div>
      </div>
      <form class="composer card" onSubmit=${(event) => (event.preventDefault(), send())}>
        <label class="unseen" for="question">Your message</label>
        <textarea ...${field("question")} rows="2" placeholder="Ask something" onKeyDown=${(event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && (event.preventDefault(), send())}></textarea>
        <div class="actions">
          <details>
            <summary>Settings</summary>
            <div class="field"><label for="system">System message</label><textarea ...${field("system")} rows="2"></textarea></div>
            <div class="field"><label for="temperature">Temperature</label><input ...${field("temperature")} type="number" min="0" max="2" step="0.1" /></div>
            <div class="field"><label for="tokens">Most tokens</label><input ...${field("tokens")} type="number" min="1" /></div>
          </details>
          ${busy
            ? html`<button type="button" onClick=${() => stop.current.abort()}>Stop</button>`
            : html`<button type="submit" class="primary" disabled=${!models.length}>Send</button>`}
        </div>
      </form>
    </section>
  `;
}

const Turn = ({ turn }) => html`
  <article class="turn">
    <p class="question">${turn.question}</p>
    <div class="answers">
      ${Object.entries(turn.answers).map(([model, answer]) => html`
        <section class="card answer" key=${model} aria-label="Answer of ${model}" aria-live="polite" aria-busy=${!answer.done}>
          <h2>${model}</h2>
          ${answer.error ? html`<p class="problem">${answer.error}</p>` : html`<p class="text">${answer.text}${!answer.done && html`<i class="caret" aria-hidden="true"></i>`}</p>`}
          <small>${answer.tokens ? `${count(answer.tokens)} tokens · ${count(answer.pace)} tokens/s` : " "}</small>
        </section>
      `)}
    </div>
  </article>
`;
