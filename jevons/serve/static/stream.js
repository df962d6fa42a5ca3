// One answer of /v1/chat/completions as an async generator of events, in DeepSeek's stream shape.

/** What went wrong, in words for the page. `down`: nothing answered at all. `retryAfter`: seconds, where the server said. */
export class AnswerError extends Error {
  constructor(message, { down = false, retryAfter = null } = {}) {
    super(message);
    this.down = down;
    this.retryAfter = retryAfter;
  }
}

async function httpError(response) {
  let message = `The server answered ${response.status}.`;
  try {
    const body = await response.json();
    message = body.error?.message ?? (typeof body.detail === "string" ? body.detail : message);
  } catch { /* not JSON: the status has to do */ }
  if (response.status === 401) message += " An API key can be entered in the settings.";
  return new AnswerError(message, { retryAfter: Number(response.headers.get("retry-after")) || null });
}

/** Events of one line: {waiting, answered}, {delta}, {finish}, {usage}, {votes}; `done` at the end. */
function* events(line) {
  if (line.startsWith(":")) yield { waiting: true, answered: Number(/(\d+) of \d+ answered/.exec(line)?.[1] ?? 0) };
  if (!line.startsWith("data:")) return;
  const data = line.slice(5).trim();
  if (data === "[DONE]") return yield { done: true };
  const chunk = JSON.parse(data);
  if (chunk.error) throw new AnswerError(chunk.error.message ?? "The server stopped with an error.");
  const choice = chunk.choices?.[0];
  if (choice?.delta) yield { delta: choice.delta };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.votes) yield { votes: chunk.votes };
  if (chunk.usage) yield { usage: chunk.usage };
}

const headersFor = (key) => ({ "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) });

/** Have the thought of a running answer closed; false where it is over already. `id` as `ask` gave it. */
export async function answerNow(id, key) {
  const response = await fetch(`/v1/chat/completions/${id}/answer_now`, { method: "POST", headers: headersFor(key) });
  return response.ok && (await response.json()).closes_thought;
}

/** Ask, and yield events until the answer is complete, the first of them {id}. `key` may be empty. Throws AnswerError, or AbortError after `signal`. */
export async function* ask(body, key, signal) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", { method: "POST", headers: headersFor(key), body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AnswerError("The server does not answer. Is it still running?", { down: true });
  }
  if (!response.ok) throw await httpError(response);
  yield { id: response.headers.get("x-request-id") };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new AnswerError("The connection broke before the answer was complete.", { down: true });
    }
    if (part.done) throw new AnswerError("The connection closed before the answer was complete.");
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      for (const event of events(line.trimEnd())) {
        if (event.done) return;
        yield event;
      }
    }
  }
}
