"""`wager speculate`: measure this machine and a pair of models, plan a token tree, replay recorded text through suffix trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from wager.errors import UsageError

app = typer.Typer(
    help="Measure, plan and tune speculative decoding: profile, acceptance, plan, boost, distil, replay.",
    no_args_is_help=True,
)

Target = Annotated[str, typer.Argument(help="demo, a directory in Hugging Face layout, or a hub id")]
Draft = Annotated[str, typer.Option(help="the draft model")]
Out = Annotated[Path, typer.Option(help="file to write")]


@app.command()
def profile(
    target: Target = "demo",
    draft: Draft = "demo-draft",
    sizes: Annotated[str, typer.Option(help="tokens per request of a pass")] = "1,2,4,6,8,12,16,24,32,48,64,96,128",
    batches: Annotated[str, typer.Option(help="requests per pass")] = "1,4,16",
    context: Annotated[int, typer.Option(help="cached tokens per request while measuring")] = 256,
    repeats: Annotated[int, typer.Option(help="measured rounds; the fastest is kept")] = 9,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    out: Out = Path("profile.json"),
) -> None:
    """Measure how long verifying and drafting n tokens takes on this machine."""
    from wager.serve.speculate.hardware_profile import measure_profile

    wanted, requests = _numbers(sizes, "sizes"), _numbers(batches, "batches")
    llm = _engine(target, draft, dtype, max(requests), {"tree": [-1]})
    drafter = llm.engine.core.speculator.drafters["sequoia"]
    measured = measure_profile(
        llm.engine.core.runner, drafter.draft, sizes=wanted, batches=requests, context_tokens=context, repeats=repeats,
        overhead_ms=0.3,
    )  # fmt: skip
    measured.save(out)
    rows = [
        [str(b), str(n), f"{measured.target_ms(b, n):.2f}", f"{measured.draft_ms(b, n):.2f}", f"{measured.target_ms(b, n) / measured.target_ms(b, 1):.2f}"]
        for b in requests
        for n in wanted
    ]  # fmt: skip
    _table(["batch", "tokens", "target ms", "draft ms", "target / one token"], rows)
    print(f"written: {out}")


@app.command()
def acceptance(
    target: Target = "demo",
    draft: Draft = "demo-draft",
    data: Annotated[
        Path | None, typer.Option(help="prompts: JSONL with prompt, turns or question, or a text file, one a line")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus of the target")] = 1.0,
    width: Annotated[int, typer.Option(help="children tried at each position")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens generated (dynamic) or read (static) per prompt")] = 64,
    prompts: Annotated[int, typer.Option(help="most prompts")] = 50,
    mode: Annotated[str, typer.Option(help="dynamic: while generating; static: over given text, one pass")] = "dynamic",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    out: Out = Path("acceptance.json"),
) -> None:
    """Measure how often the k-th child of an accepted node is accepted."""
    from wager.serve.speculate import measure

    if mode not in ("dynamic", "static"):
        raise UsageError(f"mode {mode!r} is unknown; use dynamic or static", param="mode")
    llm = _engine(target, draft, dtype, 8, {"tree": [-1] * width, "max_branch": width})
    texts = _prompts(data)[:prompts]
    how = measure.dynamic_acceptance if mode == "dynamic" else measure.static_acceptance
    vector = how(llm, texts, width, tokens, temperature, top_p, seed)
    vector.save(out)
    rows = [[str(k + 1), f"{p:.4f}", f"{int(c)}"] for k, (p, c) in enumerate(zip(vector.p, vector.counts, strict=True))]
    _table(["child", "accepted", "times"], [*rows, ["none", f"{vector.reject:.4f}", f"{int(vector.rejected)}"]])
    print(f"{int(vector.total)} decisions; written: {out}")


@app.command()
def plan(
    acceptance_file: Annotated[Path, typer.Option("--acceptance", help="from `wager speculate acceptance`")] = Path(
        "acceptance.json"
    ),
    profile_file: Annotated[Path, typer.Option("--profile", help="from `wager speculate profile`")] = Path(
        "profile.json"
    ),
    batch: Annotated[int, typer.Option(help="requests that decode together")] = 1,
    max_size: Annotated[int, typer.Option(help="most nodes, the root included")] = 128,
    max_depth: Annotated[int, typer.Option(help="most draft steps")] = 12,
    max_branch: Annotated[int, typer.Option(help="most children of a node")] = 16,
    plot: Annotated[Path | None, typer.Option(help="draw the tree: .svg or .png")] = None,
    out: Out = Path("tree.json"),
) -> None:
    """Choose the token tree that decodes fastest; use it as {"method": "sequoia", "tree": "tree.json", …}."""
    from wager.serve.speculate.acceptance import AcceptanceVector
    from wager.serve.speculate.hardware_profile import HardwareProfile
    from wager.serve.speculate.tree_plan import plan_tree

    vector, machine = AcceptanceVector.load(acceptance_file), HardwareProfile.load(profile_file)
    tree = plan_tree(vector.p, machine, batch=batch, max_size=max_size, max_depth=max_depth, max_branch=max_branch)
    if not len(tree):
        print("no tree pays on this machine with this pair: decode without speculation")
        return
    tree.save(out)
    print(tree.text())
    print(
        f"{len(tree)} guesses, {tree.depth} draft steps: {tree.expected_tokens:.2f} tokens per step, "
        f"{tree.expected_speedup:.2f}x plain decoding expected; written: {out}"
    )
    if plot is not None:
        from wager.serve.speculate.tree_picture import draw_tree

        draw_tree(tree, plot)
        print(f"picture: {plot}")


@app.command()
def boost(
    target: Target = "demo",
    start: Annotated[str, typer.Option(help="the draft model that every one starts from")] = "demo-draft",
    data: Annotated[
        Path | None, typer.Option(help="prompts: JSONL with prompt, turns or question, or a text file, one a line")
    ] = None,
    count: Annotated[int, typer.Option(help="drafts to make")] = 2,
    prompts: Annotated[int, typer.Option(help="most prompts")] = 200,
    tokens: Annotated[int, typer.Option(help="tokens the target says to each prompt")] = 64,
    temperature: Annotated[float, typer.Option(help="of the target's text")] = 0.0,
    rounds: Annotated[int, typer.Option(help="most rounds of tuning per draft")] = 20,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    out: Annotated[Path, typer.Option(help="folder to write 0, 1, ... into")] = Path("drafts"),
) -> None:
    """Tune several draft models, each on what the ones before it cannot foretell, for SpecInfer."""
    from wager.serve.llm import LLM
    from wager.serve.speculate.boost import BoostRecipe, pieces_of
    from wager.serve.speculate.boost import boost as tune_all

    recipe = BoostRecipe(count=count, rounds=rounds)
    llm = LLM(target, dtype=dtype)
    tokenizer: Any = llm.get_tokenizer()
    room = llm.engine.max_model_len - tokens
    encoded = [ids[-room:] for text in _prompts(data)[:prompts] if (ids := tokenizer.encode(text))]
    pieces = pieces_of(llm, encoded, tokens, recipe.piece_tokens, temperature)
    tuned, together = tune_all(pieces, start, out, recipe, print)
    rows = [[str(t.path), str(t.pieces), str(t.marked), f"{t.hits:.1%}", f"{t.hits_on_own:.1%}"] for t in tuned]
    _table(["draft", "tuned on", "then marked", "foretells of all", "of its own"], rows)
    names = json.dumps([str(t.path) for t in tuned])
    print(
        f'any of them foretells {together:.1%}; use: {{"method": "specinfer", "drafts": {names}, "expansion": [1, 1, 1, 1]}}'
    )


@app.command()
def distil(
    target: Target = "demo",
    start: Annotated[str, typer.Option(help="the model that the draft starts from")] = "demo-draft",
    layers: Annotated[
        str | None, typer.Option(help="which of its layers the draft keeps, counted from 1, e.g. 1,3,5")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="prompts: JSONL, a text file, or a .npy token stream of the demo factory to cut them from"),
    ] = None,
    prompts: Annotated[int, typer.Option(help="most prompts")] = 1000,
    context: Annotated[int, typer.Option(help="most tokens of a prompt")] = 64,
    tokens: Annotated[int, typer.Option(help="tokens the target says to each prompt")] = 96,
    temperatures: Annotated[str, typer.Option(help="of the target's texts, in turns")] = "0,0.6,1",
    rounds: Annotated[int, typer.Option(help="over the texts")] = 6,
    minutes: Annotated[float | None, typer.Option(help="limit of the tuning")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="of the target and of the tuning: cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="the draft's directory")] = Path("draft"),
) -> None:
    """Tune a draft model on what its target says and how sure it is of it: more guesses are right."""
    from wager.serve.llm import LLM
    from wager.serve.speculate.distil import DistilRecipe, lessons_of, texts_of
    from wager.serve.speculate.distil import distil as tune_draft

    recipe = DistilRecipe(rounds=rounds, minutes=minutes)
    llm = LLM(target, dtype=dtype, device=device)
    if data is not None and data.suffix == ".npy":
        encoded = _windows(data, prompts, context, recipe.seed)
    else:
        tokenizer: Any = llm.get_tokenizer()
        encoded = [ids[-context:] for text in _prompts(data)[:prompts] if (ids := tokenizer.encode(text))]
    texts = texts_of(llm, encoded, tokens, _floats(temperatures, "temperatures"), recipe.seed)
    lessons = lessons_of(llm, texts, recipe)
    chosen = None if layers is None else [n - 1 for n in _numbers(layers, "layers")]
    made = tune_draft(lessons, start, out, recipe, chosen, device, print)
    rows = [
        ["before", *(f"{pair[0]:.1%}" for pair in (made.hits, made.overlap))],
        ["after", *(f"{pair[1]:.1%}" for pair in (made.hits, made.overlap))],
    ]
    _table(["texts it did not learn from", "same favourite", "sampled guesses kept"], rows)
    print(f"written: {out}; learned from {made.texts} texts")


def _windows(path: Path, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` windows of a token stream, at places drawn without replacement."""
    import numpy as np

    stream = np.load(path, mmap_mode="r")
    places = np.random.default_rng(seed).permutation(len(stream) // length)[:count]
    return [stream[p * length : (p + 1) * length].astype(int).tolist() for p in places.tolist()]


@app.command()
def replay(
    data: Annotated[
        Path, typer.Argument(help="JSONL: conversations (turns with roles), text-to-SQL rows, or prompt and response")
    ],
    group: Annotated[str, typer.Option(help="only groups (traces, databases) whose name contains this")] = "",
    exclude: Annotated[str, typer.Option(help="without groups whose name contains this")] = "",
    shuffle: Annotated[bool, typer.Option(help="in random order")] = False,
    depths: Annotated[str, typer.Option(help="tree depths to try")] = "16,64",
    factors: Annotated[str, typer.Option(help="draft length per matched token")] = "1,2,4",
    max_tokens: Annotated[int, typer.Option(help="longest draft")] = 32,
    min_probability: Annotated[float, typer.Option(help="least probability of a drafted token")] = 0.1,
    tree: Annotated[bool, typer.Option(help="draft trees instead of paths")] = False,
    local: Annotated[bool, typer.Option(help="use the request's own text")] = True,
    shared: Annotated[bool, typer.Option(help="use earlier outputs")] = True,
    tokenizer: Annotated[str | None, typer.Option(help="demo or a checkpoint directory; default: word pieces")] = None,
) -> None:
    """Replay recorded responses through suffix trees and prompt look-up: tokens per step, acceptance, microseconds."""
    from wager.serve.speculate.replay import PieceEncoder, encoded, read_pairs, replay_ngram, replay_suffix, shuffled
    from wager.serve.speculate.suffix_tree import DraftLimits

    pairs = [p for p in read_pairs(data) if group in p[0] and not (exclude and exclude in p[0])]
    if not pairs:
        raise UsageError(f"{data} has no response in a group that contains {group!r}", param="group")
    encode = PieceEncoder() if tokenizer is None else _load_tokenizer(tokenizer).encode
    stream = encoded(shuffled(pairs) if shuffle else pairs, encode)
    rows = []
    look_up = replay_ngram(stream)
    rows.append(["prompt look-up", "", "", *_figures(look_up)])
    for depth in _numbers(depths, "depths"):
        for factor in _floats(factors, "factors"):
            result = replay_suffix(
                stream, DraftLimits(max_tokens, factor, 0.0, min_probability, tree), depth, local, shared
            )
            rows.append(["suffix tree" if tree else "suffix path", str(depth), f"{factor:g}", *_figures(result)])
    print(f"{len(stream)} responses, {look_up.tokens} tokens")
    _table(["drafter", "depth", "factor", "tokens/step", "accepted", "drafted/step", "us/token", "us/draft"], rows)


def _figures(result: Any) -> list[str]:
    return [
        f"{result.tokens_per_step:.2f}", f"{result.accept_rate:.0%}", f"{result.drafted_per_step:.1f}",
        f"{result.update_us:.1f}", f"{result.speculate_us:.1f}",
    ]  # fmt: skip


def _engine(target: str, draft: str, dtype: str, num_seqs: int, options: dict[str, Any]) -> Any:
    from wager.serve.llm import LLM

    config = {"method": "sequoia", "draft": draft, "auto": False, **options}
    return LLM(target, dtype=dtype, max_num_seqs=num_seqs, speculative_config=config)


def _load_tokenizer(name: str) -> Any:
    from wager.models import demo
    from wager.serve.text.tokenizer import Tokenizer

    return Tokenizer.load(demo.path(name) if demo.is_demo(name) else Path(name))


def _prompts(path: Path | None) -> list[str]:
    """Texts of a file, or a few of our own."""
    if path is None:
        return [
            "def main(argv):",
            "The history of the city begins",
            "import os\n\n",
            "To install the package, run",
            "class Node:",
        ]
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", param="data") from None
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UsageError(f"line {number} of {path} is not JSON", param="data") from None
        turns = row.get("turns") or []
        first = turns[0] if turns and isinstance(turns[0], str) else turns[0]["text"] if turns else None
        text = row.get("prompt") or row.get("question") or first
        if not text:
            raise UsageError(f"line {number} of {path} has no prompt, question or turns", param="data")
        texts.append(text)
    return texts


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"--{name} takes whole numbers from 1 on, separated by commas, got {text!r}", param=name)
    return sorted(set(numbers))


def _floats(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name} takes numbers separated by commas, got {text!r}", param=name) from None


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
