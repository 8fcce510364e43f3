// The chat page: conversation, settings, live panel.

import { getJson, setApiKey, streamChat } from "./api.js";
import { startLive } from "./live.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = ["What does textwrap.dedent do?", "Count from one to ten.", "Write a function that reverses a list."];

const conversation = [];
let running = null;

function addMessage(role, text) {
  $("empty").hidden = true;
  const message = document.createElement("article");
  message.className = `message ${role}`;
  const who = document.createElement("div");
  who.className = "who";
  const name = document.createElement("span");
  name.textContent = { user: "You", assistant: $("model").value || "assistant", error: "Error" }[role];
  const meta = document.createElement("span");
  who.append(name, meta);
  const body = document.createElement("div");
  body.className = "body";
  message.append(who, body);
  if (role === "assistant") body.append(render(text));
  else body.textContent = text;
  $("messages").append(message);
  message.scrollIntoView({ block: "end" });
  return { message, body, meta };
}

function settings() {
  const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
  return {
    model: $("model").value || undefined,
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

function show(view, reasoning, content) {
  const near = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 80;
  view.body.replaceChildren();
  if (reasoning) {
    const details = document.createElement("details");
    details.className = "reasoning";
    details.open = !content;
    const summary = document.createElement("summary");
    summary.textContent = "Reasoning";
    const text = document.createElement("div");
    text.textContent = reasoning;
    details.append(summary, text);
    view.body.append(details);
  }
  view.body.append(render(content));
  if (near) $("messages").scrollTop = $("messages").scrollHeight;
}

async function answer() {
  const view = addMessage("assistant", "");
  view.message.classList.add("streaming");
  running = new AbortController();
  setBusy(true);
  const begun = performance.now();
  let content = "";
  let reasoning = "";
  let pendingFrame = 0;
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  try {
    for await (const event of streamChat({ ...settings(), messages }, running.signal)) {
      const choice = event.choices[0];
      content += choice?.delta.content ?? "";
      reasoning += choice?.delta.reasoning_content ?? "";
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000;
        view.meta.textContent = `${event.usage.completion_tokens} tokens, ${(event.usage.completion_tokens / seconds).toFixed(0)} tok/s`;
      }
      pendingFrame ||= requestAnimationFrame(() => {
        pendingFrame = 0;
        show(view, reasoning, content);
      });
    }
  } catch (error) {
    if (error.name === "AbortError") view.meta.textContent = "stopped";
    else addMessage("error", error.message);
  } finally {
    cancelAnimationFrame(pendingFrame);
    show(view, reasoning, content);
    view.message.classList.remove("streaming");
    // A new chat that was begun meanwhile has removed the message: its text must not come along.
    if (content && view.message.isConnected) conversation.push({ role: "assistant", content });
    else if (!reasoning) view.message.remove();
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (!busy) $("input").focus();
}

function send(text) {
  if (running || !text.trim()) return;
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  $("input").value = "";
  fit();
  answer();
}

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// On a narrow screen the panel is folded away until asked for.
function openPanel(open) {
  $("side").classList.toggle("open", open);
  $("toggle-panel").setAttribute("aria-expanded", String(open));
}

async function listModels() {
  const { data } = await getJson("/v1/models");
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((model) => new Option(model.id, model.id, false, model.id === chosen)));
  $("demo-note").hidden = !data[0].demonstration;
}

function onState(state, message) {
  const words = { ready: "ready", loading: "loading the model…", locked: "API key needed", offline: "server not reachable" };
  const pill = $("status");
  if (pill.dataset.state !== state && state === "ready") listModels();
  if (state === "locked" && $("key-field").hidden) {
    $("key-field").hidden = false;
    openPanel(true);
    $("api-key").focus();
  }
  pill.dataset.state = state;
  pill.textContent = words[state];
  pill.title = message ?? "";
  pill.className = `pill ${state === "ready" ? "ready" : state === "loading" ? "" : "bad"}`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("input").value);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("input").value);
  }
});
$("input").addEventListener("input", fit);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("messages").querySelectorAll(".message").forEach((node) => node.remove());
  $("empty").hidden = false;
  $("input").focus();
});
$("toggle-panel").addEventListener("click", () => openPanel(!$("side").classList.contains("open")));
$("api-key").addEventListener("change", () => setApiKey($("api-key").value.trim()));
for (const example of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.addEventListener("click", () => send(example));
  $("examples").append(button);
}
startLive($("tiles"), onState);
