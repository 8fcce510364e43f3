"""The rows of the feature registry, in the order of the survey's taxonomy (arXiv 2312.15234), then what servers are expected to have.

A row with an implementation is a claim that tests check. A row without one says why the engine does not have it.
"""

from __future__ import annotations

from wager.serve.features import Exactness, Feature, register

EXACT, SAME, APPROX, NONE = Exactness.EXACT, Exactness.DISTRIBUTION, Exactness.APPROXIMATE, Exactness.NONE

ENGINE = "tests/serve/test_engine.py::"
ASYNC = "tests/serve/test_async_llm.py::"
RUNNER = "tests/serve/test_runner.py::"
BLOCKS = "tests/serve/cache/test_block_manager.py::"
SCHEDULER = "tests/serve/schedule/test_continuous.py::"
SAMPLER = "tests/serve/sampling/test_sampler.py::"
GRAMMAR = "tests/serve/sampling/test_grammar.py::"
VERIFY = "tests/serve/speculate/test_verify.py::"
DETOKENIZE = "tests/serve/text/test_detokenize.py::"
TEMPLATE = "tests/serve/text/test_chat_template.py::"
LOADER = "tests/models/test_loader.py::"
LORA = "tests/serve/test_lora.py::"
LATER = "to come as a system of its own, see `wager systems`"
TOOLS = "tests/serve/text/test_tools.py::"
CLIENT = "tests/serve/http/test_openai_client.py::"
FAMILIES = "tests/models/test_families.py::test_family"
DEPLOY = "tests/cluster/deploy/"
NATIVE = "tests/kernels/test_native.py::"
METHODS = "tests/serve/speculate/test_methods.py::"
LAW = "tests/serve/speculate/test_law.py::"
SUFFIX = "tests/serve/speculate/test_suffix_tree.py::"


def absent(id_: str, branch: str, title: str, why: str) -> Feature:
    return Feature(id_, branch, title, note=why)


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

QUANTIZED = (
    "tests/kernels/test_quantized.py::test_equals_its_definition",
    "tests/kernels/test_quantized.py::test_error_of_normal_weights_is_what_the_bits_allow",
    "tests/kernels/test_quantized_engine.py::test_a_quantized_engine",
)
QUANTIZATION = (
    Feature(
        "weight_quantization", "system/quantization", "weight-only int8, int4 and NF4, rounded while loading", APPROX, ("quantization",),
        "wager.kernels.quantize:quantize", QUANTIZED, ("benchmarks/kernels/perplexity.py",),
        note="int8 per output channel, int4 and nf4 per group of inputs; the head too",
        enabled_when=lambda c: c.quantization in ("int8", "int4", "nf4"),
    ),
    Feature(
        "quantized_checkpoints", "system/quantization", "GPTQ, AWQ and GGUF files served with the codes they hold", EXACT, (),
        "wager.models.formats.packed_ints:PackedCheckpoint",
        ("tests/models/formats/test_gguf.py::test_models_answer_as_with_the_same_weights_in_float32",
         "tests/models/formats/test_gguf.py::test_quantised_files_stay_quantised",
         "tests/models/formats/test_packed_ints.py::test_answers_as_the_float_weights_it_stands_for"),
        note="Q4_K and Q6_K blocks are rounded once to the nearest form that has a kernel, which one line says",
    ),
    Feature(
        "half_precision", "system/quantization", "bfloat16 and float16 weights and cache", EXACT, ("dtype",),
        "wager.serve.config:EngineConfig.dtype",
        (LOADER + "test_half_precision_serves_what_float32_does_within_rounding", LOADER + "test_dtype_is_the_checkpoints_or_the_callers"),
        note="the checkpoint's own precision unless dtype says otherwise",
    ),
    Feature(
        "kv_quantization", "system/quantization", "keys and values in float8 (e4m3)", APPROX, ("kv_cache_dtype",),
        "wager.serve.build:kv_dtype",
        (NATIVE + "test_float8_codes_are_those_of_torch", NATIVE + "test_attention_equals_the_reference",
         ENGINE + "test_a_float8_cache_holds_twice_as_much_and_stays_near"),
        enabled_when=lambda c: c.kv_cache_dtype == "fp8",
    ),
    Feature(
        "w8a8", "system/quantization", "int8 activations (w8a8, w4a8), bfloat16 (w16a16) and int16 ones", APPROX, ("quantization",),
        "wager.kernels.quantize:round_activations", QUANTIZED, note="int8 values with a scale per group of inputs; no fp8",
        enabled_when=lambda c: c.quantization in ("w8a8", "w4a8", "w16a16", "int16"),
    ),
)  # fmt: skip

PARALLEL = (
    Feature(
        "tensor_parallel", "system/parallelism", "a model divided over processes by heads and MLP columns (gloo)", EXACT,
        ("tensor_parallel_size",), "wager.serve.parallel.tensor:TensorParallelRunner",
        ("tests/serve/parallel/test_tensor.py::test_two_processes_generate_the_same_tokens_with_and_without_trees",
         "tests/serve/parallel/test_tensor.py::test_slices_add_up_to_the_model"),
        note="greedy tokens are identical up to the order of additions",
        enabled_when=lambda c: c.tensor_parallel_size > 1,
    ),
    Feature(
        "pipeline_parallel", "system/parallelism", "a model divided over processes by layers, with micro-batches", EXACT, (),
        "wager.serve.parallel.pipeline:PipelineRunner",
        ("tests/serve/parallel/test_stage.py::test_a_chain_of_stages_is_the_model", DEPLOY + "test_recovery.py::test_stages_generate_what_one_process_does"),
        ("benchmarks/cluster/deploy.py",), note="`wager deploy` runs it; lost stages are replaced",
    ),
    Feature(
        "data_parallel", "system/parallelism", "replicas behind a router that follows the plan's weights", EXACT, (),
        "wager.cluster.deploy.router:RoutedLLM", (DEPLOY + "test_deploy_plan.py::test_weighted_choice_converges_to_the_weights",
         DEPLOY + "test_deploy_server.py::test_serves_through_a_kill_and_drains"), note="`wager deploy`",
    ),
    absent("context_parallel", "system/parallelism", "sequence and context parallelism", "long prompts are chunked instead"),
    absent("expert_parallel", "system/parallelism", "expert parallelism", LATER),
    absent("disaggregation", "system/parallelism", "prefill and decode on separate machines", LATER),
)  # fmt: skip

MEMORY = (
    Feature(
        "paged_kv", "system/memory", "paged KV cache with reference counts", EXACT, ("block_size", "kv_cache_memory"),
        "wager.serve.cache.block_manager:BlockManager",
        (ENGINE + "test_scheduling_never_changes_greedy_tokens", ENGINE + "test_random_aborts_leak_nothing_and_disturb_nobody"),
    ),
    Feature(
        "prefix_cache", "system/memory", "prefix reuse by hash-chained blocks", EXACT,
        ("enable_prefix_caching", "cache_salt"), "wager.serve.cache.block_manager:BlockManager",
        (ENGINE + "test_prefix_cache_serves_a_second_turn", BLOCKS + "test_without_pressure_the_longest_common_prefix_is_found",
         BLOCKS + "test_eviction_takes_the_least_recently_released_and_tails_before_heads"),
        note="requests with prompt_logprobs or a pooled embedding compute every position and share with nobody",
        enabled_when=lambda c: c.enable_prefix_caching,
    ),
    Feature(
        "fork", "system/memory", "copy-on-write fork and truncate", EXACT, (), "wager.serve.cache.block_manager:BlockManager.fork",
        (ENGINE + "test_n_continuations_are_independent_and_share_the_prompt", BLOCKS + "test_a_forked_tail_is_copied_once_and_only_when_written"),
    ),
    Feature(
        "lora", "system/memory", "LoRA adapters per request, loaded and unloaded at run time", EXACT,
        ("max_loras", "lora_modules"), "wager.serve.lora:AdapterBatch",
        (LORA + "test_logprobs_equal_pefts_merged_model", LORA + "test_different_adapters_and_none_share_a_batch",
         LORA + "test_loading_and_unloading_while_requests_run"),
    ),
    Feature(
        "weight_offload", "system/memory", "layers streamed from disk through a ring of buffers", EXACT,
        ("offload_memory", "offload_layers", "offload_file", "offload_bytes_per_s"), "wager.serve.offload:LayerRing",
        ("tests/serve/test_offload.py::test_streamed_layers_compute_the_same_bits",),
        enabled_when=lambda c: c.offloads,
    ),
    Feature(
        "mmap_loading", "system/memory", "streamed loading of sharded checkpoints", EXACT, (), "wager.models.loader:load_model",
        (LOADER + "test_tensors_are_mapped_and_streamed", LOADER + "test_shards_load_as_the_whole_does"),
    ),
    Feature(
        "kv_transfer", "system/memory", "export and import of a sequence's KV blocks between engines, by memory or file", EXACT, (),
        "wager.serve.cache.pool:KVPool.export",
        ("tests/serve/cache/test_pool.py::test_export_and_import_carry_a_sequence_between_pools",
         "tests/serve/cache/test_pool.py::test_an_export_is_a_copy_and_survives_a_file"),
    ),
    Feature(
        "kv_offload", "system/memory", "cached blocks that the KV pools give up are kept in the host's memory", EXACT,
        ("kv_offload_memory",), "wager.serve.cache.block_pool:HostTier",
        (ENGINE + "test_evicted_blocks_come_back_from_the_host", BLOCKS + "test_host_memory_keeps_what_is_evicted_until_it_is_full_itself",
         "tests/serve/cache/test_pool.py::test_blocks_go_behind_the_pool_and_come_back"),
        note="preempted requests resume from there too: preemption by swapping",
        enabled_when=lambda c: c.kv_offload_memory is not None,
    ),
    absent("kv_remote", "system/memory", "KV offload to disk or remote machines", "blocks can be exported to a file; no tier keeps them there"),
    absent("sleep", "system/memory", "sleep, wake and swapping of weights at run time", "a server holds one model from start to end"),
    absent("expert_offload", "system/memory", "experts of a mixture streamed one by one", "whole layers are streamed, with all their experts"),
)  # fmt: skip

SCHEDULING = (
    Feature(
        "continuous_batching", "system/scheduling", "continuous batching", EXACT, ("max_num_seqs", "max_queue"),
        "wager.serve.schedule.continuous:ContinuousScheduler",
        (ENGINE + "test_scheduling_never_changes_greedy_tokens", SCHEDULER + "test_every_request_completes_within_limits_under_any_load"),
    ),
    Feature(
        "chunked_prefill", "system/scheduling", "chunked prefill mixed with decodes", EXACT,
        ("max_num_batched_tokens", "long_prefill_threshold"), "wager.serve.schedule.continuous:ContinuousScheduler",
        (ENGINE + "test_scheduling_never_changes_greedy_tokens", SCHEDULER + "test_decodes_go_on_while_a_long_prompt_is_chunked"),
    ),
    Feature(
        "preemption", "system/scheduling", "preemption by recompute", EXACT, (),
        "wager.serve.schedule.continuous:ContinuousScheduler",
        (ENGINE + "test_preemption_happens_and_resumes", SCHEDULER + "test_the_latest_is_preempted_recomputed_and_first_in_line_again"),
    ),
    Feature(
        "deadline", "system/scheduling", "the request whose deadline comes first runs first", EXACT, ("scheduling_policy", "deadline_ms"),
        "wager.serve.schedule.continuous:ContinuousScheduler",
        (SCHEDULER + "test_the_earliest_deadline_runs_first_and_is_preempted_last",),
        enabled_when=lambda c: c.scheduling_policy == "deadline",
    ),
    Feature(
        "priority", "system/scheduling", "priority scheduling", EXACT, ("scheduling_policy", "priority"),
        "wager.serve.schedule.continuous:ContinuousScheduler",
        (SCHEDULER + "test_lower_priority_values_run_first_and_ties_by_arrival", SCHEDULER + "test_priority_decides_who_is_preempted",
         SCHEDULER + "test_low_priority_does_not_starve"),
    ),
    Feature(
        "longest_prefix", "system/scheduling", "requests with the longest cached prefix first, with bounded waits", EXACT, ("scheduling_policy",),
        "wager.serve.schedule.continuous:ContinuousScheduler",
        (SCHEDULER + "test_longest_prefix_first_prefers_what_is_cached_and_waits_are_bounded",),
        enabled_when=lambda c: c.scheduling_policy == "longest-prefix",
    ),
    absent("length_prediction", "system/scheduling", "admission by predicted output length",
           "a watermark of free blocks and preemption take its place"),
    absent("slo_scheduling", "system/scheduling", "scheduling by latency targets", LATER),
    absent("co_serving", "system/scheduling", "co-serving with finetuning", LATER),
    absent("overlap_scheduling", "system/scheduling", "scheduling the next step while one runs",
           "scheduling takes well under a millisecond; nothing to hide on a CPU"),
)  # fmt: skip

KERNELS = (
    Feature(
        "ragged_batches", "system/kernels", "variable-length packing without padding", EXACT, (), "wager.serve.runner:ModelRunner",
        (ENGINE + "test_scheduling_never_changes_greedy_tokens",),
    ),
    Feature(
        "fused_operators", "system/kernels", "fused operators: qkv, rope with the cache write, norm with the residual, gate with its product",
        EXACT, (), "wager.kernels.registry:rope_write",
        ("tests/kernels/test_fused.py::test_block_input", "tests/kernels/test_fused.py::test_block_output"),
        ("benchmarks/kernels/operators.py",),
    ),
    Feature(
        "tailored_attention", "system/kernels", "paged attention with long contexts split over the threads", EXACT, (),
        "wager.kernels.registry:paged_attention",
        (NATIVE + "test_long_contexts_are_cut_and_combined", "tests/kernels/test_triton.py::test_long_contexts_are_cut_and_combined"), ("benchmarks/kernels/attention.py",),
    ),
    Feature(
        "graph_capture", "system/kernels", "CUDA graphs per number of tokens for decode steps", EXACT, (), "wager.serve.graphs:DecodeGraphs",
        ("tests/serve/test_graphs.py::test_recordings_are_made_once_a_bucket_and_replays_see_new_values",
         "tests/serve/test_graphs.py::test_the_engine_writes_the_same_tokens_through_recordings",
         "tests/serve/test_graphs.py::test_the_model_gives_the_same_hidden_rows"), note="on GPUs; steps on a CPU launch nothing",
    ),
    Feature(
        "dummy_weights", "system/kernels", "random weights of a config.json's shapes, to measure speed without a checkpoint", EXACT,
        ("load_format",), "wager.models.dummy:dummy_model",
        ("tests/models/test_dummy.py::test_only_the_config_is_read_and_the_numbers_are_the_same_every_time",
         "tests/models/test_dummy.py::test_the_engine_serves_it"),
        note="the same numbers every time; what such a model writes means nothing",
        enabled_when=lambda c: c.load_format == "dummy",
    ),
)  # fmt: skip

GENERATION = (
    Feature(
        "sampling", "service/generation", "temperature, top-p, top-k, min-p, penalties, bias, bad words, allowed tokens", EXACT,
        ("temperature", "top_p", "top_k", "min_p", "logit_bias"), "wager.serve.sampling.sampler:Sampler",
        (SAMPLER + "test_samples_follow_the_reference_distribution", SAMPLER + "test_distributions_equal_the_reference_row_by_row"),
    ),
    Feature(
        "seeds", "service/generation", "reproducible samples per request, whatever else is in the batch", EXACT, ("seed",),
        "wager.serve.sampling.sampler:Sampler",
        (ENGINE + "test_seeded_samples_do_not_depend_on_the_batch",
         SAMPLER + "test_a_seeded_request_draws_the_same_whatever_else_is_in_the_batch"),
    ),
    Feature(
        "logprobs", "service/generation", "logprobs and prompt logprobs", EXACT, ("logprobs", "prompt_logprobs"),
        "wager.serve.params:SamplingParams.prompt_logprobs",
        (ENGINE + "test_logprobs_equal_teacher_forcing", ENGINE + "test_echo_loglikelihood_needs_no_output"),
    ),
    Feature(
        "stop_strings", "service/generation", "stop strings and stop tokens", EXACT, ("stop", "stop_token_ids"),
        "wager.serve.params:SamplingParams.stop",
        (ENGINE + "test_stop_strings_and_stop_tokens", DETOKENIZE + "test_stop_strings_across_token_borders_never_leak"),
    ),
    Feature(
        "embeddings", "service/generation", "embeddings from the last hidden states", EXACT, ("pooling",),
        "wager.serve.llm:LLM.embed", (ENGINE + "test_embeddings_are_the_normalised_mean_of_hidden_states",),
    ),
    Feature(
        "streaming", "service/generation", "streaming deltas that add up to the whole text", EXACT, ("stream",),
        "wager.serve.llm:AsyncLLM.generate", (ASYNC + "test_deltas_concatenate_to_the_final_text", ASYNC + "test_many_streams_do_not_mix",
         DETOKENIZE + "test_pieces_of_any_text_add_up"),
    ),
    Feature(
        "tools", "service/generation", "tool calls: auto, required, named; hermes, qwen, llama3, mistral and pythonic formats", EXACT,
        ("tools", "tool_choice"), "wager.serve.text.tools:tool_stream",
        (TOOLS + "test_every_cut_gives_the_same", CLIENT + "test_forced_tools_whole_and_streamed"),
    ),
    Feature(
        "reasoning", "service/generation", "thoughts split from answers", EXACT, ("reasoning_parser",),
        "wager.serve.text.reasoning:ReasoningStream", (TOOLS + "test_reasoning_splits_the_same_at_every_cut",),
    ),
    Feature(
        "responses", "service/generation", "the Responses API, converted to chat", EXACT, (), "wager.serve.http.responses:router",
        (CLIENT + "test_responses_whole_and_streamed", CLIENT + "test_responses_with_tools_and_formats"),
    ),
    Feature(
        "batch_invariance", "service/generation", "the same bits whatever else is in the batch, with the native kernels", EXACT, (),
        "wager.kernels.registry:paged_attention",
        (NATIVE + "test_a_linear_row_does_not_depend_on_the_batch", NATIVE + "test_a_query_does_not_depend_on_its_chunk",
         ENGINE + "test_logprobs_have_the_same_bits_in_any_batch"),
        note="not with the torch reference (`WAGER_KERNELS=reference`) nor on GPUs, where near-ties may flip with the batch",
    ),
    absent("multimodal", "service/generation", "image, audio and video input", "text models only"),
)  # fmt: skip

OPERATION = (
    Feature(
        "cancellation", "service/operation", "cancellation frees a request's cache", EXACT, (), "wager.serve.llm:AsyncLLM.abort",
        (ASYNC + "test_closing_a_stream_frees_its_blocks",),
    ),
    Feature(
        "admission", "service/operation", "bounded queue, refusal with Retry-After", NONE, ("max_queue",),
        "wager.errors:CapacityError", (ASYNC + "test_full_queue_is_refused_and_loses_nothing",),
    ),
    Feature(
        "drain", "service/operation", "graceful drain at shutdown", NONE, (), "wager.serve.llm:AsyncLLM.shutdown",
        (ASYNC + "test_shutdown_drains_then_refuses",),
    ),
    Feature(
        "token_id_io", "service/operation", "token ids in and out, without a tokenizer", EXACT, ("skip_tokenizer_init",),
        "wager.serve.config:EngineConfig.skip_tokenizer_init", (ENGINE + "test_bad_requests_name_the_value",),
        enabled_when=lambda c: c.skip_tokenizer_init,
    ),
    Feature(
        "chat_template", "service/operation", "a chat template of the user's own", EXACT, ("chat_template",),
        "wager.serve.text.tokenizer:Tokenizer",
        (TEMPLATE + "test_a_template_of_the_users_own_serves", TEMPLATE + "test_renders_what_transformers_renders",
         TEMPLATE + "test_the_sandbox_refuses_tricks_and_failures_are_the_callers"),
        enabled_when=lambda c: c.chat_template is not None,
        conflicts=(("token_id_io", "rendering a conversation needs the tokenizer"),),
    ),
)  # fmt: skip

for rows in (
    DECODING,
    ARCHITECTURE,
    COMPRESSION,
    QUANTIZATION,
    PARALLEL,
    MEMORY,
    SCHEDULING,
    KERNELS,
    GENERATION,
    OPERATION,
):
    register(*rows)
