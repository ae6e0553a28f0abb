// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// The arithmetic of `vllm-sparse plan` (vllm_sparse/planner), for pages without a server. Numbers
// are whole ones below 2^53, so that sums, products and floors are exact. tests/docs/test_plan.py
// compares every answer with the command's.
"use strict";

(function (root) {
  const GIB = 2 ** 30;
  const ITEM_BYTES = 2; // bfloat16
  const RESERVED_BYTES = 4 * GIB;
  const UTILIZATION = 0.92;
  const MANY = 4096;
  const HOST_GIB = 4.0; // that nobody sets
  const MISSES = 0.25;
  const STEP = 1024;
  const LAUNCHES = { dense: 2, ROCKETKV: 4, SPARDA: 8 };

  // vllm_sparse/planner/devices.py
  const gpu = (name, memoryGib, bytesPerS, linkBytesPerS, batchedTokens = 8192) => ({
    name, memoryGib, bytesPerS, linkBytesPerS, launchUs: 2.4, blockSize: 16,
    policyBlockSize: 64, batchedTokens,
  });
  const DEVICES = {
    h200: gpu("H200", 140.0, 4.1e12, 50e9),
    h100: gpu("H100 SXM", 79.6, 2.85e12, 50e9),
    a100: gpu("A100 80 GB", 79.3, 1.7e12, 24e9, 2048),
    l40s: gpu("L40S", 44.5, 0.73e12, 24e9, 2048),
    l4: gpu("L4", 22.0, 0.25e12, 12e9, 2048),
    cpu: {
      name: "CPU", memoryGib: 0.0, bytesPerS: 20e9, linkBytesPerS: 20e9, launchUs: 0.0,
      blockSize: 128, policyBlockSize: 128, batchedTokens: 2048,
    },
  };

  const ROCKETKV = {
    token_budget: 1024, window: 16, page_size: 4, min_context: 2048, generation_reserve: 256,
  };
  const SPARDA = {
    block_size: 64, kernel_stride: 16, init_blocks: 1, local_blocks: 32, top_k: 96,
    dense_len: 8192, staging_blocks: 32,
  };

  const floorDiv = (a, b) => Math.floor(a / b);
  const ceilDiv = (a, b) => -Math.floor(-a / b);

  // The sizes that a config.json has, under its own names.
  function shapeOf(config) {
    const heads = config.num_attention_heads;
    return {
      layers: config.num_hidden_layers,
      hidden: config.hidden_size,
      intermediate: config.intermediate_size,
      expertWidth: config.moe_intermediate_size || config.intermediate_size,
      experts: config.num_experts || 0,
      active: config.num_experts ? config.num_experts_per_tok || 1 : 0,
      heads,
      kvHeads: config.num_key_value_heads || heads,
      dim: config.head_dim || floorDiv(config.hidden_size, heads),
      vocab: config.vocab_size,
      tied: Boolean(config.tie_word_embeddings),
      furthest: config.max_position_embeddings || 0,
    };
  }

  // question: config, name, context, output, concurrency, device (a key), deviceGib, hostGib,
  // ranks, kvGib (or null), bandwidth (GB/s, or null), settings ({ROCKETKV: {}, SPARDA: {}}).
  function prepare(question) {
    const kind = DEVICES[question.device];
    const onGpu = kind.launchUs > 0;
    const measured = question.bandwidth ? question.bandwidth * 1e9 : kind.bytesPerS;
    return {
      ...question,
      shape: shapeOf(question.config),
      onGpu,
      blockSize: kind.blockSize,
      policyBlockSize: kind.policyBlockSize,
      batchedTokens: kind.batchedTokens,
      launchUs: kind.launchUs,
      bytesPerS: measured,
      linkBytesPerS: onGpu ? kind.linkBytesPerS : measured,
      deviceBytes: Math.trunc(question.deviceGib * GIB),
      hostBytes: Math.trunc(question.hostGib * GIB),
      kvBytes: question.kvGib === null ? null : Math.trunc(question.kvGib * GIB),
      longest: question.context + question.output,
    };
  }

  // vllm_sparse/device_room.py
  function weightBytes(shape) {
    const attention = 2 * shape.hidden * (shape.heads + shape.kvHeads) * shape.dim;
    const mlp = 3 * shape.hidden * shape.expertWidth * Math.max(1, shape.experts);
    const embeddings = (shape.tied ? 1 : 2) * shape.vocab * shape.hidden;
    return ITEM_BYTES * (shape.layers * (attention + mlp) + embeddings);
  }

  function leftBytes(asked) {
    const { shape } = asked;
    const widest = 6 * shape.hidden + 3 * shape.intermediate;
    const working = asked.batchedTokens * widest * ITEM_BYTES + RESERVED_BYTES;
    const usable = Math.trunc(asked.deviceBytes * UTILIZATION);
    return usable - floorDiv(weightBytes(shape), asked.ranks) - copiedBytes(asked) - working;
  }

  // Of more ranks than KV heads, each copies one.
  function copiedBytes(asked) {
    const { shape, ranks } = asked;
    const copies = Math.max(0, rankHeads(asked) * ranks - shape.kvHeads);
    return shape.layers * floorDiv(2 * shape.hidden * copies * shape.dim, ranks) * ITEM_BYTES;
  }

  const poolRoom = (asked) => (asked.kvBytes !== null ? asked.kvBytes : Math.max(leftBytes(asked), 0));
  const rankHeads = (asked) => Math.max(1, floorDiv(asked.shape.kvHeads, asked.ranks));
  const blockBytes = (asked, size) =>
    asked.shape.layers * rankHeads(asked) * size * 2 * asked.shape.dim * ITEM_BYTES;

  // vllm_sparse/planner/bounds.py
  const attendBytes = (shape, rows, tokens) =>
    ITEM_BYTES * rows * (2 * shape.kvHeads * tokens + 2 * shape.heads) * shape.dim;

  function scoreBytes(shape, rows, split) {
    const channels = shape.kvHeads * split.topR * ceilDiv(split.held, split.pageSize);
    return ITEM_BYTES * rows * (channels + shape.heads * shape.dim);
  }

  // vllm_sparse/planner/shapes.py
  const ofRank = ({ shape, ranks }) => ({
    ...shape,
    expertWidth: floorDiv(shape.expertWidth, ranks),
    heads: floorDiv(shape.heads, ranks),
    kvHeads: Math.max(1, floorDiv(shape.kvHeads, ranks)),
    vocab: floorDiv(shape.vocab, ranks),
  });

  const expertsRead = (shape, rows) =>
    shape.experts ? shape.experts * (1 - (1 - shape.active / shape.experts) ** rows) : 1;

  function stepWeightBytes(shape, rows) {
    const attention = 2 * shape.hidden * (shape.heads + shape.kvHeads) * shape.dim;
    const mlp = 3 * shape.hidden * shape.expertWidth * expertsRead(shape, rows);
    return ITEM_BYTES * (shape.layers * (attention + mlp) + shape.hidden * shape.vocab);
  }

  // vllm_sparse/policies/rocketkv.py
  function stage2Geometry(held, budget, dim, pageSizes) {
    const ratio = Math.max(1.0, held / budget);
    let page = Math.ceil(Math.sqrt(ratio));
    if (page > ratio) page = 1;
    page = pageSizes.find((size) => size >= page) || Math.max(...pageSizes);
    return { pageSize: page, topR: Math.min(Math.max(Math.floor((dim * page) / ratio), 1), dim) };
  }

  // Query heads of a rank's KV head.
  const groupOf = (asked) => floorDiv(floorDiv(asked.shape.heads, asked.ranks), rankHeads(asked));

  function roomForWindow(asked, size, own) {
    const { shape } = asked;
    const group = groupOf(asked);
    const perBlock = floorDiv(2 * shape.dim * floorDiv(size, own.page_size), group * shape.dim);
    return ceilDiv(own.window, perBlock) + ceilDiv(own.window, size);
  }

  function retention(asked, own, prompt, longest) {
    const size = asked.policyBlockSize;
    const reserve = Math.max(0, Math.min(own.generation_reserve, longest - prompt));
    const dense = { sparse: false, dropped: 0 };
    if (prompt <= Math.max(own.min_context, own.window)) return { ...dense, reason: "short_prompt" };
    const planned = prompt + reserve;
    const ratio = Math.max(1.0, planned / own.token_budget);
    const rho = Math.min(0.2 + 0.06 * Math.log2(ratio), 0.8);
    const capacity = Math.max(Math.floor(planned / ratio ** rho), Math.min(2 * reserve, planned));
    const geometry = stage2Geometry(capacity, own.token_budget, asked.shape.dim, [own.page_size]);
    const kept = Math.max(ceilDiv(capacity, size), roomForWindow(asked, size, own));
    const dropped = floorDiv(prompt, size) - kept;
    if (dropped < 1) return { ...dense, reason: "fits_budget" };
    return { sparse: true, dropped, reason: "", ...geometry };
  }

  // vllm_sparse/planner/times.py
  function milliseconds(asked, read, launches) {
    const begin = (launches * asked.shape.layers * asked.launchUs) / 1e3;
    return (1e3 * read) / asked.bytesPerS + begin;
  }

  function denseMs(asked, context) {
    const { concurrency } = asked;
    const shape = ofRank(asked);
    const read = stepWeightBytes(shape, concurrency) + shape.layers * attendBytes(shape, concurrency, context);
    return milliseconds(asked, read, LAUNCHES.dense);
  }

  function rocketMs(asked, own, context) {
    const { concurrency } = asked;
    const shape = ofRank(asked);
    const found = retention(asked, own, context, context + asked.output);
    if (!found.sparse) return denseMs(asked, context);
    const split = { ...found, held: context - found.dropped * asked.policyBlockSize };
    const topK = floorDiv(own.token_budget, 2);
    const layer =
      scoreBytes(shape, concurrency, split) +
      attendBytes(shape, concurrency, Math.min(topK, split.held));
    const read = stepWeightBytes(shape, concurrency) + shape.layers * layer;
    return milliseconds(asked, read, LAUNCHES.ROCKETKV);
  }

  function spardaMs(asked, own, context, hosted) {
    const { concurrency: rows, onGpu } = asked;
    const shape = ofRank(asked);
    const size = own.block_size;
    const there = ceilDiv(context, size);
    const whole = context <= own.dense_len;
    const read = whole ? there : Math.min(own.top_k, there);
    const free = whole ? 0 : Math.max(read - own.init_blocks - own.local_blocks - 1, 0);
    const kvBytesPerToken = ITEM_BYTES * shape.layers * shape.kvHeads * 2 * shape.dim;
    const fetched = hosted ? MISSES * free * rows * kvBytesPerToken * size : 0;
    const keys = ITEM_BYTES * rows * shape.kvHeads * shape.dim
      * (floorDiv(context, own.kernel_stride) + 1);
    const choices = 2 * 4 * rows * shape.kvHeads * read;
    const layer = attendBytes(shape, rows, read * size) + keys + choices;
    const bytes = stepWeightBytes(shape, rows) + shape.layers * layer;
    const compute = (1e3 * bytes) / asked.bytesPerS;
    const transfer = (1e3 * (onGpu ? fetched : 2 * fetched)) / asked.linkBytesPerS;
    const begin = (LAUNCHES.SPARDA * shape.layers * asked.launchUs) / 1e3;
    return (onGpu ? Math.max(compute, transfer) : compute + transfer) + begin;
  }

  function winsFrom(asked, steps) {
    const furthest = asked.shape.furthest || 2 ** 20;
    for (let context = STEP; context <= furthest; context += STEP) {
      if (steps(context) < denseMs(asked, context)) return context;
    }
    return null;
  }

  // vllm_sparse/planner/plan.py
  function dense(asked) {
    const refused = impossible(asked);
    if (refused.length) return { name: "dense", refused };
    const each = blockBytes(asked, asked.blockSize);
    const blocks = floorDiv(poolRoom(asked), each);
    const held = ceilDiv(asked.longest, asked.blockSize);
    return {
      name: "dense", refused, kept: "keeps and reads every token",
      block_bytes: each, pool_blocks: blocks, pool_bytes: blocks * each,
      prompt_blocks: ceilDiv(asked.context, asked.blockSize), request_blocks: held,
      request_bytes: held * each, request_host_bytes: 0, host_bytes: 0, slab_bytes: 0,
      fits: floorDiv(Math.max(blocks - 1, 0), held),
      step_ms: denseMs(asked, asked.context), speedup: 1.0, wins_from: null,
      serve: serve(asked, "dense", {}),
    };
  }

  function rocketkv(asked, given) {
    const own = { ...ROCKETKV, ...given };
    const { shape, policyBlockSize: size } = asked;
    const refused = impossible(asked);
    if (own.token_budget < Math.max(16, 4 * own.page_size)) refused.push("token_budget is too small");
    if (floorDiv(size, own.page_size) * 2 < groupOf(asked)) {
      refused.push(`blocks of ${size} tokens are too small for this many query heads per KV head`);
    }
    if (refused.length) return { name: "ROCKETKV", refused };
    const numbers = 2 * shape.dim + floorDiv(2 * shape.dim, own.page_size);
    const each = floorDiv(blockBytes(asked, size) * numbers, 2 * shape.dim);
    const found = retention(asked, own, asked.context, asked.longest);
    const blocks = floorDiv(poolRoom(asked), each);
    const prompt = ceilDiv(asked.context, size);
    const held = ceilDiv(asked.longest, size) - found.dropped;
    const room = Math.max(blocks - 1, 0) - Math.max(prompt - held, 0);
    const steps = (context) => rocketMs(asked, own, context);
    return {
      name: "ROCKETKV", refused,
      kept: found.sparse
        ? `stage1+stage2, token budget ${own.token_budget}`
        : `serves this densely (${found.reason})`,
      block_bytes: each, pool_blocks: blocks, pool_bytes: blocks * each,
      prompt_blocks: prompt, request_blocks: held, request_bytes: held * each,
      request_host_bytes: 0, host_bytes: 0, slab_bytes: 0,
      fits: Math.max(0, floorDiv(room, held)),
      step_ms: steps(asked.context), speedup: denseMs(asked, asked.context) / steps(asked.context),
      wins_from: winsFrom(asked, steps), serve: serve(asked, "ROCKETKV", given),
    };
  }

  // vllm_sparse/planner/paging.py: the host pool and the frames that start-up would choose.
  function sized(asked, own) {
    const { shape, ranks } = asked;
    const size = own.block_size;
    const each = blockBytes(asked, size);
    const held = ceilDiv(asked.longest, size);
    const perRow = Math.min(Math.max(own.top_k, ceilDiv(own.dense_len, size)), held);
    const slack = floorDiv(asked.hostBytes * 8, 10);
    let most = floorDiv(slack, ranks);
    if (!asked.onGpu) {
      const left = floorDiv(Math.max(slack - weightBytes(shape), 0), ranks);
      most = Math.max(floorDiv(left, 2), left - 2 * asked.concurrency * perRow * each);
    }
    const wanted = Math.min((asked.concurrency * held + 1) * each, most);
    const sizes = { each, held, perRow };
    if (asked.onGpu) {
      const unsaid = atStart(asked, own, sizes, unsaidGib(asked, own, sizes));
      if (!unsaid.refused && !unsaid.hosted && unsaid.blocks * each >= wanted) return unsaid;
    }
    const hostGib = gibOf(wanted);
    return { ...atStart(asked, own, sizes, hostGib), hostGib };
  }

  const gibOf = (bytes) => ceilDiv(bytes * 100, GIB) / 100;
  // Two halves of blocks of all KV heads, in one layer.
  const stagingBytes = (asked, own, each) => 2 * own.staging_blocks * floorDiv(each, asked.shape.layers);
  // One query of each block, as the selector is `previous`.
  const queryBytes = ({ shape, ranks }) =>
    shape.layers * floorDiv(shape.heads, ranks) * shape.dim * ITEM_BYTES;

  // vllm_sparse/startup.py: the pool that a GPU's server takes if nobody says.
  function unsaidGib(asked, own, { each, held }) {
    const share = Math.trunc(asked.hostBytes / asked.ranks);
    const room = Math.max(leftBytes(asked) - stagingBytes(asked, own, each), 0);
    const blocks = floorDiv(room, each + floorDiv(each, 2 * own.kernel_stride));
    const most = gibOf(Math.max(floorDiv(share, 2 * queryBytes(asked)), held + 1) * each);
    const onDevice = Math.min(floorDiv(blocks * each * 100, GIB) / 100, most);
    const needed = (held + 1) * each;
    const one = 2 * needed > share || needed <= onDevice * GIB ? 0 : gibOf(needed);
    return Math.max(HOST_GIB, one, onDevice);
  }

  // vllm_sparse/startup.py: what such a pool comes to.
  function atStart(asked, own, { each, held, perRow }, poolGib) {
    const { shape, ranks } = asked;
    const heads = rankHeads(asked);
    const blocks = floorDiv(Math.trunc(poolGib * GIB), each);
    if (blocks < held + 1) return { refused: "host memory holds not one request" };
    const piece = floorDiv(each, shape.layers * heads);
    const pieces = blocks * heads;
    const staging = stagingBytes(asked, own, each);
    const keys = floorDiv(blocks * each, 2 * own.kernel_stride);
    let frames = Math.min(2 * Math.min(asked.concurrency * heads * perRow, pieces), pieces);
    let served = MANY;
    if (asked.onGpu) {
      const room = leftBytes(asked) - keys - staging;
      frames = Math.min(floorDiv(floorDiv(room, piece), shape.layers), pieces);
      if (frames < pieces) {
        if (frames < heads * perRow) return { refused: "frames of one request's step do not fit the device" };
        served = Math.min(MANY, floorDiv(frames, heads * perRow));
      }
    }
    // A GPU has no host blocks if all of them have frames.
    const hosted = !asked.onGpu || frames < pieces;
    let taken = ((hosted ? blocks * each : 0) + blocks * queryBytes(asked)) * ranks;
    if (!asked.onGpu) {
      taken += (frames * shape.layers * piece + keys + staging) * ranks + weightBytes(shape);
    }
    if (taken > asked.hostBytes) {
      return { refused: "what is in host memory is more than what is free" };
    }
    return { each, held, heads, perRow, piece, blocks, frames, served, hosted };
  }

  function spardaStepAt(asked, own, context) {
    const found = sized({ ...asked, context, longest: context + asked.output }, own);
    return spardaMs(asked, own, context, found.hosted ?? true);
  }

  function sparda(asked, given) {
    const own = { ...SPARDA, ...given };
    const { shape, ranks } = asked;
    const size = own.block_size;
    const refused = impossible(asked);
    const forced = own.init_blocks + own.local_blocks + 1;
    if (own.top_k < forced) refused.push(`top_k is less than the ${forced} blocks always read`);
    if (refused.length) return { name: "SPARDA", refused };
    const found = sized(asked, own);
    if (found.refused) return { name: "SPARDA", refused: [found.refused] };
    const { each, held, heads, perRow, piece, blocks } = found;
    const hosted = found.hosted ? each : 0;
    const said = found.hostGib === undefined ? given : { ...given, host_gib: { float: found.hostGib } };
    const compressed = floorDiv(each * Math.max(1, floorDiv(size, own.kernel_stride)), 2 * size);
    const steps = (context) => spardaStepAt(asked, own, context);
    return {
      name: "SPARDA", refused,
      kept: `selector previous, ${own.top_k} blocks read per KV head`,
      block_bytes: compressed, pool_blocks: blocks, pool_bytes: blocks * compressed,
      prompt_blocks: ceilDiv(asked.context, size), request_blocks: held,
      request_bytes: held * compressed + heads * perRow * shape.layers * piece,
      request_host_bytes: held * hosted, host_bytes: blocks * hosted * ranks,
      slab_bytes: found.frames * shape.layers * piece,
      fits: Math.min(floorDiv(blocks - 1, held), found.served),
      step_ms: steps(asked.context), speedup: denseMs(asked, asked.context) / steps(asked.context),
      wins_from: winsFrom(asked, steps),
      serve: serve(asked, "SPARDA", said),
    };
  }

  function impossible(asked) {
    const { shape, ranks, longest } = asked;
    const refused = [];
    if (shape.heads % ranks || (shape.kvHeads % ranks && ranks % shape.kvHeads)) {
      refused.push(`${shape.heads} query heads and ${shape.kvHeads} KV heads cannot be divided among ${ranks} `
        + "ranks: ask for a number that divides the query heads, and that divides the KV heads or is a multiple of them");
    }
    if (shape.furthest && shape.furthest < longest) {
      refused.push(`${longest} tokens are more than the ${shape.furthest} that the model was made for: ask for `
        + "fewer, or give the max_position_embeddings that you will serve it with (YaRN) under Another model");
    }
    return refused;
  }

  const shown = (value) =>
    value.float === undefined ? String(value) : value.float.toFixed(20).match(/\.0+$/)
      ? value.float.toFixed(1) : String(value.float);

  function serve(asked, backend, settings) {
    const parts = [
      `vllm serve ${asked.name}`, `--max-model-len ${asked.longest}`,
      `--max-num-seqs ${asked.concurrency}`,
    ];
    if (asked.ranks > 1) parts.push(`--tensor-parallel-size ${asked.ranks}`);
    if (backend !== "SPARDA") {
      if (asked.kvBytes !== null) parts.push(`--kv-cache-memory-bytes ${asked.kvBytes}`);
      else if (asked.onGpu) parts.push(`--gpu-memory-utilization ${UTILIZATION}`);
    }
    if (backend !== "dense") parts.push(`--attention-backend ${backend}`);
    const keys = Object.keys(settings);
    if (keys.length) {
      const said = keys.map((key) => `"${key}": ${shown(settings[key])}`).join(", ");
      parts.push(`--additional-config '{"vllm_sparse": {${said}}}'`);
    }
    return parts.join(" ");
  }

  function answer(question) {
    const asked = prepare(question);
    const own = question.settings || {};
    return [dense(asked), rocketkv(asked, own.ROCKETKV || {}), sparda(asked, own.SPARDA || {})];
  }

  // Decode steps in ms of each backend at some contexts, whatever fits.
  function curves(question, contexts) {
    const asked = prepare(question);
    const own = question.settings || {};
    const rocket = { ...ROCKETKV, ...own.ROCKETKV };
    const paged = { ...SPARDA, ...own.SPARDA };
    return {
      dense: contexts.map((tokens) => denseMs(asked, tokens)),
      ROCKETKV: contexts.map((tokens) => rocketMs(asked, rocket, tokens)),
      SPARDA: contexts.map((tokens) => spardaStepAt(asked, paged, tokens)),
    };
  }

  const plan = { GIB, DEVICES, ROCKETKV, SPARDA, answer, curves };
  root.vllmSparsePlan = plan;
  if (typeof module !== "undefined") module.exports = plan;
})(typeof globalThis === "undefined" ? this : globalThis);
