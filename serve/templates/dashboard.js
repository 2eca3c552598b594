"use strict";
const CURVES = [
  ["Reward", ["reward/mean"]],
  ["Held-out pass@1 and pass@k", ["eval/pass@1", "eval/pass@k"]],
  ["Entropy and SIREN anchor", ["policy/entropy", "siren/anchor"]],
  ["Policy age", ["policy_age/mean", "policy_age/max"]],
  ["Engine against learner", ["ratio/mismatch_kl"]],
  ["Busy: learner and rollouts", ["learner/busy_fraction", "rollout/busy_fraction"]],
];
const POLL_MS = 2000, NEWEST = "newest", ENDED = ["finished", "failed"];
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let rows = [], run = "", timer = 0, shown = { a: null, b: null }, seenStep = -1;

async function api(path, body) {
  const key = sessionStorage.getItem("key");
  const options = { headers: key ? { Authorization: "Bearer " + key } : {} };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const mayNotLook = answer.status === 403 && key && path === "/admin/runs";
  if (answer.status === 401 || mayNotLook) { sessionStorage.removeItem("key"); ask(); }
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error ? data.error.message : answer.statusText);
  return data;
}

const ofRun = (path) => `/admin/runs/${encodeURIComponent(run)}/${path}`;
const optional = async (call, fallback) => { try { return await call; } catch { return fallback; } };
function ask() { $("login").hidden = false; $("main").hidden = true; clearTimeout(timer); }

function node(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function drawn(name, kind, attributes) {
  const made = document.createElementNS(SVG, name);
  made.setAttribute("class", kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function fill(select, values, texts) {
  const before = select.value, all = [values, texts].join();
  if (select.dataset.all === all) return;
  select.dataset.all = all;
  select.replaceChildren(...values.map((value, i) => {
    const option = node("option", texts ? texts[i] : String(value));
    option.value = value;
    return option;
  }));
  if (values.map(String).includes(before)) select.value = before;
}

/* What is shown stays chosen when it leaves the list: Promote must not act on another version. */
function fillVersions(known) {
  const chosen = $("version").value;
  const gone = chosen === "" || known.map(String).includes(chosen) ? [] : [chosen];
  fill($("version"), [...known, ...gone], [...known, ...gone.map((version) => version + " (gone)")]);
}

function short(value) {
  if (value === 0 || Math.abs(value) >= 100) return value.toFixed(0);
  return Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3));
}

function figures(status) {
  const last = (key) => rows.findLast((row) => row[key] !== undefined)?.[key];
  const all = [["Reward", last("reward/mean")], ["Held-out pass@1", last("eval/pass@1")],
    ["Entropy, nats", last("policy/entropy")], ["Policy version", status?.policy_version],
    ["Tokens a second", status?.tokens_per_s], ["Seconds a step", last("time/step_s")]];
  $("figures").replaceChildren(...all.map(([name, value]) => {
    const made = node("div", undefined, "card");
    made.append(node("b", value === undefined ? "–" : short(value)), node("span", name, "soft"));
    return made;
  }));
}

function curve([title, keys]) {
  const lines = keys.map((key) => rows.filter((r) => r[key] !== undefined).map((r) => [r.step, r[key]]));
  const points = lines.flat();
  const figure = node("figure", undefined, "card");
  const caption = node("figcaption", title);
  keys.forEach((key, i) => {
    if (!lines[i].length) return;
    const label = node("span");
    label.append(node("i", "", i ? "second" : ""), `${key} ${short(lines[i].at(-1)[1])}`);
    caption.append(label);
  });
  figure.append(caption);
  if (!points.length) { figure.append(node("p", "no data yet", "soft")); return figure; }
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (y1 - y0 < 1e-9) { y0 -= 0.5; y1 += 0.5; }
  const svg = drawn("svg", "", { viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img",
    "aria-label": `${title}: from ${short(ys[0])} to ${short(ys.at(-1))}, steps ${x0} to ${x1}` });
  [0, 50, 100].forEach((y) => svg.append(drawn("line", "rule", { x1: 0, x2: 300, y1: y, y2: y })));
  lines.forEach((line, i) => svg.append(drawn("polyline", i ? "line second" : "line", {
    points: line.map(([x, y]) =>
      `${(300 * (x - x0) / (x1 - x0)).toFixed(1)},${(100 - 100 * (y - y0) / (y1 - y0)).toFixed(1)}`).join(" ") })));
  const plot = node("div", undefined, "plot"), left = node("div", undefined, "y"), below = node("div", undefined, "x");
  [y1, (y0 + y1) / 2, y0].forEach((y) => left.append(node("span", short(y))));
  below.append(node("span", "step " + x0), node("span", String(x1)));
  plot.append(left, svg, below);
  figure.append(plot);
  return figure;
}

function table(target, head, body) {
  const top = node("tr");
  head.forEach((text) => { const cell = node("th", text); cell.scope = "col"; top.append(cell); });
  target.replaceChildren(top, ...body.map((cells) => {
    const line = node("tr");
    cells.forEach((text, i) => line.append(node("td", String(text), i === cells.length - 1 ? "wrap" : "")));
    return line;
  }));
}

const colourBy = () => document.querySelector("[name=colour]:checked").value;

/* Colours go by the largest value in view on either side, so two steps compare. */
function scales() {
  const all = Object.values(shown).flatMap((data) => (data ? data.samples : [])).map((s) => s.tokens).filter(Boolean);
  const versions = [...new Set(all.flatMap((t) => t.policy_versions))].sort((x, y) => x - y);
  return {
    entropy: Math.max(0.1, ...all.flatMap((t) => t.entropies.map((e) => e ?? 0))),
    advantage: Math.max(0.1, ...all.flatMap((t) => t.advantages.map(Math.abs))), versions,
  };
}

function shade(tokens, i, by, scale) {
  if (by === "entropy") {
    return tokens.entropies[i] === null ? "" : `rgba(var(--heat), ${(0.75 * tokens.entropies[i] / scale.entropy).toFixed(3)})`;
  }
  if (by === "advantage") {
    const value = tokens.advantages[i];
    return `rgba(var(--${value < 0 ? "minus" : "plus"}), ${(0.45 * Math.abs(value) / scale.advantage).toFixed(3)})`;
  }
  if (by === "version") return versionColour(scale.versions, tokens.policy_versions[i]);
  return "";
}

const versionColour = (versions, version) => `hsl(${(210 + 137 * versions.indexOf(version)) % 360} 65% 50% / .28)`;

function tokenText(tokens, i) {
  const entropy = tokens.entropies[i] === null ? "not sampled" : `entropy ${short(tokens.entropies[i])}`;
  return `token ${i} ${JSON.stringify(tokens.texts[i])}: ${entropy}, advantage ${short(tokens.advantages[i])}, ` +
    `version ${tokens.policy_versions[i]}${tokens.is_peak[i] ? ", peak" : ""}`;
}

function completion(sample) {
  const made = node("pre");
  const tokens = sample.tokens;
  if (!tokens) { made.textContent = sample.completion; return made; }
  const by = colourBy(), scale = scales();
  tokens.texts.forEach((text, i) => {
    const piece = node("span", text, by === "peak" && tokens.is_peak[i] ? "t peak" : "t");
    piece.style.background = by === "peak" ? "" : shade(tokens, i, by, scale);
    piece.dataset.i = i;
    made.append(piece);
  });
  const tell = (event) => {
    const i = event.target.dataset.i;
    if (i !== undefined) $("token").textContent = tokenText(tokens, i);
  };
  made.addEventListener("pointerover", tell);
  made.addEventListener("click", tell);
  return made;
}

function legend() {
  const by = colourBy(), scale = scales();
  const patch = (colour, text) => {
    const made = node("span"), box = node("i");
    box.style.background = colour;
    made.append(box, text);
    return made;
  };
  const parts = {
    entropy: () => [patch("rgba(var(--heat), .05)", "0"), patch("rgba(var(--heat), .75)", `${short(scale.entropy)} nats`),
      "entropy of the policy after the step"],
    advantage: () => [patch("rgba(var(--minus), .45)", short(-scale.advantage)), patch("rgba(var(--plus), .45)", short(scale.advantage)),
      "what the token was credited with"],
    version: () => [...scale.versions.map((v) => patch(versionColour(scale.versions, v), "version " + v)), "whose weights sampled the token"],
    peak: () => [patch("rgba(var(--heat), .5)", "peak"), "tokens that SIREN's penalty looks at"],
  };
  $("legend").replaceChildren(...parts[by]());
}

function card(sample) {
  const made = node("article", undefined, "card"), head = node("header");
  const reward = sample.reward === null ? "abstained" : "reward " + short(sample.reward);
  head.append(node("strong", reward, sample.reward > 0 ? "badge" : "badge bad"),
    node("span", `version ${sample.policy_version} · ${sample.status} · group ${sample.group_id.slice(0, 8)}`, "soft"));
  made.append(head, node("pre", sample.prompt, "prompt"), completion(sample));
  const facts = node("dl");
  if (sample.reference) facts.append(node("dt", "reference"), node("dd", sample.reference));
  (sample.verdicts || []).forEach((v) => {
    const score = v.score === null ? "abstained" : short(v.score);
    facts.append(node("dt", v.name), node("dd", `${score} ${v.evidence || ""} ${v.error || ""} ${v.reward_version || ""}`));
  });
  made.append(facts);
  return made;
}

function draw(side) {
  const data = shown[side], target = $("samples-" + side);
  if (!data) { target.replaceChildren(); return; }
  const step = data.samples.length ? data.samples[0].step : null;
  target.replaceChildren(...data.samples.map(card));
  if (step === null) { target.append(node("p", "no trajectories kept at this step", "soft")); return; }
  if (data.why) {
    const { record } = data.why;
    target.prepend(node("p", `Step ${record.step} made version ${record.policy_version} from ${record.group_ids.length} groups of versions ` +
      `${Math.min(...record.policy_versions)} to ${Math.max(...record.policy_versions)}, ${record.num_loss_tokens} loss tokens.`, "soft"));
  }
}

async function samples(side) {
  const value = $("step-" + side).value;
  if (value === "") shown[side] = null;
  else {
    let data = await api(ofRun("samples?step=" + (value === NEWEST ? 0 : value)));
    fill($("step-a"), [NEWEST, ...data.steps]);
    fill($("step-b"), ["", ...data.steps], ["nothing", ...data.steps]);
    const step = value === NEWEST ? data.steps.at(-1) : Number(value);
    if (value === NEWEST && step !== undefined) data = await api(ofRun("samples?step=" + step));
    shown[side] = { ...data, why: await optional(api(ofRun("replay/steps/" + (step ?? 0))), null) };
  }
  draw("a"); draw("b"); legend();
}

function words(verifiers) {
  return Object.entries(verifiers).map(([name, v]) => `${name}: ${v.use} × ${short(v.weight ?? 1)}`).join("; ");
}

function rubric(rewards) {
  const isAlive = rewards !== null && rewards.is_alive;
  document.querySelectorAll("[data-reward]").forEach((button) => { button.disabled = !isAlive; });
  if (rewards === null) { table($("rubric"), ["version", "", "verifiers"], []); return; }
  const { state, shadow } = rewards;
  const mark = (label) => label === state.active ? "live" : label === shadow ? "shadow" : label === state.previous ? "before" : "";
  table($("rubric"), ["version", "", "verifiers"], state.versions.slice(-6).reverse().map((v) => {
    const label = `${v.ordinal}-${v.hash}`;
    return [label, mark(label), words(v.verifiers)];
  }));
}

async function refresh() {
  const [status, metrics, release, versions, events, rewards, buffer] = await Promise.all([
    optional(api(ofRun("status")), null), optional(api(ofRun("metrics")), { rows: [] }),
    api("/admin/release"), api("/admin/versions"), optional(api(ofRun("events")), { events: [] }),
    optional(api(ofRun("rewards")), null), optional(api(ofRun("replay")), null),
  ]);
  rows = metrics.rows;
  const isLive = status !== null && !ENDED.includes(status.phase);
  $("phase").textContent = status ? `${status.phase} · step ${status.step} of ${status.steps} · version ${status.policy_version}` : "no status yet";
  $("phase").classList.toggle("live", isLive);
  const percent = status && status.steps ? 100 * status.step / status.steps : 0;
  $("progress").setAttribute("aria-valuenow", percent.toFixed(0));
  $("progress").firstElementChild.style.width = percent + "%";
  figures(status);
  $("curves").replaceChildren(...CURVES.map(curve));
  const state = release.state;
  const how = state.canary !== null ? `version ${state.canary} gets ${(100 * state.canary_share).toFixed(0)} % as a canary`
    : state.is_following ? "following the run" : "fixed";
  $("release").textContent = `policy is version ${state.stable}, ${how}.` + (release.problem ? " " + release.problem : "");
  fillVersions(versions.versions.map((v) => v.policy_version).reverse());
  rubric(rewards);
  const actors = (isLive ? status.actors : []).map((a) => [a.name, a.state, a.policy_version < 0 ? "" : a.policy_version, ""]);
  const engines = versions.engines.map((e, i) => ["endpoint/" + i, "serving", e.policy_version, e.running]);
  table($("actors"), ["actor", "state", "version", "requests"], [...actors, ...engines]);
  if (!actors.length && !engines.length) $("actors").replaceChildren(node("caption", "the run does not train", "soft"));
  $("buffer").textContent = buffer ? `Buffer: ${buffer.ready} ready, ${buffer.leased} leased, ${buffer.consumed} consumed, ` +
    `${buffer.acknowledged} acknowledged, ${Object.values(buffer.dropped).reduce((x, y) => x + y, 0)} dropped.` : "";
  table($("events"), ["time", "event", "details"], events.events.slice(-40).reverse().map((e) =>
    [new Date(e.time * 1000).toLocaleTimeString([], { hourCycle: "h23" }), e.kind, Object.entries(e.fields).map(([k, v]) => `${k} ${typeof v === "number" ? short(v) : v}`).join(", ").slice(0, 200)]));
  if ($("step-a").value === NEWEST && status && status.step !== seenStep) { seenStep = status.step; await samples("a"); }
}

async function loop() {
  clearTimeout(timer);
  try { await refresh(); $("problem").textContent = ""; } catch (error) { $("problem").textContent = error.message; }
  if ($("login").hidden) timer = setTimeout(loop, POLL_MS);
}

async function open() {
  const hasKey = sessionStorage.getItem("key") !== null;
  try {
    const data = await api("/admin/runs");
    run = run || data.served;
    fill($("run"), data.runs.includes(data.served) ? data.runs : [data.served, ...data.runs]);
    $("run").value = run;
    $("login").hidden = true; $("main").hidden = false; $("problem").textContent = "";
    fill($("step-a"), [NEWEST]); fill($("step-b"), [""], ["nothing"]);
    shown = { a: null, b: null }; seenStep = -1;
    await optional(samples("a"), null);
    await loop();
  } catch (error) { if (hasKey || $("login").hidden) $("problem").textContent = error.message; }
}

/* One change at a time; its outcome is told in `place`. */
async function act(button, place, work) {
  button.disabled = true;
  try { place.textContent = await work(); $("problem").textContent = ""; await refresh(); }
  catch (error) { $("problem").textContent = error.message; place.textContent = error.message; }
  button.disabled = false;
}

function outcome(answer) {
  const warnings = (answer.warnings || []).map((w) => ` Warning: ${w}.`).join("");
  if (answer.to) return `${answer.from} → ${answer.to}, ${answer.buffered} buffered groups: ${answer.choice}.${warnings}`;
  if (answer.version) return `Shadow ${answer.version} scores live groups.${warnings}`;
  const r = answer.report;
  const who = answer.hash ? `Candidate ${answer.hash}: gold answers ${answer.gold || "all paid in full"}` : "The shadow has ended";
  return `${who}; mean reward ${short(r.mean_reward)} ` +
    `(live ${short(r.mean_reward_live)}), ${r.num_disagree} of ${r.num_trajectories} trajectories disagree.`;
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  open();
});
$("run").addEventListener("change", () => { run = $("run").value; open(); });
["a", "b"].forEach((side) => $("step-" + side).addEventListener("change", () => samples(side)));
document.querySelectorAll("[name=colour]").forEach((input) => input.addEventListener("change", () => { draw("a"); draw("b"); legend(); }));
document.querySelectorAll("[data-action]").forEach((button) => button.addEventListener("click", () => act(button, $("release"), async () => {
  const action = button.dataset.action, body = { action };
  if (action === "canary" || action === "promote") body.version = Number($("version").value);
  if (action === "canary") body.share = Number($("share").value) / 100;
  await api("/admin/release", body);
  return "done";
})));
document.querySelectorAll("[data-reward]").forEach((button) => button.addEventListener("click", () => act(button, $("reward-result"), async () => {
  const action = button.dataset.reward, body = { action };
  $("reward-result").textContent = action + " …";
  if (["try", "shadow", "swap"].includes(action)) body.changes = $("changes").value.split("\n").map((l) => l.trim()).filter(Boolean);
  if (["promote", "rollback", "swap"].includes(action)) body.buffered = $("buffered").value;
  return outcome(await api(ofRun("rewards"), body));
})));
open();
