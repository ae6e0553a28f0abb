// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// What the config.json of each model says of its sizes.
"use strict";

(function (root) {
  const model = (
    layers, hidden, intermediate, heads, kvHeads, dim, vocab, furthest, more = {},
  ) => ({
    architectures: ["LlamaForCausalLM"],
    num_hidden_layers: layers, hidden_size: hidden, intermediate_size: intermediate,
    num_attention_heads: heads, num_key_value_heads: kvHeads, head_dim: dim, vocab_size: vocab,
    max_position_embeddings: furthest, ...more,
  });

  root.vllmSparseModels = {
    "Llama-3.1-8B": model(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "Llama-3.1-70B": model(80, 8192, 28672, 64, 8, 128, 128256, 131072),
    "Qwen2.5-7B": model(28, 3584, 18944, 28, 4, 128, 152064, 32768),
    "Qwen3-8B": model(36, 4096, 12288, 32, 8, 128, 151936, 40960),
    "Qwen3-30B-A3B": model(48, 2048, 6144, 32, 4, 128, 151936, 40960, {
      moe_intermediate_size: 768, num_experts: 128, num_experts_per_tok: 8,
    }),
    "Mistral-7B-v0.3": model(32, 4096, 14336, 32, 8, 128, 32768, 32768),
    "MiniCPM4.1-8B": model(32, 4096, 16384, 32, 2, 128, 73448, 65536),
    "Qwen2.5-Coder-0.5B": model(24, 896, 4864, 14, 2, 64, 151936, 32768, {
      tie_word_embeddings: true,
    }),
    "SmolLM2-135M": model(30, 576, 1536, 9, 3, 64, 49152, 8192, { tie_word_embeddings: true }),
  };
  if (typeof module !== "undefined") module.exports = root.vllmSparseModels;
})(typeof globalThis === "undefined" ? this : globalThis);
