#pragma once
// What the event loop of pipeline.h keeps: events, requests and their flights, machines, links.
#include <cstdint>
#include <deque>
#include <vector>

namespace {

constexpr int kBlockTokens = 16;
constexpr double kTokenBytes = 2;

enum Error : int32_t { kNone = 0, kNoLink = 1, kNoRoom = 2, kNegative = 3, kCallback = 4 };
enum Kind : int32_t { kArrive, kDeliver, kReturn, kFinish };

using RouteCall = int32_t (*)(int32_t record, double now_s);  // stages written to the caller's buffer; 0 to wait, -1 on an exception
using IteratedCall = int32_t (*)(int32_t record, int32_t tokens);
using EndedCall = int32_t (*)(int32_t record);

struct Event {
  double time_s;
  int64_t sequence;
  int32_t kind, what, node;
  bool operator>(const Event& other) const {
    return time_s != other.time_s ? time_s > other.time_s : sequence > other.sequence;
  }
};

struct Stage {
  int32_t node, first, last;
};

struct Flight {
  int32_t record, hop = 0, tokens = 0, context = 0, iterations = 0, place = -1;
  bool dead = false;
  std::vector<Stage> path;
  std::vector<int32_t> held;  // blocks per layer
};

struct Record {
  double admitted_s = -1;
  int32_t prompt, output, cached, restarts = 0, recomputed = 0, stages = 0, flight = -1;
  std::vector<double> token_s;
};

struct Busy {
  double start_s, end_s;
  int32_t requests;
};

struct Node {
  int32_t first, last, max_prompt_requests, max_prompt_tokens, max_decodes;
  int64_t kv_blocks;
  double overhead_s_per_token;
  std::vector<double> prompt_s, decode_s;
  std::deque<int32_t> queue;
  std::vector<int32_t> batch;
  bool running = false;
  int64_t kv_used = 0, kv_peak = 0, batches = 0;
  double busy_s = 0;
  std::vector<Busy> busy;
  int64_t capacity() const { return kv_blocks * (last - first); }
};

struct Channel {
  double bytes_per_s = 0, latency_s = 0, free_s = 0;
};

// Rounds before it is added to anything: a compiler may fuse a product and a sum, the reference does not.
__attribute__((noinline)) double product(double a, double b) { return a * b; }

double look_up(const std::vector<double>& table, int64_t size) {
  const int64_t last = static_cast<int64_t>(table.size()) - 1;
  if (size <= last) return table[size];
  return table[last] + product(table[last] - table[last - 1], static_cast<double>(size - last));
}

}  // namespace
