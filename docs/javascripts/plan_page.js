// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// The page around plan.js: what is asked stands in the form and behind the address's '#', so that
// an answer can be linked. What is shown is made by functions of strings.
"use strict";

(function (root) {
  const plan = root.vllmSparsePlan || require("./plan.js");
  const models = root.vllmSparseModels || require("./plan_models.js");
  const COLOURS = { dense: "currentColor", ROCKETKV: "#0072b2", SPARDA: "#d55e00" };
  const SIZES = [
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
  ];
  const START = {
    model: "Llama-3.1-8B", context: 32768, output: 256, concurrency: 8, budget: 1024, blocks: 96,
    device: "h100", memory: "", bandwidth: "", kv: "", host: 256, ranks: 1,
  };
  const LEAST = { context: 1, output: 1, concurrency: 1, budget: 16, blocks: 34, ranks: 1 };

  function parse(text) {
    const given = Object.fromEntries(new URLSearchParams(text.replace(/^#/, "")));
    const state = { ...START };
    for (const key of [...Object.keys(START), ...SIZES]) {
      if (given[key] !== undefined) state[key] = given[key];
    }
    return state;
  }

  function said(state) {
    const changed = Object.entries(state).filter(
      ([key, value]) => String(value) !== String(START[key]) && value !== "",
    );
    return new URLSearchParams(changed).toString();
  }

  // Numbers of what was typed; what is no number counts as not given.
  function questionOf(state) {
    const number = (key) => {
      const typed = String(state[key] ?? "").trim();
      return typed === "" || !Number.isFinite(Number(typed)) ? null : Number(typed);
    };
    const whole = (key) => Math.max(Math.trunc(number(key) ?? START[key]), LEAST[key]);
    const known = models[state.model] || models[START.model];
    const config = { ...known };
    for (const key of SIZES) {
      if (number(key) > 0) config[key] = Math.trunc(number(key));
    }
    const device = plan.DEVICES[state.device] ? state.device : START.device;
    const memory = number("memory") ?? plan.DEVICES[device].memoryGib;
    const settings = { ROCKETKV: {}, SPARDA: {} };
    if (whole("budget") !== START.budget) settings.ROCKETKV.token_budget = whole("budget");
    if (whole("blocks") !== START.blocks) settings.SPARDA.top_k = whole("blocks");
    return {
      config, name: state.model, context: whole("context"), output: whole("output"),
      concurrency: whole("concurrency"), device, deviceGib: memory,
      hostGib: number("host") ?? START.host, ranks: whole("ranks"),
      kvGib: number("kv") || (memory ? null : 4.0), bandwidth: number("bandwidth") || null,
      settings,
    };
  }

  const escaped = (text) =>
    String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const gib = (bytes) =>
    bytes ? `${(bytes / plan.GIB).toFixed(bytes < plan.GIB / 10 ? 3 : 2)} GiB` : "\u2013";
  const tokens = (count) => count.toLocaleString("en-US");

  const ROWS = [
    ["does", "kept", (arm) => escaped(arm.kept)],
    ["a request, device", "request_bytes", (arm) => gib(arm.request_bytes)],
    ["a request, host", "request_host_bytes", (arm) => gib(arm.request_host_bytes)],
    ["blocks a request", "request_blocks", (arm) => tokens(arm.request_blocks)],
    ["pool on the device", "pool_bytes", (arm) => gib(arm.pool_bytes)],
    ["host pool", "host_bytes", (arm) => arm.slab_bytes && !arm.host_bytes
      ? "none: every block has a frame, so nothing is fetched and no device memory is saved"
      : gib(arm.host_bytes)],
    ["requests at once", "fits", (arm) => `<strong>${tokens(arm.fits)}</strong>`],
    ["a decode step, at least", "step_ms", (arm) => `${arm.step_ms.toFixed(2)} ms`],
    ["speed-up, at most", "speedup", (arm) => `<strong>${arm.speedup.toFixed(2)}x</strong>`],
    ["faster than dense from", "wins_from", (arm) =>
      arm.name === "dense" ? "" : arm.wins_from === null ? "never" : `${tokens(arm.wins_from)} tokens`],
  ];

  function tableOf(arms) {
    const head = arms.map((arm) => `<th scope="col">${arm.name}</th>`).join("");
    const cell = (arm, key, show) => {
      if (arm.refused.length) return `<td data-arm="${arm.name}" data-key="${key}"></td>`;
      return `<td data-arm="${arm.name}" data-key="${key}" data-value="${escaped(arm[key])}">${show(arm)}</td>`;
    };
    const rows = ROWS.map(([title, key, show]) =>
      `<tr><th scope="row">${title}</th>${arms.map((arm) => cell(arm, key, show)).join("")}</tr>`);
    const notes = arms.map((arm) => (arm.refused.length
      ? `<p data-arm="${arm.name}" data-key="refused"><strong>${arm.name} refuses this:</strong> ${escaped(arm.refused.join("; "))}.</p>`
      : `<pre><code data-arm="${arm.name}" data-key="serve">${escaped(arm.serve)}</code></pre>`));
    return `<table><thead><tr><th></th>${head}</tr></thead><tbody>${rows.join("")}</tbody></table>${notes.join("")}`;
  }

  // Steps against context: one line a backend, named at its end; the asked context is marked.
  function chartOf(question) {
    const [width, height, left, right, top, bottom] = [640, 280, 56, 90, 28, 40];
    const furthest = Math.max(question.config.max_position_embeddings || 131072, 4096);
    const contexts = [];
    for (let at = 10; 2 ** at < furthest; at += 0.125) contexts.push(Math.round(2 ** at));
    contexts.push(furthest);
    const lines = plan.curves(question, contexts);
    const most = Math.max(...Object.values(lines).flat());
    const x = (count) => left + (Math.log2(count / 1024) / Math.log2(furthest / 1024)) * (width - left - right);
    const y = (ms) => height - bottom - (ms / most) * (height - top - bottom);
    const text = (px, py, words, more = "") =>
      `<text x="${px.toFixed(1)}" y="${py.toFixed(1)}" fill="currentColor" ${more}>${words}</text>`;
    const parts = [];
    for (const part of [0, 0.5, 1]) {
      const py = y(most * part);
      parts.push(`<line x1="${left}" x2="${width - right}" y1="${py}" y2="${py}" stroke="currentColor" stroke-opacity="0.2"/>`);
      parts.push(text(left - 6, py + 4, (most * part).toPrecision(2), 'text-anchor="end"'));
    }
    for (let at = 1024; at <= furthest; at *= 4) {
      parts.push(text(x(at), height - bottom + 16, `${at / 1024}K`, 'text-anchor="middle"'));
    }
    parts.push(text(left, 14, "decode step of the batch, at least, ms"));
    parts.push(text(width - right, height - 6, "prompt tokens", 'text-anchor="end"'));
    const marked = Math.min(Math.max(question.context, 1024), furthest);
    parts.push(`<line x1="${x(marked)}" x2="${x(marked)}" y1="${top}" y2="${height - bottom}" stroke="currentColor" stroke-dasharray="3 4"/>`);
    const ends = Object.entries(lines).map(([name, ms]) => ({ name, at: y(ms[ms.length - 1]) }));
    ends.sort((one, other) => one.at - other.at);
    ends.forEach((end, index) => { // names keep apart
      if (index) end.at = Math.max(end.at, ends[index - 1].at + 15);
    });
    for (const [name, ms] of Object.entries(lines)) {
      const points = ms.map((value, index) => `${x(contexts[index]).toFixed(1)},${y(value).toFixed(1)}`);
      parts.push(`<polyline points="${points.join(" ")}" fill="none" stroke="${COLOURS[name]}" stroke-width="2"/>`);
    }
    for (const { name, at } of ends) {
      parts.push(text(width - right + 6, at + 4, name, `style="fill:${COLOURS[name]}"`));
    }
    return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Decode step against context" font-size="12">${parts.join("")}</svg>`;
  }

  function start(page) {
    const form = page.getElementById("plan-form");
    const field = (key) => form.elements.namedItem(key);
    const options = (key, names) => names.forEach(([value, name]) => {
      field(key).add(new Option(name, value));
    });
    options("model", Object.keys(models).map((name) => [name, name]));
    options("device", Object.entries(plan.DEVICES).map(([key, device]) => [key, device.name]));

    function show(state) {
      const question = questionOf(state);
      page.getElementById("plan-table").innerHTML = tableOf(plan.answer(question));
      page.getElementById("plan-chart").innerHTML = chartOf(question);
      for (const key of SIZES) field(key).placeholder = question.config[key];
      field("memory").placeholder = plan.DEVICES[question.device].memoryGib || "host's";
      field("bandwidth").placeholder = plan.DEVICES[question.device].bytesPerS / 1e9;
      for (const key of ["context", "concurrency", "budget"]) {
        page.getElementById(`${key}-slider`).value = Math.log2(question[key] ?? state[key]);
      }
    }
    function read() {
      const state = {};
      for (const key of [...Object.keys(START), ...SIZES]) state[key] = field(key).value;
      return state;
    }
    function follow() {
      const state = parse(root.location.hash);
      for (const key of [...Object.keys(START), ...SIZES]) field(key).value = state[key] ?? "";
      show(state);
    }
    form.addEventListener("input", (event) => {
      const slider = event.target.dataset.of;
      if (slider) field(slider).value = Math.round(2 ** event.target.value);
      if (event.target.name === "model") for (const key of SIZES) field(key).value = "";
      const state = read();
      root.history.replaceState(null, "", `#${said(state)}`);
      show(state);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    root.addEventListener("hashchange", follow);
    follow();
  }

  const own = { parse, said, questionOf, tableOf, chartOf, start };
  if (typeof module !== "undefined") module.exports = own;
  if (typeof document !== "undefined") start(document);
})(typeof globalThis === "undefined" ? this : globalThis);
