"""The service: what callers ask of generation and operation."""

from __future__ import annotations

from wager.serve.feature_table.terms import (
    ASYNC,
    CLIENT,
    DETOKENIZE,
    ENGINE,
    EXACT,
    NATIVE,
    NONE,
    SAMPLER,
    TEMPLATE,
    TOOLS,
    absent,
)
from wager.serve.features import Feature, register

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

register(*GENERATION, *OPERATION)
