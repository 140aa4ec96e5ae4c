// Which view is shown, and to whom.

import { html, render, useEffect, useRef, useState } from "/web/vendor/htm-preact.module.js";
import { Adapters } from "/web/adapters.js";
import { get, signIn, signOut, signedIn } from "/web/api.js";
import { Capacity } from "/web/capacity.js";
import { Chat } from "/web/chat.js";
import { Jobs } from "/web/jobs.js";
import { Told } from "/web/parts.js";
import { Submit } from "/web/submit.js";

const VIEWS = { jobs: "Jobs", chat: "Chat", adapters: "Adapters", capacity: "Capacity" };

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return ""; // half of an escape
  }
}

// #/jobs/job-1 and #/chat?models=a,b
function parse(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const [view, ...rest] = path.split("/");
  const models = new URLSearchParams(query).get("models");
  return { view: view || "jobs", chosen: decoded(rest.join("/")), models: models ? models.split(",") : [] };
}

function View({ at }) {
  if (at.view === "new") return html`<${Submit} />`;
  if (at.view === "chat") return html`<${Chat} key=${at.models.join()} wanted=${at.models} />`;
  if (at.view === "adapters") return html`<${Adapters} chosen=${at.chosen} />`;
  if (at.view === "capacity") return html`<${Capacity} />`;
  return html`<${Jobs} chosen=${at.chosen} />`;
}

function SignIn({ said, onKey }) {
  const [key, setKey] = useState("");
  const input = useRef();
  useEffect(() => input.current.focus(), []);
  const submit = (event) => {
    event.preventDefault();
    if (key.trim()) onKey(key.trim());
  };
  return html`
    <form class="sheet sign-in" onSubmit=${submit}>
      <img src="/web/icon.svg" alt="" width="48" height="48" />
      <h1>LoRA service</h1>
      <p class="muted">Sign in with an API key. It is kept in this tab until you close it.</p>
      ${said && html`<p class="problem" role="alert">${said}</p>`}
      <div class="field">
        <label for="key">API key</label>
        <input id="key" ref=${input} type="password" autocomplete="off" placeholder="sk-lora-…" value=${key} onInput=${(event) => setKey(event.target.value)} />
      </div>
      <button type="submit" class="primary">Sign in</button>
    </form>
  `;
}

function App() {
  const [at, setAt] = useState(parse(location.hash));
  const [locked, setLocked] = useState(undefined); // what is said to who has to sign in; null: nobody has to
  const enter = async () => {
    try {
      await get("/v1/models");
    } catch (error) {
      if (error.status === 401) return;
    }
    setLocked(null);
  };
  useEffect(() => {
    addEventListener("hashchange", () => setAt(parse(location.hash)));
    addEventListener("locked", () => {
      setLocked(signedIn() ? "This key is unknown or revoked: use another one, or ask your operator for one." : "");
      signOut();
    });
    enter();
  }, []);
  useEffect(() => {
    document.title = `${at.view === "new" ? "New job" : VIEWS[at.view] ?? "Jobs"} · LoRA service`;
    if (locked === null && document.activeElement === document.body) document.querySelector("main h1")?.focus();
  }, [at.view, locked]);
  if (locked === undefined) return null;
  if (locked !== null) return html`<main><${SignIn} said=${locked} onKey=${(key) => (signIn(key), enter())} /></main>`;
  return html`
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.querySelector("main h1").focus())}>To the content</a>
    <header class="top">
      <a class="brand" href="#/jobs"><img src="/web/icon.svg" alt="" width="28" height="28" /> LoRA service</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([view, title]) => html`<a key=${view} href="#/${view}" aria-current=${view === at.view || (view === "jobs" && at.view === "new") ? "page" : undefined}>${title}</a>`)}
      </nav>
      ${signedIn() && html`<button type="button" class="quiet" onClick=${() => (signOut(), enter())}>Sign out</button>`}
    </header>
    <main id="main"><${View} at=${at} /></main>
    <${Told} />
  `;
}

render(html`<${App} />`, document.body);
