// The live panel: polls /stats and draws the recent past of each figure.

import { getJson } from "./api.js";

const HISTORY = 60;
const PERIOD_MS = 1000;

const TILES = [
  { name: "Generated tokens per second", of: (now, before, s) => (now.generation_tokens - before.generation_tokens) / s, show: (v) => v.toFixed(0) },
  { name: "Requests running (waiting)", of: (now) => now.running, show: (v, now) => `${v} (${now.waiting})` },
  { name: "Tokens in the last step", of: (now) => stepTokens(now), show: (v) => v.toFixed(0) },
  { name: "KV cache in use", of: (now) => 100 * now.kv_usage, show: (v) => `${v.toFixed(1)} %` },
  { name: "Prompt tokens from cache", of: (now) => (now.prefix_queries ? (100 * now.prefix_hits) / now.prefix_queries : 0), show: (v) => `${v.toFixed(0)} %` },
  { name: "Accepted tokens per step", of: (now, before) => acceptedPerStep(now, before), show: (v, now) => (now.drafts ? v.toFixed(2) : "no draft") },
];

function stepTokens(now) {
  const step = now.last_step;
  return step && now.running ? step.prefill_tokens + step.decode_tokens + step.draft_tokens : 0;
}

// Of guesses made since the last look; of all guesses so far while none were made.
function acceptedPerStep(now, before) {
  const since = now.drafts > before.drafts ? before : { drafts: 0, accepted_tokens: 0 };
  return now.drafts ? (now.accepted_tokens - since.accepted_tokens) / (now.drafts - since.drafts) : 0;
}

export function startLive(container, onState) {
  const tiles = TILES.map((tile) => ({ ...tile, ...makeTile(container, tile.name), history: [] }));
  let before = null;
  let beforeTime = 0;
  async function tick() {
    try {
      const now = await getJson("/stats");
      const time = performance.now();
      if (before) {
        const seconds = (time - beforeTime) / 1000;
        for (const tile of tiles) update(tile, tile.of(now, before, seconds), now);
      }
      before = now;
      beforeTime = time;
      onState("ready");
    } catch (error) {
      onState(error.status === 503 ? "loading" : error.status === 401 ? "locked" : "offline", error.message);
    }
    setTimeout(tick, document.hidden ? 5 * PERIOD_MS : PERIOD_MS);
  }
  tick();
}

function makeTile(container, name) {
  const tile = document.createElement("div");
  tile.className = "tile";
  const label = document.createElement("span");
  label.className = "name";
  label.textContent = name;
  const value = document.createElement("span");
  value.className = "value";
  value.textContent = "–";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${HISTORY - 1} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  svg.append(line);
  tile.append(label, value, svg);
  container.append(tile);
  return { value, line };
}

function update(tile, number, now) {
  tile.history.push(number);
  if (tile.history.length > HISTORY) tile.history.shift();
  tile.value.textContent = tile.show(number, now);
  const top = Math.max(...tile.history, 1e-9);
  const offset = HISTORY - tile.history.length;
  tile.line.setAttribute("points", tile.history.map((v, i) => `${offset + i},${19 - (18 * v) / top}`).join(" "));
}
