"""AsyncLLM: streams, aborts, back-pressure and life cycle, on a real engine thread."""

import asyncio

import pytest

from wager.errors import CapacityError, UsageError
from wager.serve.llm import LLM, AsyncLLM
from wager.serve.params import OutputKind, SamplingParams, StructuredOutputs


@pytest.fixture()
def engine(tiny_dir):
    engine = AsyncLLM(str(tiny_dir), max_num_seqs=8, max_queue=4, block_size=4)
    yield engine
    asyncio.run(engine.shutdown(0))
    assert not engine.alive


def params(kind=OutputKind.DELTA, **options):
    return SamplingParams(temperature=0.0, ignore_eos=True, **{"max_tokens": 20, **options}, output_kind=kind)


async def collect(engine, prompt, p, name):
    return [output async for output in engine.generate(prompt, p, name)]


def idle(engine):
    blocks = engine.engine.core.runner.blocks
    return blocks.usage == 0.0 and not engine.engine.core.requests and not engine._listeners


async def until_idle(engine):
    for _ in range(500):
        if idle(engine):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still holds requests")


def test_deltas_concatenate_to_the_final_text(engine, tiny_dir):
    prompt = "Count from one to ten: "
    whole = LLM(str(tiny_dir)).generate(prompt, params())[0].outputs[0]

    async def run():
        deltas = await collect(engine, prompt, params(), "a")
        assert "".join(o.outputs[0].text for o in deltas) == whole.text
        assert [t for o in deltas for t in o.outputs[0].token_ids] == whole.token_ids
        assert [o.finished for o in deltas] == [False] * (len(deltas) - 1) + [True]
        final = await collect(engine, prompt, params(OutputKind.FINAL_ONLY), "b")
        assert len(final) == 1 and final[0].outputs[0].text == whole.text
        growing = await collect(engine, prompt, params(OutputKind.CUMULATIVE), "c")
        assert growing[-1].outputs[0].text == whole.text and len(growing) == 20

    asyncio.run(run())


def test_siblings_that_end_in_one_step_all_arrive(engine):
    """Several choices of one request finish together; a reader of deltas must get every one of their last pieces."""

    async def run():
        for kind in (OutputKind.DELTA, OutputKind.CUMULATIVE, OutputKind.FINAL_ONLY):
            outputs = await asyncio.wait_for(collect(engine, [5, 6, 7], params(kind, n=4, max_tokens=3), kind.name), 20)
            ended = [c.index for o in outputs for c in o.outputs if c.finish_reason]
            assert sorted(set(ended)) == [0, 1, 2, 3] and outputs[-1].finished

    asyncio.run(run())


def test_giving_up_at_any_moment_hurts_nobody(engine):
    """Callers are cancelled while their request waits to be submitted, while it runs, while its grammar compiles."""
    slow = StructuredOutputs(regex="(a|b)*" + "x{1,40}" * 3)

    async def run():
        for delay_s in (0, 0, 0, 0.0005, 0.001, 0.002, 0.005, 0.01) * 3:
            tasks = [asyncio.create_task(collect(engine, [5, 6], params(max_tokens=50), f"p{i}")) for i in range(3)]
            tasks += [
                asyncio.create_task(collect(engine, [5], params(structured_outputs=slow), f"g{i}")) for i in range(2)
            ]
            stays = asyncio.create_task(collect(engine, [5], params(structured_outputs=slow), "stays"))
            await asyncio.sleep(delay_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await asyncio.wait_for(stays, 20))[-1].finished
            engine.engine.grammars._futures.clear()
        assert engine.alive
        await until_idle(engine)

    asyncio.run(run())


def test_many_streams_do_not_mix(engine):
    async def run():
        alone = [await collect(engine, [i + 3] * 5, params(OutputKind.FINAL_ONLY), f"s{i}") for i in range(8)]
        together = await asyncio.gather(
            *(collect(engine, [i + 3] * 5, params(OutputKind.FINAL_ONLY), f"t{i}") for i in range(4))
        )
        for one, other in zip(alone, together, strict=False):
            assert one[0].outputs[0].token_ids == other[0].outputs[0].token_ids

    asyncio.run(run())


def test_closing_a_stream_frees_its_blocks(engine):
    async def run():
        stream = engine.generate([5] * 30, params(max_tokens=200), "a")
        await anext(stream)
        await stream.aclose()
        await until_idle(engine)
        task = asyncio.create_task(collect(engine, [5] * 30, params(max_tokens=200), "b"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)

    asyncio.run(run())


def test_abort_ends_the_stream_with_its_reason(engine):
    async def run():
        async def aborting():
            await asyncio.sleep(0.05)
            await engine.abort("a")

        outputs, _ = await asyncio.gather(collect(engine, [5] * 30, params(max_tokens=220), "a"), aborting())
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        await until_idle(engine)

    asyncio.run(run())


def test_full_queue_is_refused_and_loses_nothing(engine):
    async def run():
        tasks = [asyncio.create_task(collect(engine, [4] * 20, params(max_tokens=100), f"r{i}")) for i in range(40)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, CapacityError)]
        served = [r for r in results if isinstance(r, list)]
        assert refused and served and len(refused) + len(served) == 40
        assert all(r.retry_after_s for r in refused)
        assert all(sum(len(o.outputs[0].token_ids) for o in r) == 100 for r in served)
        await until_idle(engine)

    asyncio.run(run())


def test_bad_requests_raise_before_anything_runs(engine):
    async def run():
        with pytest.raises(UsageError, match="maximum context length"):
            await collect(engine, [3] * 500, params(), "a")
        with pytest.raises(UsageError, match="not loaded"):
            await anext(engine.generate([3], params(), "a", adapter="nope"))
        with pytest.raises(UsageError, match="is not loaded"):
            await engine.unload_adapter("nope")
        assert idle(engine)

    asyncio.run(run())


def test_embeddings_and_cache_reset(engine):
    async def run():
        output = await engine.embed("hello", "e")
        assert abs(float((output.embedding**2).sum()) - 1) < 1e-5
        assert await engine.reset_prefix_cache()

    asyncio.run(run())


def test_shutdown_drains_then_refuses(tiny_dir):
    async def run():
        engine = AsyncLLM(str(tiny_dir))
        task = asyncio.create_task(collect(engine, [5] * 10, params(max_tokens=60), "a"))
        await asyncio.sleep(0.02)
        await engine.shutdown(drain_s=30)
        outputs = await task
        assert outputs[-1].outputs[0].finish_reason == "length"
        with pytest.raises(CapacityError, match="shutting down"):
            await collect(engine, [5], params(), "b")

    asyncio.run(run())
