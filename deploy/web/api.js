// The service's API as this page asks it. The key of who has signed in stays in this tab, and goes with it.

const KEY = "lora-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const signedIn = () => sessionStorage.getItem(KEY) !== null;
export const signIn = (key) => sessionStorage.setItem(KEY, key);
export const signOut = () => sessionStorage.removeItem(KEY);

function headers(more) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? more : { ...more, authorization: `Bearer ${key}` };
}

function refusal(status, text) {
  if (status === 401) dispatchEvent(new Event("locked"));
  try {
    return new ApiError(status, JSON.parse(text).error.message);
  } catch {
    return new ApiError(status, `The service answered ${status}.`);
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The service does not answer. Trying again.");
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

export const get = async (path) => (await ask(path)).json();

export async function post(path, body = {}) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  return (await ask(path, options)).json();
}

// A model's name in a path: its parts stay apart, whatever is in them.
export const jobPath = (job) => `/v1/fine_tuning/jobs/${encodeURIComponent(job)}`;
export const modelPath = (model) => `/v1/models/${encodeURIComponent(model)}`;

// XMLHttpRequest, since fetch does not tell how much has been sent.
export function upload(file, onSent) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers({}))) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onSent(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, "The upload broke off: the service does not answer."));
    request.onload = () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.responseText));
    };
    request.send(form);
  });
}

// The chunks of a chat completion as they come.
export async function* chat(body, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await ask("/v1/chat/completions", { ...options, headers: { "content-type": "application/json" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      yield chunk;
    }
  }
}

// What happened to each job, the newest first; only what is new is asked for.
const histories = new Map();
const asking = new Map();

export function history(job) {
  if (!asking.has(job)) asking.set(job, extend(job).finally(() => asking.delete(job)));
  return asking.get(job);
}

export const knownHistory = (job) => histories.get(job) ?? [];

async function extend(job) {
  const known = knownHistory(job);
  const fresh = [];
  let after = "";
  for (;;) {
    const page = await get(`${jobPath(job)}/events?limit=100${after}`);
    const seen = page.data.findIndex((event) => event.id === known[0]?.id);
    fresh.push(...(seen < 0 ? page.data : page.data.slice(0, seen)));
    if (seen < 0 && page.has_more) after = `&after=${page.last_id}`;
    else {
      // What was newest and is not there any more was lost with a rank, and trained again.
      histories.set(job, seen < 0 ? fresh : [...fresh, ...known]);
      return knownHistory(job);
    }
  }
}
