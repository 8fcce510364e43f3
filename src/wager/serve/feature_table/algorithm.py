"""Algorithms: decoding, architecture, compression."""

from __future__ import annotations

from wager.serve.feature_table.terms import (
    APPROX,
    BLOCKS,
    ENGINE,
    EXACT,
    FAMILIES,
    GRAMMAR,
    LATER,
    LAW,
    METHODS,
    NATIVE,
    RUNNER,
    SAME,
    SUFFIX,
    VERIFY,
    absent,
)
from wager.serve.features import Feature, register

DECODING = (
    Feature(
        "speculative_draft_model", "algorithm/decoding", "speculative decoding with a draft model", SAME,
        ("speculative_config",), "wager.serve.speculate.draft_model:ModelChainDrafter",
        (ENGINE + "test_speculation_keeps_every_token", ENGINE + "test_perfect_draft_takes_fewer_steps",
         VERIFY + "test_outputs_follow_the_targets_joint_distribution"),
        note="greedy output is identical; sampled output has the same distribution",
        enabled_when=lambda c: bool(c.speculative_config),
    ),
    Feature(
        "tree_verification", "algorithm/decoding", "token-tree verification in one forward pass", EXACT, (),
        "wager.serve.token_tree:TokenTree",
        (RUNNER + "test_every_node_of_a_tree_sees_exactly_its_path", RUNNER + "test_an_accepted_path_becomes_context"),
        note="every batch is a ragged list of spans with an ancestor mask; chains and single tokens are trees",
    ),
    Feature(
        "parallel_sampling", "algorithm/decoding", "parallel sampling (n > 1) on one prefill", EXACT, ("n",),
        "wager.serve.params:SamplingParams.n", (ENGINE + "test_n_continuations_are_independent_and_share_the_prompt",),
    ),
    Feature(
        "structured_outputs", "algorithm/decoding", "constrained decoding: JSON schema, regex, choice, grammar", EXACT,
        ("structured_outputs", "response_format"), "wager.serve.sampling.grammar:GrammarCompiler",
        (ENGINE + "test_structured_output_parses", GRAMMAR + "test_every_completed_output_validates_against_its_schema",
         GRAMMAR + "test_masks_after_guesses_are_those_after_commits_and_leave_no_trace"),
        note="compiled by llguidance beside the steps, rolled back with rejected drafts",
    ),
    absent("speculative_heads", "algorithm/decoding", "speculation with trained heads (Medusa, EAGLE, MTP)", LATER),
    Feature(
        "speculative_model_free", "algorithm/decoding", "model-free speculation (n-gram, suffix tree)", EXACT,
        ("speculative_config",), "wager.serve.speculate.suffix:SuffixDrafter",
        (LAW + "test_matching_methods_keep_seeded_samples_on_the_whole_grid", SUFFIX + "test_drafts_score_what_brute_force_scores"),
        enabled_when=lambda c: any(s.method in ("suffix", "ngram") for s in c.speculative_config),
    ),
    Feature(
        "speculative_trees", "algorithm/decoding", "token trees: SpecInfer, Sequoia, SpecExec", SAME,
        ("speculative_config", "speculative_method"), "wager.serve.speculate.speculator:Speculator",
        (METHODS + "test_greedy_text_is_that_of_plain_decoding", LAW + "test_sampled_texts_have_the_target_law"),
        note="greedy output is identical; sampled output has the same distribution; SpecExec's is identical seed for seed",
        enabled_when=lambda c: any(s.method in ("specinfer", "sequoia", "specexec") for s in c.speculative_config),
    ),
    Feature(
        "speculation_gate", "algorithm/decoding", "speculation switched off by measurement where it does not pay", EXACT,
        ("speculative_config.auto", "speculative_config.disable_by_batch_size"), "wager.serve.speculate.gate:Gate",
        ("tests/serve/speculate/test_drafters.py::test_the_gate_keeps_drafts_that_pay_and_drops_those_that_do_not",),
        enabled_when=lambda c: any(s.auto for s in c.speculative_config),
    ),
    absent("step_speculation", "algorithm/decoding", "step-level speculation for reasoning", LATER),
    absent("lookahead", "algorithm/decoding", "parallel decoding (Jacobi, lookahead)", "draft models cover its use"),
    absent("early_exit", "algorithm/decoding", "early exit and layer skipping", "needs checkpoints trained for it"),
    Feature(
        "thinking_budget", "algorithm/decoding", "bound on the tokens of a reasoning model's thoughts", APPROX,
        ("thinking_token_budget",), "wager.serve.sampling.thinking:ThinkingBudget",
        ("tests/serve/sampling/test_thinking.py::test_thoughts_end_at_the_budget_and_the_answer_goes_on",
         "tests/serve/sampling/test_thinking.py::test_guesses_keep_the_budget"),
        note="per request; the closing tag is forced when the budget is spent",
    ),
    absent("cascade", "algorithm/decoding", "cascade of models by confidence", "a router in front of two servers does it"),
    absent("beam_search", "algorithm/decoding", "beam search", "OpenAI clients have no field for it"),
)  # fmt: skip

ARCHITECTURE = (
    Feature(
        "sliding_window", "algorithm/architecture", "sliding-window layers that release blocks behind the window", EXACT, (),
        "wager.serve.cache.pool:groups_for",
        (BLOCKS + "test_window_layers_give_blocks_back_while_the_sequence_runs", "tests/models/test_families.py::test_family"),
    ),
    Feature(
        "grouped_query", "algorithm/architecture", "grouped-query and multi-query attention", EXACT, (),
        "wager.kernels.registry:paged_attention", (FAMILIES, NATIVE + "test_attention_equals_the_reference"),
    ),
    Feature(
        "latent_attention", "algorithm/architecture", "latent attention (MLA) over a cache of latents", EXACT, (),
        "wager.models.deepseek:LatentAttention",
        (FAMILIES, "tests/serve/cache/test_pool.py::test_layers_group_by_window_and_latent_layers_keep_no_values"),
    ),
    Feature(
        "mixture_of_experts", "algorithm/architecture", "mixtures of experts with grouped expert products", EXACT, (),
        "wager.models.experts:SparseMLP", (FAMILIES, "tests/kernels/test_triton.py::test_experts"),
    ),
    absent("cross_layer_kv", "algorithm/architecture", "KV shared across layers", "none of the model families here does it"),
    absent("sparse_attention", "algorithm/architecture", "dynamic sparse attention", LATER),
    absent("kv_eviction", "algorithm/architecture", "KV eviction and compression", LATER),
    absent("recurrent", "algorithm/architecture", "recurrent and hybrid models (Mamba, RWKV)", "no state cache yet"),
)  # fmt: skip

COMPRESSION = (
    Feature(
        "distilled_drafts", "algorithm/compression", "draft models distilled from their target", SAME, ("speculative_config",),
        "wager.models.demo.train:train", ("tests/serve/speculate/test_boost.py::test_a_second_draft_learns_what_the_first_does_not_foretell",),
        note="`python -m wager.models.demo` trains a pair, `wager speculate` boosted ones",
    ),
    absent("pruning", "algorithm/compression", "pruned weights (unstructured, 2:4, structured)", "no kernel here gains from zeros"),
    absent("low_rank", "algorithm/compression", "low-rank weights", "a checkpoint's factors load as the layers that they are"),
)  # fmt: skip

register(*DECODING, *ARCHITECTURE, *COMPRESSION)
