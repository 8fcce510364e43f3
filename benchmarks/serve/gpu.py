"""The engine on a GPU: a model of 8 B parameters (Llama 3's shapes, random bfloat16 weights) against its roofline and against transformers.

    python -m benchmarks.serve.gpu [--quick] [--sections correct,single,profile,batch,quantized,compiled]

correct: a small Llama, greedy tokens of the engine equal to those of transformers on the same device, float32; agreement in bfloat16.
single: one request, 128 tokens in and 128 out. ms per token between the first and the last token, against the roofline: bytes that a token
must read (every packed weight, the norms, one row of the embedding, the keys and values of the mean context) over the bandwidth of a device
copy (bytes read plus written) measured in the same rounds; and the whole request against `transformers` generate with its defaults (SDPA).
profile: what the step's time is made of. batch: 64 requests at once, tokens per second. quantized: single with int8 and int4 weights.
compiled: transformers with a static cache, which compiles itself; not among the defaults, for compiling takes a minute.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import copy_contender, device_tag, run_sections
from benchmarks.harness import RESULTS, Report, Row, arguments, compare, say, write_atomically

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QUICK = {**LLAMA_3_8B, "num_hidden_layers": 4, "vocab_size": 32000}
SMALL = {**LLAMA_3_8B, "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "torch_dtype": "float32"}  # fmt: skip


class Bench:
    def __init__(self, quick: bool, repeats: int, report: Report, folder: Path):
        self.quick, self.repeats, self.report, self.folder = quick, repeats, report, folder
        self.config = QUICK if quick else LLAMA_3_8B
        self.tokens = 32 if quick else 128
        self.many = 8 if quick else 64
        self.steps: list[Any] = []
        self.engine: Any = None
        self.peer: Any = None

    # -- the two engines ---------------------------------------------------------------------------------------------------------

    def ours(self) -> Any:
        if self.engine is None:
            begun = time.perf_counter()
            self.engine = self.build(None)
            torch.cuda.synchronize()
            self.report.facts["load_s"] = time.perf_counter() - begun
            say(f"engine built in {self.report.facts['load_s']:.1f} s")
        return self.engine

    def build(self, quantization: str | None) -> Any:
        from wager import LLM

        directory = self.folder / "shape"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        return LLM(
            str(directory), load_format="dummy", dtype="bfloat16", device="cuda", skip_tokenizer_init=True, max_model_len=2048,
            max_num_seqs=self.many, kv_cache_memory=3_000_000_000, enable_prefix_caching=False, quantization=quantization,
            observers=[self],
        )  # fmt: skip

    def on_step(self, record: Any) -> None:
        self.steps.append(record)

    def on_tokens(self, request: Any, num_new_tokens: int, now_s: float) -> None: ...

    def on_finished(self, request: Any) -> None: ...

    def transformers(self) -> Any:
        if self.peer is None:
            begun = time.perf_counter()
            self.peer = transformers_model(self.config, torch.bfloat16)
            torch.cuda.synchronize()
            say(f"transformers model built in {time.perf_counter() - begun:.1f} s")
        return self.peer

    def prompts(self, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(5, self.config["vocab_size"] - 5, (count, self.tokens), generator=generator).tolist()

    def generate(self, engine: Any, count: int) -> list[Any]:
        from wager import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=self.tokens, ignore_eos=True)
        return engine.generate(self.prompts(count), params)

    # -- sections ----------------------------------------------------------------------------------------------------------------

    def correct(self) -> None:
        from wager import LLM, SamplingParams

        directory = self.folder / "small"
        model = transformers_model(SMALL, torch.float32)
        with torch.no_grad():  # wide logits, so that no two tokens are nearly equal
            model.lm_head.weight.mul_(20.0)
        model.save_pretrained(directory)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(5, 4000, (n,), generator=generator).tolist() for n in (1, 7, 40, 130, 300)]
        found: dict[str, Any] = {}
        for dtype in ("float32", "bfloat16"):
            peer = model if dtype == "float32" else model.to(torch.bfloat16)
            want = [peer_tokens(peer, [p], 48)[0] for p in prompts]
            engine = LLM(str(directory), dtype=dtype, device="cuda", skip_tokenizer_init=True, max_model_len=1024,
                         kv_cache_memory=1 << 30, enable_prefix_caching=False)  # fmt: skip
            params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
            together = [o.outputs[0].token_ids for o in engine.generate(prompts, params)]
            alone = [engine.generate([p], params)[0].outputs[0].token_ids for p in prompts]
            for name, got in (("together", together), ("alone", alone)):
                same = [first_difference(list(g), w) for g, w in zip(got, want, strict=True)]
                found[f"{dtype} {name}"] = same
                verdict = "equal" if min(same) == 48 else "DIFFERENT" if dtype == "float32" else "differs in rounding"
                print(f"correct {dtype} {name}: first difference at {same} of 48: {verdict}", flush=True)
            graphs = engine.engine.core.runner.graphs
            found[f"{dtype} graphs"] = None if graphs is None else sorted(map(str, graphs.recordings))
            print(f"  graphs: {found[f'{dtype} graphs']}, works: {graphs is not None and graphs.works}", flush=True)
            try:
                sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=16, ignore_eos=True, logprobs=2)
                first, again = (engine.generate(prompts, sampled) for _ in range(2))
                equal = all(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(first, again, strict=True))
                found[f"{dtype} seeded"] = equal
                print(f"  seeded sampling repeats itself: {equal}", flush=True)
            except Exception as problem:
                found[f"{dtype} seeded"] = repr(problem)[:300]
                print(f"FAIL seeded sampling: {problem!r}", flush=True)
            del engine
        self.report.facts["correct"] = found

    def single(self) -> None:
        engine, copy = self.ours(), copy_contender()
        self.generate(engine, 1)
        bytes_of_token = self.token_bytes(engine)
        facts: dict[str, Any] = {"token_bytes": bytes_of_token}
        self.report.facts["single"] = facts

        def roofline() -> float:
            return 1e3 * bytes_of_token["total"] / (copy() * 1e9)

        def decode() -> float:
            metrics = self.generate(engine, 1)[0].metrics
            return 1e3 * (metrics.last_token_s - metrics.first_token_s) / (self.tokens - 1)

        rows = compare("batch 1, decode", {"roofline": roofline, "wager": decode}, repeats=max(3, self.repeats), warmup=1, unit="ms/token")  # fmt: skip
        self.show(rows)
        facts["share_of_roofline"] = rows[0].ratio
        self.parts("single")
        self.report.save()
        self.show(self.against_transformers(1, "batch 1, whole request"))

    def batch(self) -> None:
        self.generate(self.ours(), self.many)
        self.show(self.against_transformers(self.many, f"batch {self.many}, whole requests"))
        self.parts(f"batch {self.many}")

    def against_transformers(self, count: int, workload: str) -> list[Row]:
        engine, peer, prompts = self.ours(), self.transformers(), self.prompts(count)
        made = count * self.tokens

        def timed(work: Callable[[], Any]) -> Callable[[], float]:
            def run() -> float:
                torch.cuda.synchronize()
                begun = time.perf_counter()
                work()
                torch.cuda.synchronize()
                return made / (time.perf_counter() - begun)

            return run

        peer_tokens(peer, prompts, 4)
        self.generate(engine, count)
        contenders = {
            "transformers": timed(lambda: peer_tokens(peer, prompts, self.tokens)),
            "wager": timed(lambda: self.generate(engine, count)),
        }
        return compare(workload, contenders, repeats=self.repeats, warmup=0, unit="tok/s", higher_is_better=True)

    def quantized(self) -> None:
        self.engine = self.peer = None
        gc.unfreeze()  # an engine freezes what it is made of
        gc.collect()
        torch.cuda.empty_cache()
        copy = copy_contender()
        for mode in ("int8", "int4"):
            try:
                begun = time.perf_counter()
                engine = self.build(mode)
                torch.cuda.synchronize()
                load_s = time.perf_counter() - begun
                self.generate(engine, 1)
                times = [m for m in (self.generate(engine, 1)[0].metrics for _ in range(3))]
                ms = statistics.median(1e3 * (m.last_token_s - m.first_token_s) / (self.tokens - 1) for m in times)
                size = self.token_bytes(engine)
                roofline_ms = 1e3 * size["total"] / (copy() * 1e9)
                facts = {"ms_per_token": ms, "roofline_ms": roofline_ms, "load_s": load_s, "token_bytes": size}
                self.report.facts[mode] = facts
                print(
                    f"{mode}: {ms:.3f} ms per token, {roofline_ms / ms:.3f} of its roofline {roofline_ms:.3f} ms, "
                    f"loaded in {load_s:.1f} s", flush=True,
                )  # fmt: skip
                del engine
            except Exception as problem:
                self.report.facts[mode] = repr(problem)[:500]
                print(f"FAIL {mode}: {problem!r}", flush=True)
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()

    def compiled(self) -> None:
        peer, prompts = self.transformers(), self.prompts(1)
        for _ in range(2):  # compiles
            peer_tokens(peer, prompts, self.tokens, cache_implementation="static")
        begun = time.perf_counter()
        peer_tokens(peer, prompts, self.tokens, cache_implementation="static")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        self.report.facts["transformers_static_cache_tok_s"] = self.tokens / seconds
        print(f"transformers with a static cache: {self.tokens / seconds:.1f} tok/s at batch 1", flush=True)

    def profile(self) -> None:
        """Ten decode steps under torch's profiler, one graph's replay by itself, and what the engine's own log says of a step."""
        from wager import SamplingParams

        engine = self.ours()
        runner, frontend = engine.engine.core.runner, engine.frontend
        self.generate(engine, 1)
        self.replay_time(runner)
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        frontend.submit(frontend.make(self.prompts(1)[0], params, "profiled"))
        for _ in range(12):
            frontend.step()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(10):
                frontend.step()
            torch.cuda.synchronize()
        while engine.engine.core.has_work:
            frontend.step()
        averages = seen.key_averages()
        on_device = [e for e in averages if str(e.device_type).endswith("CUDA")]
        on_device.sort(key=lambda e: -e.self_device_time_total)
        lines = [
            f"{e.self_device_time_total / 1e4:9.4f} ms/step {e.count / 10:7.1f}x  {e.key[:90]}" for e in on_device[:16]
        ]
        print("device time by kernel:", *lines, sep="\n", flush=True)
        on_host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:14]
        lines += ["", "host:"] + [
            f"{e.self_cpu_time_total / 1e4:9.4f} ms/step {e.count / 10:7.1f}x  {e.key[:90]}" for e in on_host
        ]
        print(*lines[-15:], sep="\n", flush=True)
        path = RESULTS / "serve" / f"{self.report.system}_profile.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(lines) + "\n")

    def replay_time(self, runner: Any) -> None:
        graphs = runner.graphs
        if graphs is None or not graphs.recordings:
            print("FAIL no graph was recorded", flush=True)
            return
        for key, recording in list(graphs.recordings.items())[:3]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            recording.replay()
            start.record()
            for _ in range(20):
                recording.replay()
            end.record()
            end.synchronize()
            ms = start.elapsed_time(end) / 20
            self.report.facts.setdefault("replay_ms", {})[str(key)] = ms
            print(f"replay of graph {key} (rows, table widths): {ms:.3f} ms", flush=True)

    # -- helpers -----------------------------------------------------------------------------------------------------------------

    def token_bytes(self, engine: Any) -> dict[str, int]:
        """What one token of a request must read, by kind. Norms and the embedding's row are what is left as parameters."""
        model = engine.engine.core.runner.model
        packed = sum(m.packed.nbytes for m in model.modules() if getattr(m, "packed", None) is not None)
        norms = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
        row = model.embed.weight.nbytes // model.vocab_size
        per_token = sum(s.num_kv_heads * (s.key_dim + s.value_dim) * 2 for s in model.attention)
        cached = per_token * (self.tokens + self.tokens // 2)
        return {
            "weights": packed,
            "norms": norms,
            "embedding": row,
            "keys_and_values": cached,
            "total": packed + norms + row + cached,
        }

    def parts(self, name: str) -> None:
        """Medians over the logged decode steps: the forward is launched and not waited for, so the wait for the device is in `sample`."""
        steps = [s for s in self.steps if s.prefill_tokens == 0][-100:]
        fields = ("schedule_ms", "forward_ms", "sample_ms", "output_ms", "step_ms")
        medians = {f: statistics.median(getattr(s, f) for s in steps) for f in fields} if steps else {}
        self.report.facts[f"{name} step"] = medians
        print(f"{name}, a step: " + ", ".join(f"{k} {v:.3f}" for k, v in medians.items()), flush=True)
        self.steps.clear()

    def show(self, rows: list[Row]) -> None:
        self.report.rows += rows
        for row in rows:
            print(
                f"{row.workload}: {row.baseline} {row.baseline_value:.4g} {row.unit}, {row.ours} {row.ours_value:.4g} {row.unit}, "
                f"{row.ratio:.3f}x ({row.ratio_low:.3f} to {row.ratio_high:.3f}), A/A noise {row.aa_noise:.1%}",
                flush=True,
            )


def transformers_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wanted = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    made: Any = LlamaConfig(**{**wanted, "attn_implementation": "sdpa"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"), torch.random.fork_rng(["cuda"]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(made)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def peer_tokens(model: Any, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """What transformers generates greedily after prompts of one length."""
    ids = torch.tensor(prompts, device="cuda")
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
        )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def first_difference(got: list[int], want: list[int]) -> int:
    """How many leading tokens are equal."""
    return next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sections", default="correct,single,profile,batch,quantized", help="which, in this order")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark measures the engine on a GPU, and torch sees no CUDA device")
    logging.basicConfig(level=logging.WARNING)
    repeats = chosen.repeats or (2 if chosen.quick else 3)
    report = Report("serve", f"gpu_{device_tag()}", [], {"device": torch.cuda.get_device_name()})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.quick, repeats, report, Path(folder))
        sections = {n: getattr(bench, n) for n in ("correct", "single", "profile", "batch", "quantized", "compiled")}
        unknown = set(chosen.sections.split(",")) - set(sections)
        if unknown:
            parser.error(f"unknown sections {sorted(unknown)}; there are {', '.join(sections)}")
        failed = run_sections(sections, chosen.sections.split(","), report)
    print(json.dumps({"failed": failed, "seconds": report.facts["seconds"]}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
