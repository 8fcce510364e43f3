// The C interface of the event loop in pipeline.h.
#include <cstdint>

#include "pipeline.h"

extern "C" {

void* wager_pipeline_new(int32_t nodes, double activation_bytes, int32_t keep_busy) {
  return new Pipeline(nodes, activation_bytes, keep_busy != 0);
}

void wager_pipeline_free(void* handle) { delete static_cast<Pipeline*>(handle); }

// limits: first, last, max_prompt_requests, max_prompt_tokens, max_decodes, kv_blocks, entries of prompt_s, entries of decode_s
void wager_pipeline_node(void* handle, int32_t index, const int64_t* limits, double overhead_s_per_token, const double* prompt_s, const double* decode_s) {
  Node& node = static_cast<Pipeline*>(handle)->nodes_[index];
  node.first = limits[0], node.last = limits[1], node.max_prompt_requests = limits[2], node.max_prompt_tokens = limits[3];
  node.max_decodes = limits[4], node.kv_blocks = limits[5], node.overhead_s_per_token = overhead_s_per_token;
  node.prompt_s.assign(prompt_s, prompt_s + limits[6]);
  node.decode_s.assign(decode_s, decode_s + limits[7]);
}

// [(nodes + 2)^2] by start, then end; the coordinator comes after the nodes: source, sink. bytes_per_s 0: no link
void wager_pipeline_links(void* handle, const double* bytes_per_s, const double* latency_s) {
  auto& channels = static_cast<Pipeline*>(handle)->channels_;
  for (size_t i = 0; i < channels.size(); ++i) channels[i] = {bytes_per_s[i], latency_s[i], 0};
}

void wager_pipeline_arrivals(void* handle, int32_t count, const double* arrival_s, const int32_t* prompt, const int32_t* output, const int32_t* cached) {
  for (int32_t i = 0; i < count; ++i) static_cast<Pipeline*>(handle)->push_arrival(arrival_s[i], prompt[i], output[i], cached[i]);
}

void wager_pipeline_router(void* handle, int32_t most_stages, RouteCall route, IteratedCall iterated, EndedCall ended) {
  auto* p = static_cast<Pipeline*>(handle);
  p->route_buffer_.resize(most_stages);
  p->route_ = route, p->iterated_ = iterated, p->ended_ = ended;
}

int32_t* wager_pipeline_route_buffer(void* handle) { return &static_cast<Pipeline*>(handle)->route_buffer_.data()->node; }

// why: node, other node or record, tokens
int32_t wager_pipeline_run(void* handle, double until_s, int32_t* why) {
  auto* p = static_cast<Pipeline*>(handle);
  const int32_t error = p->run(until_s);
  why[0] = p->error_node_, why[1] = p->error_other_, why[2] = p->error_tokens_;
  return error;
}

double wager_pipeline_now(void* handle) { return static_cast<Pipeline*>(handle)->now_s_; }
int64_t wager_pipeline_events(void* handle) { return static_cast<Pipeline*>(handle)->events_; }

// counts: tokens out, restarts, recomputed tokens, stages. Returns when it was admitted, -1 when it was not
double wager_pipeline_record(void* handle, int32_t index, int32_t* counts) {
  const Record& record = static_cast<Pipeline*>(handle)->records_[index];
  counts[0] = static_cast<int32_t>(record.token_s.size()), counts[1] = record.restarts, counts[2] = record.recomputed, counts[3] = record.stages;
  return record.admitted_s;
}

const double* wager_pipeline_tokens(void* handle, int32_t index) { return static_cast<Pipeline*>(handle)->records_[index].token_s.data(); }

// counts: waiting, in the running batch (-1 when idle), batches, KV used, KV peak, busy spans. Returns seconds busy
double wager_pipeline_live(void* handle, int32_t index, int64_t* counts) {
  const Node& node = static_cast<Pipeline*>(handle)->nodes_[index];
  counts[0] = node.queue.size(), counts[1] = node.running ? static_cast<int64_t>(node.batch.size()) : -1;
  counts[2] = node.batches, counts[3] = node.kv_used, counts[4] = node.kv_peak, counts[5] = node.busy.size();
  return node.busy_s;
}

void wager_pipeline_busy(void* handle, int32_t index, double* start_s, double* end_s, int32_t* requests) {
  for (const Busy& span : static_cast<Pipeline*>(handle)->nodes_[index].busy)
    *start_s++ = span.start_s, *end_s++ = span.end_s, *requests++ = span.requests;
}

}  // extern "C"
