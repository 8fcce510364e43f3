#pragma once
// The event loop of pipeline.py over plain arrays: same events in the same order, same arithmetic, so the same times to the last bit.
// Routing stays with the planner's own object, called back once per request (and told of iterations before each call, not at each token).
// What it leaves out: machines that join or leave. pipeline.py is the reference; see there for what every step means.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <queue>
#include <vector>

#include "pipeline_state.h"

namespace {

class Pipeline {
 public:
  Pipeline(int32_t nodes, double activation_bytes, bool keep_busy)
      : nodes_(nodes), channels_((nodes + 2) * (nodes + 2)), activation_bytes_(activation_bytes), keep_busy_(keep_busy) {}

  int32_t run(double until_s) {
    while (!heap_.empty() && heap_.top().time_s <= until_s && error_ == kNone) {
      const Event event = heap_.top();
      heap_.pop();
      now_s_ = event.time_s;
      ++events_;
      switch (event.kind) {
        case kArrive: arrive(event.what); break;
        case kDeliver: deliver(event.node, event.what); break;
        case kReturn: returned(event.what); break;
        case kFinish: finish_batch(event.node); break;
      }
    }
    flush();
    return error_;
  }

  void push_arrival(double arrival_s, int32_t prompt, int32_t output, int32_t cached) {
    Record record;
    record.prompt = prompt, record.output = output, record.cached = cached;
    records_.push_back(record);
    at(arrival_s, kArrive, static_cast<int32_t>(records_.size()) - 1, -1);
  }

  std::vector<Node> nodes_;
  std::vector<Channel> channels_;
  std::vector<Record> records_;
  std::vector<Stage> route_buffer_;
  RouteCall route_ = nullptr;
  IteratedCall iterated_ = nullptr;
  EndedCall ended_ = nullptr;
  int32_t error_ = kNone, error_node_ = -1, error_other_ = -1, error_tokens_ = 0;
  int64_t events_ = 0;
  double now_s_ = 0;

  int32_t source() const { return static_cast<int32_t>(nodes_.size()); }
  int32_t sink() const { return static_cast<int32_t>(nodes_.size()) + 1; }

 private:
  std::deque<Flight> flights_;  // never moved, never reused: dead ones may still be under way
  std::vector<int32_t> active_, iterating_;
  std::deque<int32_t> waiting_;
  std::vector<std::vector<int32_t>> messages_;
  std::vector<int32_t> free_messages_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> heap_;
  int64_t sequence_ = 0;
  double activation_bytes_;
  bool keep_busy_, refused_ = false;

  void fail(int32_t error, int32_t node = -1, int32_t other = -1) {
    if (error_ == kNone) error_ = error, error_node_ = node, error_other_ = other;
  }

  void at(double time_s, Kind kind, int32_t what, int32_t node) { heap_.push({time_s, ++sequence_, kind, what, node}); }

  int32_t take_message() {
    if (free_messages_.empty()) {
      messages_.emplace_back();
      return static_cast<int32_t>(messages_.size()) - 1;
    }
    const int32_t message = free_messages_.back();
    free_messages_.pop_back();
    return message;
  }

  void give_message(int32_t message) {
    messages_[message].clear();
    free_messages_.push_back(message);
  }

  // -- requests

  void arrive(int32_t record) {
    waiting_.push_back(record);
    if (!refused_) admit();
  }

  void flush() {
    for (int32_t id : iterating_) {
      Flight& flight = flights_[id];
      if (flight.iterations && !flight.dead && iterated_(flight.record, flight.iterations) != 0) fail(kCallback);
      flight.iterations = 0;
    }
    iterating_.clear();
  }

  void admit() {
    while (!waiting_.empty() && error_ == kNone) {
      const int32_t record = waiting_.front();
      flush();
      const int32_t stages = route_(record, now_s_);
      if (stages < 0) return fail(kCallback);
      refused_ = stages == 0;
      if (refused_) return;
      waiting_.pop_front();
      start(record, stages);
    }
  }

  void start(int32_t index, int32_t stages) {
    Record& record = records_[index];
    const int32_t done = static_cast<int32_t>(record.token_s.size());
    const int32_t cached = record.restarts == 0 ? record.cached : 0;
    const int32_t prompt = record.prompt + (record.cached - cached) + done;
    flights_.emplace_back();
    const int32_t id = static_cast<int32_t>(flights_.size()) - 1;
    Flight& flight = flights_.back();
    flight.record = index, flight.tokens = prompt ? prompt : 1, flight.context = cached;
    flight.path.assign(route_buffer_.begin(), route_buffer_.begin() + stages);
    flight.held.assign(stages, 0);
    if (record.restarts) record.recomputed += prompt;
    if (cached)
      for (int32_t hop = 0; hop < stages; ++hop)
        if (!hold(id, hop, cached)) return;
    if (record.admitted_s < 0) record.admitted_s = now_s_;
    record.stages = stages;
    record.flight = id;
    flight.place = static_cast<int32_t>(active_.size());
    active_.push_back(id);
    const int32_t message = take_message();
    messages_[message].push_back(id);
    send(source(), flight.path[0].node, message, flight.tokens * kTokenBytes);
  }

  void returned(int32_t message) {
    bool ended = false;
    const std::vector<int32_t> ids = messages_[message];
    give_message(message);
    for (int32_t id : ids) {
      Flight& flight = flights_[id];
      if (flight.dead) continue;
      Record& record = records_[flight.record];
      record.token_s.push_back(now_s_);
      flight.context += flight.tokens;
      if (static_cast<int32_t>(record.token_s.size()) >= record.output) {
        end(id);
        ended = true;
        continue;
      }
      flight.hop = 0, flight.tokens = 1;
      if (flight.iterations++ == 0) iterating_.push_back(id);
      const int32_t onward = take_message();
      messages_[onward].push_back(id);
      send(source(), flight.path[0].node, onward, kTokenBytes);
    }
    if (ended) admit();
  }

  void end(int32_t id) {
    Flight& flight = flights_[id];
    if (flight.iterations) {  // what it did counts before it goes
      if (iterated_(flight.record, flight.iterations) != 0) fail(kCallback);
      flight.iterations = 0;
    }
    flight.dead = true;
    refused_ = false;
    for (size_t hop = 0; hop < flight.path.size(); ++hop) {
      const Stage& stage = flight.path[hop];
      Node& node = nodes_[stage.node];
      node.kv_used -= static_cast<int64_t>(flight.held[hop]) * (stage.last - stage.first);
      flight.held[hop] = 0;
      if (node.kv_used < 0) fail(kNegative, stage.node);
    }
    if (flight.place >= 0) {
      active_[flight.place] = active_.back();
      flights_[active_.back()].place = flight.place;
      active_.pop_back();
      flight.place = -1;
      records_[flight.record].flight = -1;
    }
    if (ended_(flight.record) != 0) fail(kCallback);
  }

  void restart(int32_t id) {
    end(id);
    ++records_[flights_[id].record].restarts;
    waiting_.push_front(flights_[id].record);
  }

  // -- KV

  bool hold(int32_t id, int32_t hop, int32_t tokens) {
    Flight& flight = flights_[id];
    const int32_t wanted = (tokens + kBlockTokens - 1) / kBlockTokens, missing = wanted - flight.held[hop];
    if (missing <= 0) return true;
    const Stage stage = flight.path[hop];
    Node& node = nodes_[stage.node];
    const int64_t layers = stage.last - stage.first, need = missing * layers;
    while (node.kv_used + need > node.capacity()) {
      int32_t victim = -1, holders = 0;
      for (int32_t other : active_)
        if (holds(flights_[other], stage.node)) {
          ++holders;
          if (victim < 0 || younger(other, victim)) victim = other;
        }
      if (victim < 0 || victim == id) {
        if (holders <= 1 && wanted * layers > node.capacity()) {
          fail(kNoRoom, stage.node, flight.record);
          error_tokens_ = tokens;
          return false;
        }
        restart(id);
        return false;
      }
      restart(victim);
      if (error_ != kNone) return false;
    }
    node.kv_used += need;
    node.kv_peak = std::max(node.kv_peak, node.kv_used);
    flight.held[hop] = wanted;
    return true;
  }

  static bool holds(const Flight& flight, int32_t node) {
    for (size_t hop = 0; hop < flight.path.size(); ++hop)
      if (flight.path[hop].node == node && flight.held[hop]) return true;
    return false;
  }

  bool younger(int32_t a, int32_t b) const {
    const Record &one = records_[flights_[a].record], &other = records_[flights_[b].record];
    if (one.admitted_s != other.admitted_s) return one.admitted_s > other.admitted_s;
    return flights_[a].record > flights_[b].record;
  }

  // -- machines

  void deliver(int32_t node, int32_t message) {
    for (int32_t id : messages_[message]) nodes_[node].queue.push_back(id);
    give_message(message);
    if (!nodes_[node].running) form_batch(node);
  }

  struct Size {
    int64_t prompts = 0, prompt_tokens = 0, decodes = 0;
    bool whole = true;  // every request passes through all layers of the node
    void add(int32_t tokens) { tokens == 1 ? ++decodes : (++prompts, prompt_tokens += tokens); }
  };

  void form_batch(int32_t index) {
    Node& node = nodes_[index];
    const Size size = fill_batch(node);
    if (node.batch.empty()) return;
    const double seconds = batch_s(node, size);
    node.running = true;
    ++node.batches;
    node.busy_s += seconds;
    if (keep_busy_) node.busy.push_back({now_s_, now_s_ + seconds, static_cast<int32_t>(node.batch.size())});
    at(now_s_ + seconds, kFinish, 0, index);
  }

  // Takes from the queue what fits; a request that restarts because another one took its blocks falls out again.
  Size fill_batch(Node& node) {
    node.batch.clear();
    Size size;
    while (!node.queue.empty() && error_ == kNone) {
      const int32_t id = node.queue.front();
      Flight& flight = flights_[id];
      if (flight.dead) {
        node.queue.pop_front();
        continue;
      }
      const int32_t tokens = flight.tokens;
      if (tokens == 1) {
        if (size.decodes >= node.max_decodes) break;
      } else if (size.prompts && (size.prompts >= node.max_prompt_requests || size.prompt_tokens + tokens > node.max_prompt_tokens)) {
        break;
      }
      node.queue.pop_front();
      const int32_t context = flight.context + tokens;
      if (flight.held[flight.hop] * kBlockTokens < context && !hold(id, flight.hop, context)) continue;
      size.add(tokens);
      const Stage& stage = flight.path[flight.hop];
      size.whole = size.whole && stage.first == node.first && stage.last == node.last;
      node.batch.push_back(id);
    }
    const auto fallen = std::remove_if(node.batch.begin(), node.batch.end(), [&](int32_t id) { return flights_[id].dead; });
    if (fallen == node.batch.end()) return size;
    node.batch.erase(fallen, node.batch.end());
    Size left;
    left.whole = size.whole;
    for (int32_t id : node.batch) left.add(flights_[id].tokens);
    return left;
  }

  std::vector<int32_t> cuts_;

  double batch_s(const Node& node, const Size& size) {
    const double overhead = product(node.overhead_s_per_token, static_cast<double>(size.prompt_tokens + size.decodes));
    if (size.whole)
      return overhead + product(node.last - node.first, look_up(node.prompt_s, size.prompt_tokens) + look_up(node.decode_s, size.decodes));
    cuts_.clear();
    for (int32_t id : node.batch) {
      const Stage& stage = flights_[id].path[flights_[id].hop];
      cuts_.push_back(stage.first);
      cuts_.push_back(stage.last);
    }
    std::sort(cuts_.begin(), cuts_.end());
    cuts_.erase(std::unique(cuts_.begin(), cuts_.end()), cuts_.end());
    double seconds = overhead;
    for (size_t cut = 0; cut + 1 < cuts_.size(); ++cut) {
      int64_t prompts = 0, ones = 0;
      bool any = false;
      for (int32_t id : node.batch) {
        const Flight& flight = flights_[id];
        const Stage& stage = flight.path[flight.hop];
        if (stage.first > cuts_[cut] || cuts_[cut] >= stage.last) continue;
        any = true;
        flight.tokens == 1 ? ++ones : prompts += flight.tokens;
      }
      if (any) seconds += product(cuts_[cut + 1] - cuts_[cut], look_up(node.prompt_s, prompts) + look_up(node.decode_s, ones));
    }
    return seconds;
  }

  struct Onward {
    int32_t target, message;
    double bytes;
  };
  std::vector<Onward> onward_;

  void finish_batch(int32_t index) {
    Node& node = nodes_[index];
    node.running = false;
    onward_.clear();
    for (int32_t id : node.batch) {
      Flight& flight = flights_[id];
      if (flight.dead) continue;
      ++flight.hop;
      const bool last = flight.hop == static_cast<int32_t>(flight.path.size());
      const int32_t target = last ? sink() : flight.path[flight.hop].node;
      const double bytes = last ? kTokenBytes : product(flight.tokens, activation_bytes_);
      auto way = std::find_if(onward_.begin(), onward_.end(), [&](const Onward& o) { return o.target == target; });
      if (way == onward_.end()) {
        onward_.push_back({target, take_message(), bytes});
        way = onward_.end() - 1;
      } else {
        way->bytes += bytes;
      }
      messages_[way->message].push_back(id);
    }
    for (const Onward& o : onward_) send(index, o.target, o.message, o.bytes);
    if (!node.queue.empty()) form_batch(index);
  }

  void send(int32_t start, int32_t end, int32_t message, double bytes) {
    Channel& channel = channels_[start * (static_cast<int32_t>(nodes_.size()) + 2) + end];
    if (channel.bytes_per_s <= 0) return fail(kNoLink, start, end);
    const double begun = now_s_ > channel.free_s ? now_s_ : channel.free_s;
    channel.free_s = begun + bytes / channel.bytes_per_s;
    const bool home = end == sink();
    at(channel.free_s + channel.latency_s, home ? kReturn : kDeliver, message, home ? -1 : end);
  }
};

}  // namespace
