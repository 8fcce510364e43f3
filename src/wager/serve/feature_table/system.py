"""The system: quantization, parallelism, memory, scheduling, kernels."""

from __future__ import annotations

from wager.serve.feature_table.terms import (
    APPROX,
    BLOCKS,
    DEPLOY,
    ENGINE,
    EXACT,
    LATER,
    LOADER,
    LORA,
    NATIVE,
    SCHEDULER,
    absent,
)
from wager.serve.features import Feature, register

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

register(*QUANTIZATION, *PARALLEL, *MEMORY, *SCHEDULING, *KERNELS)
