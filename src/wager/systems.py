"""The research systems of wager, one row each: what it does for a user, where it lives, and what was measured.

A system works when its module exists; its measured ratios are read from `benchmarks/results/<wing>/<system>.json` of the checkout. Both are
looked up, never typed in, so this table cannot claim more than the repository holds. docs/systems.md is generated from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class System:
    """`module` and `command` are relative to the package: "serve.speculate.sequoia" and "serve --speculative-config". `bench` names
    the result files where it is not one with the module's name."""

    name: str
    paper: str
    arxiv: str
    does: str
    module: str
    command: str
    bench: tuple[str, ...] = ()

    @property
    def wing(self) -> str:
        return self.module.split(".")[0]

    @property
    def works(self) -> bool:
        """Whether its module is in the package."""
        path = PACKAGE.joinpath(*self.module.split("."))
        return path.is_dir() or path.with_suffix(".py").is_file()

    @property
    def status(self) -> str:
        return "works" if self.works else "not yet"

    @property
    def shown_command(self) -> str:
        """How a user runs it; empty until it works."""
        return f"wager {self.command}" if self.works else ""

    @property
    def result_paths(self) -> list[Path]:
        names = self.bench or (self.module.rsplit(".", 1)[1],)
        return [path for name in names if (path := RESULTS / self.wing / f"{name}.json").is_file()]

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


S = System

SYSTEMS: tuple[System, ...] = (
    S("Engine", "Paged KV cache, continuous batching and chunked prefill in one ragged batch", "",
      "Serves a Hugging Face checkpoint over the OpenAI API; every other serving system plugs into it.",
      "serve.core", "serve MODEL", bench=("throughput",)),
    S("Survey checklist", "Towards Efficient Generative LLM Serving: A Survey from Algorithms to Systems", "2312.15234",
      "Lists every known serving technique, whether this engine has it, and which test proves it.",
      "serve.features", "features"),
    S("SpecInfer", "SpecInfer: Accelerating LLM Serving with Tree-based Speculative Inference and Verification", "2305.09781",
      "Drafts a tree of tokens with small models and checks the whole tree in one step; output is exact.",
      "serve.speculate.specinfer", "serve --speculative-config"),
    S("Sequoia", "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding", "2402.12374",
      "Chooses the token tree that this machine verifies fastest; sampling stays exact.",
      "serve.speculate.sequoia", "serve --speculative-config"),
    S("SpecExec", "SpecExec: Massively Parallel Speculative Decoding on Consumer Devices", "2406.02532",
      "Looks up continuations in one large drafted tree, for models that are slow to step because they are offloaded.",
      "serve.speculate.specexec", "serve --speculative-config"),
    S("SuffixDecoding", "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", "2411.04975",
      "Guesses repeated text from suffix trees over prompts and past outputs, without a draft model.",
      "serve.speculate.suffix", "serve --speculative-config", bench=("suffix", "speculation_suffix_engine_demo")),
    S("AdaServe", "AdaServe: Multi-SLO LLM Serving with SLO-Customized Speculative Decoding", "2501.12162",
      "Meets different latency targets in one batch by giving each request its own speculation tree.",
      "serve.schedule.adaserve", "serve --scheduling-policy adaserve"),
    S("Nexus", "Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode", "2507.06608",
      "Splits one GPU between prefill and decode and moves the border as the load changes.",
      "serve.schedule.nexus", "serve --scheduling-policy nexus"),
    S("FlexLLM", "FlexLLM: Token-Level Co-Serving of LLM Inference and Finetuning with SLO Guarantees", "2402.18789",
      "Finetunes an adapter with the compute that serving leaves over, in the same batch.",
      "serve.finetune.flexllm", "serve --enable-finetuning"),
    S("Vortex", "Vortex: Efficient and Programmable Sparse Attention Serving for AI Agents", "2606.06453",
      "A small language for sparse attention programs that run on the paged KV cache.",
      "serve.sparse.vortex", "serve --attention-program"),
    S("MagicPIG", "MagicPIG: LSH Sampling for Efficient LLM Generation", "2410.16179",
      "Attends to a hashed importance sample of the KV cache instead of all of it (approximate).",
      "serve.sparse.magicpig", "serve --attention-program"),
    S("LessIsMore", "Less Is More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning", "2508.07101",
      "Picks one token set for all heads and reuses it across layers in long reasoning (approximate).",
      "serve.sparse.lessismore", "serve --attention-program"),
    S("SpecReason", "SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning", "2504.07891",
      "A small model drafts reasoning steps, the base model grades them and redoes the bad ones (approximate).",
      "serve.programs.specreason", "serve --program specreason"),
    S("RaLMSpec", "Accelerating Retrieval-Augmented Language Model Serving with Speculation", "2401.14021",
      "Guesses what retrieval will return, verifies in batches; the text is the same as without it.",
      "serve.programs.ralmspec", "serve --program ralmspec"),
    S("Helix", "Helix: Serving LLMs over Heterogeneous GPUs and Network via Max-Flow", "2406.01566",
      "Places one large model on unequal GPUs and links by solving a max-flow problem.",
      "cluster.helix", "cluster plan --planner helix"),
    S("Coral", "Coral: Cost-Efficient Multi-LLM Serving over Heterogeneous Cloud GPUs", "2605.04357",
      "Finds the cheapest mix of cloud GPUs and plans that serves several models at their load.",
      "cluster.coral", "cluster plan --planner coral"),
    S("SpotServe", "SpotServe: Serving Generative LLMs on Preemptible Instances", "2311.15566",
      "Keeps serving while spot instances come and go, by migrating live state to a new parallel layout.",
      "cluster.spotserve", "cluster spot"),
    S("OptCNN", "Exploring Hidden Dimensions in Parallelizing Convolutional Neural Networks", "1802.04924",
      "Chooses per layer how to split samples, height, width and channels, optimal under its cost model.",
      "train.parallel.optcnn", "train plan --planner optcnn"),
    S("GraphPipe", "GraphPipe: Improving Performance and Scalability of DNN Training with Graph Pipeline Parallelism", "2406.17145",
      "Pipelines a network as a graph of stages instead of a chain.",
      "train.parallel.graphpipe", "train plan --planner graphpipe"),
    S("Bamboo", "Bamboo: Making Preemptible Instances Resilient for Affordable Training of Large DNNs", "2204.12013",
      "Survives preemptions in training by running a neighbour's stage in the pipeline's bubbles.",
      "train.bamboo", "train spot"),
    S("DLRM co-design", "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation Models", "2104.05158",
      "Shards embedding tables over machines and trains recommendation models with hybrid parallelism.",
      "train.dlrm", "train dlrm"),
    S("Dorylus", "Dorylus: Affordable, Scalable, and Accurate GNN Training with Distributed CPU Servers and Serverless Threads", "2105.11118",
      "Splits full-graph GNN training into graph and tensor tasks in a bounded-asynchronous pipeline.",
      "train.dorylus", "train gnn"),
    S("DynaMoE", "Optimizing Mixture of Experts using Dynamic Recompilations", "2205.01848",
      "Recompiles a static mixture-of-experts graph when routing statistics say that it pays.",
      "train.dynamoe", "train moe"),
    S("QST", "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized LLMs", "2401.07159",
      "Finetunes a frozen 4-bit model through a small side network, without backpropagating through it.",
      "train.peft.qst", "train finetune --method qst"),
    S("DLink", "DLink: Distilling Layer-wise and Dominant Knowledge from EEG Foundation Models", "2604.15016",
      "Distils a large EEG model into a decoder small enough for a headset.",
      "train.distill.dlink", "train distill --method dlink"),
    S("OLLIE", "OLLIE: Derivation-based Tensor Program Optimizer", "2208.02025",
      "Rewrites tensor expressions by derivation and finds operators that no library has.",
      "compile.ollie", "compile run --search ollie", bench=("networks",)),
    S("Mirage", "Mirage: A Multi-Level Superoptimizer for Tensor Programs", "2405.05751",
      "Searches tensor programs over kernel, block and thread levels and proves the winner equivalent.",
      "compile.mirage", "compile run --search mirage"),
    S("Prism", "Prism: Symbolic Superoptimization of Tensor Programs", "2604.15272",
      "Searches families of programs symbolically and decides the tile sizes last.",
      "compile.prism", "compile run --search prism", bench=("prism", "mirage_gpu_h100", "mirage_gpu_h200")),
    S("Collage", "Collage: Seamless Integration of Deep Learning Backends with Automatic Placement", "2111.00655",
      "Places parts of a graph on the backend that runs each fastest, by measured cost.",
      "compile.collage", "compile --search collage"),
    S("IOS", "IOS: Inter-Operator Scheduler for CNN Acceleration", "2011.01302",
      "Runs independent operators together in stages found by dynamic programming.",
      "compile.ios", "compile --search ios"),
    S("Event Tensor", "Event Tensor: A Unified Abstraction for Compiling Dynamic Megakernel", "2604.13327",
      "Compiles a network into one persistent kernel whose tiles wait for one another by events.",
      "compile.eventtensor", "compile --search eventtensor"),
    S("HAG", "Redundancy-Free Computation Graphs for Graph Neural Networks", "1906.03707",
      "Removes repeated neighbour sums from a graph neural network without changing its result.",
      "compile.hag", "compile --search hag"),
    S("FastKernels", "FastKernels: Benchmarking GPU Kernel Generation in Production", "2605.23215",
      "Referees a kernel: right in isolation, right in the engine, and faster, or it does not ship.",
      "kernels.referee", "kernels judge"),
    S("GradSign", "GradSign: Model Performance Inference with Theoretical Insights", "2110.08616",
      "Ranks untrained networks by how often per-sample gradients agree in sign.",
      "tune.gradsign", "tune rank"),
    S("DEWA", "Communication Bounds for the Distributed Experts Problem", "2501.03132",
      "Follows the best expert when costs are spread over servers, with little communication.",
      "tune.experts", "tune experts"),
    S("TOD", "TOD: GPU-accelerated Outlier Detection via Tensor Operations", "2110.14007",
      "Outlier detectors compiled to a few tensor operators, exact at low precision.",
      "detect.tod", "detect fit DATA", bench=("tod-plan", "tod-single", "large")),
    S("BOND", "BOND: Benchmarking Unsupervised Outlier Node Detection on Static Attributed Graphs", "2206.10071",
      "Fourteen detectors of outlier nodes in graphs, benchmarked on equal terms.",
      "detect.bond", "detect bench graph", bench=("bond-dominant", "bond-gae", "bond-conad", "bond-done", "bond-motifs", "bond-large")),
    S("Quarl", "Quarl: A Learning-Based Quantum Circuit Optimizer", "2307.10120",
      "Shortens quantum circuits with learned choices among verified rewrite rules.",
      "quantum.quarl", "quantum optimize"),
    S("Quark", "Quark: A Gradient-Free Quantum Learning Framework for Classification Tasks", "2210.01311",
      "Trains a quantum classifier by amplifying good weights out of a superposition of all.",
      "quantum.quark", "quantum train"),
    S("Drone-NeRF", "Drone-NeRF: Efficient NeRF Based 3D Scene Reconstruction for Large-Scale Drone Survey", "2308.15733",
      "Reconstructs a large drone survey from radiance fields trained block by block.",
      "vision.dronenerf", "vision nerf"),
    S("CAT Pruning", "CAT Pruning: Cluster-Aware Token Pruning For Text-to-Image Diffusion Models", "2502.00433",
      "Recomputes only the tokens that matter in each diffusion step (approximate).",
      "vision.catpruning", "vision diffuse"),
    S("ICA-RAG", "ICA-RAG: Information Completeness Guided Adaptive RAG for Disease Diagnosis", "2502.14614",
      "Retrieves only when the record is incomplete.",
      "apps.rag", "rag"),
    S("DDO", "DDO: Dual-Decision Optimization for LLM-Based Medical Consultation via Multi-Agent Collaboration", "2505.18630",
      "One model chooses which symptom to ask next, a calibrated one diagnoses.",
      "apps.consult", "consult"),
    S("TrustGen", "On the Trustworthiness of Generative Foundation Models", "2502.14296",
      "Builds fresh tests of a model's trustworthiness and reports them.",
      "apps.trust", "trust"),
)  # fmt: skip


def measured(system: System) -> str:
    """The rows of the system's saved benchmarks, e.g. "2.10x transformers (batch 64)"; empty when nothing was measured."""
    rows = [row for path in system.result_paths for row in json.loads(path.read_text())["rows"]]
    return "; ".join(describe(row) for row in rows)


def describe(row: Mapping) -> str:
    """One benchmark row in words; `ratio` above 1 is better than the baseline."""
    return f"{row['ratio']:.2f}x {row['baseline']} ({row['workload']})"


def markdown() -> str:
    """The tables of docs/systems.md: what works, then what is to come."""
    lines = ["## Works\n", "| system | what it does | where | command | measured |", "|---|---|---|---|---|"]
    for s in (s for s in SYSTEMS if s.works):
        measures = measured(s) or "–"
        lines.append(f"| {linked(s)} | {s.does} | `wager.{s.module}` | `{s.shown_command}` | {measures} |")
    lines += ["\n## Not yet\n", "| system | paper | what it will do |", "|---|---|---|"]
    lines += [f"| {s.name} | [{s.paper}]({s.link}) | {s.does} |" for s in SYSTEMS if not s.works]
    return "\n".join(lines) + "\n"


def linked(system: System) -> str:
    return f"[{system.name}]({system.link})" if system.link else system.name


app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@app.command()
def systems(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """List the research systems, what they do, and what was measured."""
    if as_json:
        keys = ("name", "paper", "arxiv", "does", "module", "shown_command", "status")
        print(json.dumps([{k: getattr(s, k) for k in keys} | {"measured": measured(s)} for s in SYSTEMS], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    works = sum(s.works for s in SYSTEMS)
    table = Table(title=f"{works} of {len(SYSTEMS)} systems work", title_justify="left", show_lines=False)
    for column in ("system", "what it does", "command", "measured", "status"):
        table.add_column(column, no_wrap=column in ("system", "status"))
    for s in sorted(SYSTEMS, key=lambda s: not s.works):
        table.add_row(s.name, s.does, s.shown_command, measured(s), s.status, style=None if s.works else "dim")
    Console().print(table)
