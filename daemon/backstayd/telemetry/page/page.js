// The status page: asks for the brief document every second and shows it. Reads only.
// Everything is inserted as text, never as markup; stale data is always marked as stale.
"use strict";

const PERIOD_MS = 1000;
const HIDDEN_PERIOD_MS = 5000;
const TIMEOUT_MS = 4000;
const STALE_MS = 5000; // since the coordinator last confirmed what is shown
const EVENTS_SHOWN = 150;
const ROUTINE = new Set(["complete", "protected", "released_snapshot"]);
const TONES = {
  protected: "good", degraded: "warn", behind: "bad", "at risk": "bad", unprotected: "bad", starting: "idle", ending: "idle", unknown: "warn",
};
const EVENT_TONES = {
  node_lost: "bad", session_lost: "bad", refused: "bad", gate_failed: "bad", quarantined: "bad", distrusted: "warn",
  behind: "bad", caught_up: "good", finished: "good", abandoned: "warn", interval_raised: "warn", node_drain: "warn", protected: "good", repaired: "good", released: "good", node_joined: "good",
};
const NODE_TONES = { live: "idle", suspect: "warn", lost: "bad" };
const ORDER = { lost: 0, suspect: 1, safe: 2, draining: 2, live: 3 };

const find = (id) => document.getElementById(id);
const state = { document: null, tag: "", confirmed: -Infinity, confirmedUnix: 0, problem: "", node: "", nodeState: "", events: "" };

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = String(text);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  return made;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

function amount(count, singular) {
  return `${count} ${singular}${count === 1 ? "" : "s"}`;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

// -- jobs ------------------------------------------------------------------------------------------------------------

function headline(run) {
  if (run.behind) {
    const steps = run.behind.steps ? amount(run.behind.steps, "step") : "all steps";
    return `${steps} of the last ${Math.round(run.behind.seconds)} s are not protected`;
  }
  const survives = run.verdict.survives;
  if (survives > 0) return `survives the loss of any ${survives === 1 ? "node" : `${survives} nodes`} of a group`;
  if (survives === 0) return "does not survive the loss of a node";
  return "no snapshot in memory can be restored";
}

function facts(run) {
  const found = [
    ["protected step", run.protected_step || "none"],
    ["complete step", run.complete_step || "none"],
    ["trainers", `${run.trainer_count} of ${run.world_size}`],
    ["attempt", run.attempt],
    ["snapshot every", run.interval_steps === 1 ? "step" : `${run.interval_steps} steps`],
  ];
  if (run.storage) {
    const upload = run.storage.upload;
    const done = upload ? ` (step ${upload.step}: ${Math.floor((100 * upload.done_bytes) / Math.max(1, upload.total_bytes))} %)` : "";
    found.splice(2, 0, ["on durable storage", `${run.storage.step ? `step ${run.storage.step}` : "nothing yet"}${done}`]);
  }
  if (run.ledger) {
    if (run.ledger.goodput !== null) found.push(["goodput", `${(100 * run.ledger.goodput).toFixed(1)} %`]);
    found.push(["interruptions", `${run.ledger.interruption_count}, ${amount(run.ledger.steps_lost, "step")} lost`]);
  }
  const list = element("dl", null, { class: "facts" });
  for (const [name, value] of found) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    list.append(pair);
  }
  return list;
}

function notes(run) {
  const found = [];
  const isOld = run.decision && run.decision.phase === "release" && run.decision.outcome === "NONE";
  if (run.decision && run.decision.message && !isOld) found.push(`Last recovery (${run.decision.phase}): ${run.decision.message}`);
  if (run.explain && run.explain.message) found.push(`A restart now: ${run.explain.message}`);
  if (run.storage && run.storage.problem) found.push(`Durable storage: ${run.storage.problem}`);
  for (const item of run.distrusted) found.push(`Step ${item.step} of attempt ${item.attempt} is distrusted: ${item.reason}`);
  for (const item of run.quarantined) found.push(`${item.what} on ${item.node} is quarantined: ${item.reason}`);
  if (run.forgotten_in_s !== null) found.push(`No trainer is connected; the memory of this job is freed in ${(run.forgotten_in_s / 3600).toFixed(1)} h`);
  return found.map((text) => element("p", text, { class: "reason" }));
}

function strip(run, events, now) {
  const width = 1000, height = 34, base = 18, span = 600;
  const ns = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(ns, "svg");
  const make = (name, attributes, title) => {
    const made = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (title) { const label = document.createElementNS(ns, "title"); label.textContent = title; made.append(label); }
    picture.append(made);
    return made;
  };
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("class", "strip");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", "Protected snapshots, losses and recoveries in the last ten minutes");
  make("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" });
  for (const event of events) {
    if (event.run !== run.run && event.run !== "") continue;
    const x = width * (1 - (now - event.time_unix_s) / span);
    if (x < 0) continue;
    const title = `${clock(event.time_unix_s)} ${event.message}`;
    if (event.kind === "protected") make("line", { x1: x, x2: x, y1: base - 10, y2: base, class: "protected" }, title);
    else if (["node_lost", "session_lost"].includes(event.kind)) make("rect", { x: x - 2.5, y: base + 1, width: 5, height: 12, class: "lost" }, title);
    else if (["released", "repaired", "decided"].includes(event.kind)) make("rect", { x: x - 2.5, y: base + 1, width: 5, height: 12, class: "recovered" }, title);
  }
  const box = element("figure", null, { class: "history" }), caption = element("figcaption");
  caption.append(element("span", "10 min ago"), element("span", "protected", { class: "key protected" }),
    element("span", "loss", { class: "key lost" }), element("span", "recovery, repair", { class: "key recovered" }), element("span", "now"));
  box.append(picture, caption);
  return box;
}

function groups(run) {
  if (!run.groups.length) return null;
  const weak = run.groups.filter((group) => group.is_weak ?? (group.spares < group.m || group.missing.length));
  const box = element("details");
  const step = run.groups[0].step;
  const summary = weak.length ? `${weak.length} weaker than planned` : "all as planned";
  box.append(element("summary", `${amount(run.groups.length, "group")} at step ${step}: ${summary}`));
  box.dataset.key = "groups";
  const table = element("table"), head = element("tr");
  for (const title of ["Data + parity", "Survives", "Parity held", "Members"]) head.append(element("th", title, { scope: "col" }));
  const body = element("tbody");
  for (const group of [...weak, ...run.groups.filter((one) => !weak.includes(one))]) {
    const row = element("tr"), members = element("td");
    group.members.forEach((name, index) => {
      if (index) members.append(", ");
      members.append(group.missing.includes(name) ? element("s", name, { title: "lost" }) : name);
      if (group.missing.includes(name)) members.append(" (lost)");
    });
    row.append(
      element("td", `${group.k} + ${group.m}`, { class: "number" }),
      element("td", group.spares < 0 ? "cannot be rebuilt" : `${group.spares} of ${group.m}`, { class: "number" }),
      element("td", `${group.fragments} of ${group.fragments_wanted}`, { class: "number" }), members,
    );
    body.append(row);
  }
  const top = element("thead");
  top.append(head);
  table.append(top, body);
  box.append(table);
  return box;
}

function job(run, events, now) {
  const card = element("article", null, { class: "job", "data-tone": TONES[run.verdict.word] || "warn", "data-run": run.run });
  const head = element("div", null, { class: "job-head" });
  head.append(element("h3", run.run), element("span", run.activity, { class: "activity" }));
  const verdict = element("p", null, { class: "verdict" });
  verdict.append(element("span", run.verdict.word, { class: "word" }), " ", element("small", headline(run)));
  card.append(head, verdict, element("p", run.verdict.reason, { class: "reason why" }), facts(run), strip(run, events, now));
  const table = groups(run);
  if (table) card.append(table);
  const more = notes(run);
  if (more.length) {
    const box = element("details");
    box.dataset.key = "notes";
    box.append(element("summary", "recovery and notes"), ...more);
    card.append(box);
  }
  return card;
}

function showJobs(shown) {
  const open = new Set();
  for (const box of document.querySelectorAll(".job details[open]")) open.add(`${box.closest(".job").dataset.run} ${box.dataset.key}`);
  const focused = document.activeElement && document.activeElement.closest ? document.activeElement.closest(".job details") : null;
  const focus = focused ? `${focused.closest(".job").dataset.run} ${focused.dataset.key}` : "";
  const worst = (run) => ["bad", "warn", "idle", "good"].indexOf(TONES[run.verdict.word] || "warn");
  const runs = [...shown.runs].sort((a, b) => worst(a) - worst(b) || (a.run < b.run ? -1 : 1));
  find("jobs").replaceChildren(...runs.map((run) => job(run, shown.timeline, shown.time_unix_s)));
  for (const box of document.querySelectorAll(".job details")) {
    const key = `${box.closest(".job").dataset.run} ${box.dataset.key}`;
    box.open = open.has(key);
    if (key === focus) box.querySelector("summary").focus();
  }
  find("jobs-none").hidden = shown.runs.length > 0;
}

// -- nodes -----------------------------------------------------------------------------------------------------------

const cells = new Map();

function nodeState(node) {
  return node.state === "live" && node.draining ? node.draining : node.state;
}

function nodeTone(node) {
  if (node.state === "live" && (node.draining || node.corrupt_count)) return "warn";
  return NODE_TONES[node.state] || "warn";
}

function cell(name) {
  const item = element("li"), button = element("button", null, { type: "button", "aria-pressed": "false" });
  button.append(element("span", name, { class: "name" }), element("span", "", { class: "state" }));
  button.title = name;
  button.addEventListener("click", () => { state.node = state.node === name ? "" : name; show(); });
  item.append(button);
  return { item, button, word: button.lastChild };
}

function showNodes(shown) {
  const counts = new Map();
  for (const node of shown.nodes) counts.set(nodeState(node), (counts.get(nodeState(node)) || 0) + 1);
  showStates(counts, shown.nodes.length);
  const wanted = find("node-filter").value.trim().toLowerCase();
  const collator = new Intl.Collator("en", { numeric: true });
  const rank = (node) => (node.corrupt_count ? 1.5 : 0) || (ORDER[nodeState(node)] ?? 1);
  const seen = shown.nodes
    .filter((node) => (!state.nodeState || nodeState(node) === state.nodeState) && node.name.toLowerCase().includes(wanted))
    .sort((a, b) => rank(a) - rank(b) || collator.compare(a.name, b.name));
  const list = find("nodes");
  const items = seen.map((node) => {
    let known = cells.get(node.name);
    if (!known) { known = cell(node.name); cells.set(node.name, known); }
    setText(known.word, nodeState(node) + (node.corrupt_count ? `, ${node.corrupt_count} corrupt` : ""));
    const tone = nodeTone(node), pressed = String(state.node === node.name);
    if (known.button.dataset.tone !== tone) known.button.dataset.tone = tone;
    if (known.button.getAttribute("aria-pressed") !== pressed) known.button.setAttribute("aria-pressed", pressed);
    return known.item;
  });
  const isSame = list.children.length === items.length && items.every((item, index) => list.children[index] === item);
  if (!isSame) list.replaceChildren(...items);
  const names = new Set(shown.nodes.map((node) => node.name));
  for (const name of cells.keys()) if (!names.has(name)) cells.delete(name);
  setText(find("node-shown"), seen.length === shown.nodes.length ? amount(seen.length, "node") : `${seen.length} of ${amount(shown.nodes.length, "node")}`);
  showDetail(shown.nodes.find((node) => node.name === state.node));
}

function showStates(counts, total) {
  const box = find("node-states");
  const wanted = [["", `all ${total}`], ...[...counts.keys()].sort().map((name) => [name, `${name} ${counts.get(name)}`])];
  if (state.nodeState && !counts.has(state.nodeState)) wanted.push([state.nodeState, `${state.nodeState} 0`]);
  const key = JSON.stringify([wanted, state.nodeState]);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.state : null;
  box.replaceChildren(...wanted.map(([name, text]) => {
    const button = element("button", text, { type: "button", "aria-pressed": String(state.nodeState === name), "data-state": name });
    button.addEventListener("click", () => { state.nodeState = name; show(); });
    return button;
  }));
  if (focused !== null) for (const button of box.children) if (button.dataset.state === focused) button.focus();
}

function showDetail(node) {
  const box = find("node-detail");
  box.hidden = !node;
  if (!node) return;
  const rows = [
    ["node", node.name], ["state", node.state], ["address", node.bulk_address], ["domain", node.domain || "none"],
    ["memory", `${size(node.used_bytes)} of ${size(node.capacity_bytes)}`], ["corruptions found", node.corrupt_count], ["version", node.version],
  ];
  if (node.draining) rows.push(["draining", `${node.draining}: ${node.drain_reason}`]);
  const key = JSON.stringify(rows);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...rows.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

// -- events ----------------------------------------------------------------------------------------------------------

function showEvents(shown) {
  const choice = find("event-run");
  const runs = ["", ...shown.runs.map((run) => run.run)];
  if (JSON.stringify([...choice.options].map((one) => one.value)) !== JSON.stringify(runs)) {
    const before = choice.value;
    choice.replaceChildren(...runs.map((run) => element("option", run || "all", { value: run })));
    choice.value = runs.includes(before) ? before : "";
  }
  const routine = find("event-routine").checked;
  const rows = shown.timeline
    .filter((event) => (routine || !ROUTINE.has(event.kind)) && (!choice.value || event.run === choice.value || event.run === ""))
    .slice(-EVENTS_SHOWN).reverse();
  const key = JSON.stringify(rows);
  if (key === state.events) return;
  state.events = key;
  const body = rows.map((event) => {
    const row = element("tr", null, { "data-tone": EVENT_TONES[event.kind] || "idle" });
    row.append(
      element("td", clock(event.time_unix_s), { class: "time" }), element("td", event.run || "–", { class: "run" }),
      element("td", event.kind.replaceAll("_", " "), { class: "kind" }), element("td", event.message),
    );
    return row;
  });
  if (!body.length) {
    const row = element("tr");
    row.append(element("td", "Nothing yet.", { colspan: "4" }));
    body.push(row);
  }
  document.querySelector("#events tbody").replaceChildren(...body);
}

// -- the whole page, and its age ----------------------------------------------------------------------------------------

function show() {
  const shown = state.document;
  if (!shown) return;
  const leader = shown.leader || {};
  const role = leader.is_leader === false ? "standby" : `generation ${shown.generation.number}`;
  setText(find("coordinator"), `coordinator ${location.host} · ${role}`);
  showJobs(shown);
  showNodes(shown);
  showEvents(shown);
  showFreshness();
}

function noticeOf(shown, isStale) {
  if (isStale) return `The coordinator does not answer (${state.problem || "no answer"}). This page shows the state of ${clock(state.confirmedUnix)}, which may have changed since. Training continues without the coordinator.`;
  const leader = shown.leader || {};
  if (leader.is_leader === false) return `This coordinator is a standby and shows no nodes and jobs; the leader is ${leader.address || "not known"}.`;
  if (!shown.is_settled) return "The coordinator has just started and is collecting reports: it makes no decisions yet, and nodes and jobs may be missing here.";
  return "";
}

function showFreshness() {
  const mark = find("freshness"), age = performance.now() - state.confirmed, shown = state.document;
  const isStale = shown !== null && age > STALE_MS;
  const word = shown === null ? "waiting" : isStale ? "stale" : "live";
  if (mark.dataset.state !== word) mark.dataset.state = word;
  const since = Number.isFinite(age) ? Math.round(age / 1000) : 0;
  setText(mark, shown === null ? `waiting for the coordinator${state.problem ? `: ${state.problem}` : ""}` : isStale ? `stale: no answer for ${since} s` : "live");
  document.body.classList.toggle("is-stale", isStale);
  const text = shown ? noticeOf(shown, isStale) : "", notice = find("notice");
  setText(notice, text);
  notice.hidden = text === "";
  const bad = shown && !isStale ? shown.runs.filter((run) => ["bad", "warn"].includes(TONES[run.verdict.word] || "warn")).length : 0;
  const title = isStale ? "stale · backstay" : bad ? `${amount(bad, "job")} in danger · backstay` : "backstay";
  if (document.title !== title) document.title = title;
}

async function ask() {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(), TIMEOUT_MS);
  try {
    const headers = state.tag ? { "If-None-Match": state.tag } : {};
    const response = await fetch("/brief.json", { headers, signal: abort.signal, cache: "no-store" });
    if (response.status === 304) {
      // nothing changed: what is shown is confirmed
    } else if (!response.ok) {
      throw new Error((await response.text()).trim().slice(0, 300) || `status ${response.status}`);
    } else {
      const shown = await response.json();
      if (shown.format !== 1) throw new Error(`its document has format ${shown.format}; reload the page`);
      state.document = shown;
      state.tag = response.headers.get("ETag") || "";
    }
    state.confirmed = performance.now();
    state.confirmedUnix = Date.now() / 1000;
    state.problem = "";
  } catch (error) {
    state.problem = error.name === "AbortError" ? `no answer within ${TIMEOUT_MS / 1000} s` : error.message || String(error);
  } finally {
    clearTimeout(timer);
  }
}

let last = null;

async function turn() {
  await ask();
  if (state.document !== last) {
    last = state.document;
    show();
  } else {
    showFreshness();
  }
  setTimeout(turn, document.hidden ? HIDDEN_PERIOD_MS : PERIOD_MS);
}

find("node-filter").addEventListener("input", show);
find("event-run").addEventListener("change", show);
find("event-routine").addEventListener("change", show);
setInterval(showFreshness, 1000);
turn();
