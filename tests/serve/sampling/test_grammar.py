"""Structured outputs: whatever tokens a model prefers, a completed text keeps its constraint; guesses are tried and rolled back."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError, WagerError
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams, StructuredOutputs
from wager.serve.sampling.grammar import GrammarCompiler
from wager.serve.text.tokenizer import Tokenizer

VOCAB = 416
ENDS = (0, 2)  # both end a text: the checkpoint lists two


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return Tokenizer.load(tiny_dir)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB)


@pytest.fixture(scope="module")
def closing(tokenizer):
    """Weights of a model that likes to come to an end, so that random texts stay short."""
    texts = [tokenizer.token_text(i) for i in range(VOCAB)]
    return np.array([40.0 if set(t) & set('"]}') else 4.0 if t.isdigit() else 1.0 for t in texts])


def allowed(grammar, guesses=()):
    words = np.empty(-(-VOCAB // 32), np.int32)
    grammar.fill_bitmask(words, guesses)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not bits[VOCAB:].any() or bits.all()
    return np.flatnonzero(bits[:VOCAB])


def write(grammar, tokenizer, rng, weights=None, limit=600):
    """A random completed text, None if the limit came first."""
    weights = np.ones(VOCAB) if weights is None else weights
    token_ids = []
    for _ in range(limit):
        choices = allowed(grammar)
        assert len(choices), "a running constraint must leave a token"
        if ENDS[0] in choices and (set(choices) <= set(ENDS) or rng.random() < 0.5):
            grammar.accept([rng.choice(ENDS)])
            assert grammar.is_terminated
            return tokenizer.decode(token_ids)
        choices = [c for c in choices if c not in ENDS]
        token = rng.choices(choices, [weights[c] for c in choices])[0]
        grammar.accept([token])
        token_ids.append(int(token))
    return None


NAMES = st.sampled_from(["a", "b", "long name", "ключ", 'q"uote'])
LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span}, st.integers(-50, 50), st.integers(0, 900)),
    st.just({"type": "integer"}),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-3, 3)),
    st.builds(lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span}, st.integers(0, 3), st.integers(0, 6)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"}, {"type": "string", "format": "date"}, {"const": {"x": [1, None]}}]),
    st.lists(st.sampled_from(["x", "yé", 3, None, True, "😀"]), min_size=1, max_size=4, unique_by=repr).map(lambda v: {"enum": v}),
)  # fmt: skip


def _object(properties, data):
    required = [name for i, name in enumerate(properties) if data >> i & 1]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _containers(inner):
    return st.one_of(
        st.builds(lambda items, low, span: {"type": "array", "items": items, "minItems": low, "maxItems": low + span}, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda first, second: {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}, inner, inner),
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 7)),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )  # fmt: skip


SCHEMAS = st.recursive(LEAVES, _containers, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_completed_output_validates_against_its_schema(compiler, tokenizer, closing, schema, seed):
    rng = random.Random(seed)
    compiled = compiler.compile(StructuredOutputs(json=schema))
    texts = [write(compiled.matcher(), tokenizer, rng, closing) for _ in range(2)]
    for text in texts:
        if text is not None:
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def test_most_fuzzed_outputs_complete_and_unconstrained_ones_do_not_validate(compiler, tokenizer, closing):
    """The fuzz proves something: texts end, and the same random writer without a grammar never writes JSON of the schema."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}}, "required": ["a", "b"]}
    schema["additionalProperties"] = False
    compiled = compiler.compile(StructuredOutputs(json=schema))
    texts = [write(compiled.matcher(), tokenizer, random.Random(i), closing) for i in range(20)]
    assert sum(text is not None for text in texts) > 15
    for i in range(20):
        free = tokenizer.decode(random.Random(i).choices(range(3, VOCAB), closing[3:], k=20))
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            jsonschema.validate(json.loads(free), schema)


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{3}[0-9]{2,4}", r"(yes|no|may be)\.", r"[0-9]{4}-[01][a-f]?", r"[^\n]é+", r"a?"]
)
def test_regular_expressions_match_fully(compiler, tokenizer, pattern):
    compiled = compiler.compile(StructuredOutputs(regex=pattern))
    for seed in range(10):
        text = write(compiled.matcher(), tokenizer, random.Random(seed))
        assert text is not None and re.fullmatch(pattern, text), text


def test_choices_are_literal(compiler, tokenizer):
    choices = ("yes", 'say "no"', "back\\slash", "new\nline", "тест", "😀👍🏽", "yes please", "/x/", "{}")
    compiled = compiler.compile(StructuredOutputs(choice=choices))
    texts = {write(compiled.matcher(), tokenizer, random.Random(seed)) for seed in range(120)}
    assert texts == set(choices)


def test_lark_and_gbnf_grammars(compiler, tokenizer):
    lark = 'start: expr\nexpr: term (("+" | "-") term)*\nterm: /[0-9]{1,3}/ | "(" expr ")"\n'
    gbnf = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+\n'
    for grammar, check in ((lark, eval), (gbnf, lambda text: [int(n) for n in text[1:-1].split(",")])):
        compiled = compiler.compile(StructuredOutputs(grammar=grammar))
        written = [write(compiled.matcher(), tokenizer, random.Random(seed)) for seed in range(15)]
        complete = [text for text in written if text is not None]
        assert len(complete) > 5
        for text in complete:
            check(re.sub(r"\b0+(?=\d)", "", text))


def test_any_json_object(compiler, tokenizer, closing):
    compiled = compiler.compile(StructuredOutputs(json_object=True))
    for seed in range(10):
        text = write(compiled.matcher(), tokenizer, random.Random(seed), closing)
        assert text is None or isinstance(json.loads(text), dict)


def test_structural_tags_leave_free_text_free_and_bind_what_follows_a_trigger(compiler, tokenizer):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tag = {"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f"]}
    grammar = compiler.compile(StructuredOutputs(structural_tag=tag)).matcher()
    assert len(allowed(grammar)) > 200
    grammar.accept(tokenizer.encode("hello <f>", add_special_tokens=False))
    assert len(allowed(grammar)) < 30
    grammar.accept(tokenizer.encode('{"x":1}</f>', add_special_tokens=False))
    assert len(allowed(grammar)) > 200


# -- guesses -------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), depth=st.integers(1, 8), stray=st.booleans())
def test_masks_after_guesses_are_those_after_commits_and_leave_no_trace(
    compiler, tokenizer, closing, seed, depth, stray
):
    rng = random.Random(seed)
    schema = {"type": "array", "items": {"enum": ["a", 12, {"k": None}]}, "maxItems": 4}
    compiled = compiler.compile(StructuredOutputs(json=schema))
    grammar, twin, path = compiled.matcher(), compiled.matcher(), []
    for _ in range(rng.randrange(6)):
        choices = [c for c in allowed(grammar) if c not in ENDS]
        if not choices:
            break
        grammar.accept([token := int(rng.choice(choices))])
        twin.accept([token])
    before = allowed(grammar).tolist()
    for _ in range(depth):
        choices = [int(c) for c in allowed(twin)]
        token = rng.choice(choices)
        path.append(token)
        twin.accept([token])
        if token in ENDS:
            break  # nothing is drawn after the end
        assert allowed(grammar, path).tolist() == allowed(twin).tolist()
        assert allowed(grammar).tolist() == before
    if stray and path[-1] not in ENDS:
        wrong = next(t for t in range(3, VOCAB) if t not in allowed(twin))
        assert len(allowed(grammar, [*path, wrong])) == VOCAB, (
            "a path that breaks the grammar is never used: anything goes"
        )
        assert allowed(grammar).tolist() == before
    grammar.accept(path)
    assert grammar.is_terminated == twin.is_terminated
    if not grammar.is_terminated:
        assert allowed(grammar).tolist() == allowed(twin).tolist()


def test_speculation_changes_no_token_of_a_structured_output(tiny_dir, tiny_draft_dir):
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 3, "maxItems": 6}
    constraints = [
        StructuredOutputs(json=schema),
        StructuredOutputs(choice=("alpha", "beta", "gamma")),
        StructuredOutputs(regex="[ab]{4,9}"),
    ]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=40, structured_outputs=c)
        for i, c in enumerate(constraints)
        for t in (0.0, 1.0)
    ]
    prompts = [[5, 6, 7 + i] for i in range(len(params))]
    plain = LLM(str(tiny_dir)).generate(prompts, params)
    for draft in (tiny_draft_dir, tiny_dir):
        llm = LLM(str(tiny_dir), speculative_config={"draft": str(draft), "num_speculative_tokens": 3})
        for ours, theirs in zip(llm.generate(prompts, params), plain, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


# -- beside other parameters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_dir):
    return LLM(str(tiny_dir))


def test_an_output_cut_at_max_tokens_says_length(llm):
    params = SamplingParams(
        temperature=1.0,
        seed=3,
        max_tokens=4,
        structured_outputs=StructuredOutputs(json={"type": "array", "items": {"type": "integer"}, "minItems": 20}),
    )
    choice = llm.generate([[5]], params)[0].outputs[0]
    assert choice.finish_reason == "length" and len(choice.token_ids) == 4 and choice.text.startswith("[")


def test_bad_words_hold_in_structured_outputs_too(llm):
    params = SamplingParams(
        temperature=1.0, max_tokens=10, bad_words=["a"], structured_outputs=StructuredOutputs(regex="[ab]{6}")
    )
    token = llm.engine.tokenizer.encode("a", add_special_tokens=False)
    assert len(token) == 1
    for output in llm.generate([[5]] * 8, params):
        assert token[0] not in output.outputs[0].token_ids


def test_a_constraint_that_others_make_impossible_fails_that_request_alone(llm):
    tokenizer = llm.engine.tokenizer
    only_b = tuple(i for i in range(3, 400) if "b" in tokenizer.token_text(i))
    params = SamplingParams(max_tokens=10, structured_outputs=StructuredOutputs(regex="a+"), allowed_token_ids=only_b)
    with pytest.raises(WagerError, match="leave no token"):
        llm.generate([[5]], params)
    assert not llm.engine.core.requests and llm.engine.core.runner.blocks.usage == 0.0


def test_nothing_follows_the_end_of_a_structured_output(llm):
    params = SamplingParams(
        temperature=1.0,
        seed=1,
        max_tokens=30,
        ignore_eos=True,
        structured_outputs=StructuredOutputs(choice=("yes", "no")),
    )
    for output in llm.generate([[5]] * 6, params):
        assert output.outputs[0].text in ("yes", "no")
        assert set(output.outputs[0].token_ids) <= set(range(3, 416)) | {0, 2}


# -- compiling -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "kind"),
    [
        (StructuredOutputs(json={"type": "nonsense"}), "json"),
        (StructuredOutputs(json="{not json"), "json"),
        (StructuredOutputs(regex="(unclosed"), "regex"),
        (StructuredOutputs(grammar="start: undefined_rule"), "grammar"),
        (StructuredOutputs(structural_tag={"triggers": []}), "structural_tag"),
        (StructuredOutputs(json_object=False), "json_object"),
    ],
)
def test_a_malformed_constraint_is_refused_by_name(compiler, constraint, kind):
    with pytest.raises(UsageError, match=kind):
        compiler.submit(constraint).result(timeout=600)


def test_keywords_that_cannot_be_kept_are_refused_not_ignored(compiler):
    with pytest.raises(UsageError, match="json constraint cannot be compiled"):
        compiler.compile(StructuredOutputs(json={"type": "array", "uniqueItems": True, "items": {"type": "integer"}}))


def test_compiled_constraints_are_remembered_and_matchers_are_not_shared(compiler, tokenizer):
    constraint = StructuredOutputs(regex="abc")
    assert compiler.submit(constraint) is compiler.submit(StructuredOutputs(regex="abc"))
    compiled = compiler.submit(constraint).result(timeout=600)
    first, second = compiled.matcher(), compiled.matcher()
    first.accept(tokenizer.encode("ab", add_special_tokens=False))
    assert allowed(first).tolist() != allowed(second).tolist()


def test_exactly_one_constraint():
    with pytest.raises(UsageError, match="exactly one constraint, got .*'regex', 'choice'"):
        StructuredOutputs(regex="a", choice=("a",))
    with pytest.raises(UsageError, match="exactly one constraint, got none"):
        StructuredOutputs()
    with pytest.raises(UsageError, match="at least one string"):
        StructuredOutputs(choice=())
