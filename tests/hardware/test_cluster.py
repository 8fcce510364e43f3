"""Clusters, catalogs, cost tables and availability: right numbers in, clear refusals of wrong ones."""

import numpy as np
import pytest

from wager.errors import UsageError
from wager.hardware import availability, catalog, layer_cost
from wager.hardware.cluster import SINK, SOURCE, Cluster, Device, Link, Node, read_links, uniform


def test_links_go_both_ways_and_units_are_bytes(tmp_path):
    path = tmp_path / "links.csv"
    path.write_text("from,to,bandwidth_MB_per_s,latency_ms\nsource,0,1000,1\n0,1,1250,2\n1,sink,10,50\n")
    cluster = read_links(path, ["L4", "T4"])
    assert cluster.link("n1", "n0") == Link(1.25e9, 2e-3) == cluster.link("n0", "n1")
    assert cluster.link("n1", SINK).seconds(1e6) == pytest.approx(0.15)
    assert cluster.link(SOURCE, "n1") is None
    assert cluster.without(["n0"]).links.keys() == {("n1", SINK), (SINK, "n1")}
    path.write_text("from,to,bandwidth_MB_per_s,latency_ms\n0,7,1,1\n")
    with pytest.raises(UsageError, match="line 2"):
        read_links(path, ["L4", "T4"])


def test_a_cluster_refuses_double_names_and_stray_links():
    with pytest.raises(UsageError, match="'a'"):
        Cluster((Node("a", "L4"), Node("a", "T4")))
    with pytest.raises(UsageError, match="b"):
        Cluster((Node("a", "L4"),), {("a", "b"): Link(1)})
    assert uniform(["L4", "L4", "T4"], Link(1)).counts == {"L4": 2, "T4": 1}


def test_a_table_interpolates_and_goes_on_with_its_last_slope():
    table = layer_cost.Table((0, 10, 20), (0, 1, 3))
    assert [table(x) for x in (0, 5, 15, 25)] == [0, 0.5, 2, 4]
    assert np.allclose(table.upto(25)[[5, 25]], [0.5, 4])
    with pytest.raises(UsageError):
        layer_cost.Table((0, 0), (1, 2))


def twin_sample(name, flops, read, truth):
    """A machine whose tables are exactly what `truth` says."""
    card = layer_cost.LLAMA_30B
    device = layer_cost.Device(name, 24e9, read, flops)
    cost = truth.on(card, device, 1, 870.0)
    prompt = layer_cost.Table((250, 500, 1000, 2000), tuple(cost.prompt_s(t) for t in (250, 500, 1000, 2000)))
    sizes = (8, 30, 60, 120, 240, 300)
    decode = layer_cost.Table(sizes, tuple(cost.decode_s(s) for s in sizes))
    return layer_cost.Sample(layer_cost.MachineProfile(name, prompt, decode, {1: 1}, {1: 1}, {1: 1}), card, device, 1)


def test_the_roofline_fit_recovers_what_made_the_tables():
    truth = layer_cost.Roofline(0.45, 0.7, 5e-4)
    samples = [
        twin_sample(f"m{i}", f, r, truth) for i, (f, r) in enumerate([(65e12, 3e11), (312e12, 2e12), (121e12, 3e11)])
    ]
    fitted = layer_cost.fit_roofline(samples)
    assert fitted.flops_efficiency == pytest.approx(0.45, rel=1e-3) and fitted.read_efficiency == pytest.approx(
        0.7, rel=1e-3
    )
    assert max(layer_cost.leave_one_out(samples).values()) < 1e-3
    wrong = twin_sample("odd", 65e12, 3e11, layer_cost.Roofline(0.1, 0.2, 5e-4))
    assert layer_cost.leave_one_out([*samples, wrong])["llama1_30b/odd"] > 0.3


def test_devices_that_share_a_layer_pay_for_their_sums():
    device = layer_cost.Device("m", 24e9, 3e11, 1e14, peer_bytes_per_s=1e10)
    roofline = layer_cost.Roofline(0.5, 0.5, 0.0, peer_efficiency=0.5)
    card = layer_cost.LLAMA_30B
    assert roofline.all_reduce_s(1000, card, device, 1) == 0
    # two sums of 1000 activations; of each, every device of four sends and receives 3/4 twice
    expected = 2 * 1000 * card.activation_bytes * 2 * 2 * 0.75 / (1e10 * 0.5)
    assert roofline.all_reduce_s(1000, card, device, 4) == pytest.approx(expected)
    assert roofline.prompt_s(1000, card, device, 4) > expected


def test_the_shipped_catalog_is_whole():
    shipped = catalog.load()
    assert shipped.device("L4").memory_bytes == 24e9 and all(d.source for d in shipped.devices.values())
    assert shipped.usd_per_h("H100", 2) == pytest.approx(2 * 7.6 * 0.9776)
    with pytest.raises(UsageError, match="TPU"):
        shipped.device("TPU")


def test_membership_and_its_bill(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "segment,time_ms,event,node,required_throughput_req_per_s\na,0,add,n0,\na,0,add,n1,\nb,0,add,x,\n"
        "a,60000,remove,n1,\na,70000,other,,0.8\na,100000,DONE,,\n"
    )
    trace = availability.read_membership(path, "a")
    assert trace.alive(59) == {"n0", "n1"} and trace.alive(60) == {"n0"} and trace.end_s == 100
    assert trace.node_seconds() == 100 + 60
    assert [e.rate for e in trace.events if e.rate] == [0.8]
    with pytest.raises(UsageError, match="'c'"):
        availability.read_membership(path, "c")


def test_counts_become_the_same_counts_again(tmp_path):
    counts = [2, 2, 5, 1, 0, 3]
    trace = availability.from_counts(10.0, counts)
    assert [len(trace.alive(10.0 * i)) for i in range(6)] == counts
    assert trace.node_seconds() == 10 * sum(counts)
    path = tmp_path / "counts.csv"
    path.write_text("trace,gap_seconds,start_tick,length_ticks,value\nt,10,0,2,4\nt,10,2,3,1\n")
    gap, read = availability.read_counts(path, "t")
    assert gap == 10 and read.tolist() == [4, 4, 1, 1, 1]


def test_a_mixture_reads_what_its_tokens_touch_and_computes_by_weight_not_by_byte():
    dense = layer_cost.ModelCard("dense", 4, 8, 100.0, 1.0)
    mixture = layer_cost.ModelCard("mixture", 4, 8, 100.0, 1.0, active_layer_bytes=10.0)
    assert dense.touched_bytes(1) == dense.touched_bytes(999) == 100.0
    assert mixture.touched_bytes(1) == pytest.approx(10.0) and mixture.touched_bytes(2) == pytest.approx(19.0)
    assert mixture.touched_bytes(500) == pytest.approx(100.0)  # a prompt meets every expert
    assert dense.layer_flops == 100.0 and mixture.layer_flops == 10.0
    quarter = layer_cost.ModelCard("quarter", 4, 8, 100.0, 1.0, weight_bytes=0.5)
    assert quarter.layer_flops == 400.0  # 200 weights of half a byte, a multiply and an add each
    device = Device("d", 1e9, 1e3, 1e9)
    free = layer_cost.Roofline(1.0, 1.0, 0.0)
    assert free.prompt_s(500, mixture, device) == pytest.approx(0.1)


def test_a_table_is_looked_up_all_at_once_as_one_by_one():
    table = layer_cost.Table((1, 4, 10), (1.0, 2.5, 3.0))
    assert table.upto(15) == pytest.approx([table(size) for size in range(16)])
