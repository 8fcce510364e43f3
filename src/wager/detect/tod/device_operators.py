"""The operators' forms for a torch device (`Execution.device`), float64 throughout.

Neighbours are those of the processor to the bit; sums run in another order, so scores agree to rounding. Each form cuts its work so that
what it allocates stays under the budget. SOD, LOCI, sampling and the growing of trees stay on the processor. Exact.
Source: TOD (arXiv 2110.14007). Legend: N rows, D features, K neighbours, B bins, C cuts of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.detect.tod import device, marginals, operators
from wager.detect.tod.batching import Execution, row_blocks
from wager.detect.tod.device import Found
from wager.detect.tod.device_knn import DeviceSearch, suits
from wager.detect.tod.knn import nearest
from wager.detect.tod.plan import on_device

MOST_PRODUCTS = 32768  # of a batch of small matrix products: beyond 65535 libraries differ


def parts(execution: Execution, items: int, bytes_each: int, most: int = 2**30) -> Iterator[tuple[int, int]]:
    """Runs of items whose scratch fits the budget, `most` at a time."""
    return row_blocks(items, max(1, min(items, most, device.budget_bytes(execution) // max(1, bytes_each))))


# -- neighbours --------------------------------------------------------------------------------------------------------------------------


@on_device("knn")
def knn(execution: Execution, x_ND: Tensor, k: int) -> Found:
    whole = execution.workers == 1 and not execution.checkpoint and not execution.ray_address
    if not (whole and suits(execution)):
        return device.placed(nearest(None, device.fetched(x_ND), k, execution), x_ND.device)
    search = DeviceSearch(x_ND.contiguous(), k, execution)
    pieces = [search.own(a, b) for a, b in row_blocks(len(x_ND), search.block_rows)]
    facts: dict[str, Any] = {"method": search.name, "rows": len(x_ND), "k": k} | search.facts
    for _, _, found in pieces:
        for name, value in found.items():
            facts[name] = facts.get(name, 0) + value
    return Found(torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]), facts)


@on_device("first")
def first(execution: Execution, found: Found, k: int) -> Found:
    return Found(found.distance_RK[:, :k].contiguous(), found.index_RK[:, :k].contiguous(), found.facts)


@on_device("with_self")
def with_self(execution: Execution, found: Found) -> Found:
    """The row itself takes its place among the copies of it, at distance 0, by index."""
    rows, k = found.index_RK.shape
    own = torch.arange(rows, device=found.index_RK.device)[:, None]
    before_R = ((found.distance_RK == 0) & (found.index_RK < own)).sum(1, keepdim=True)
    at = torch.arange(k, device=own.device)
    shifted = (at - (at > before_R).long()).clamp(min=0)
    distance, index = found.distance_RK.gather(1, shifted), found.index_RK.gather(1, shifted)
    here = at == before_R
    return Found(torch.where(here, 0.0, distance), torch.where(here, own, index), found.facts)


@on_device("aggregate")
def aggregate(execution: Execution, found: Found, method: str) -> Tensor:
    distance, k = found.distance_RK, found.distance_RK.shape[1]
    if method == "largest":
        return distance[:, -1].clone()
    return distance.mean(1) if method == "mean" else (distance[:, (k - 1) // 2] + distance[:, k // 2]) / 2


@on_device("local_density")
def local_density(execution: Execution, found: Found) -> Tensor:
    k_distance_N = found.distance_RK[:, -1].contiguous()
    return 1.0 / (torch.maximum(found.distance_RK, k_distance_N[found.index_RK]).mean(1) + 1e-10)


@on_device("density_ratio")
def density_ratio(execution: Execution, found: Found, density_N: Tensor) -> Tensor:
    return (density_N[found.index_RK] / density_N[:, None]).mean(1)


@on_device("negated")
def negated(execution: Execution, value_N: Tensor) -> Tensor:
    return -value_N


@on_device("angle_variance")
def angle_variance(execution: Execution, x_ND: Tensor, found: Found) -> Tensor:
    (n, k), d = found.index_RK.shape, x_ND.shape[1]
    out_N = torch.zeros(n, dtype=torch.float64, device=x_ND.device)
    upper_KK = torch.ones(k, k, dtype=torch.bool, device=x_ND.device).triu(1)
    for a, b in parts(execution, n, 8 * k * (3 * d + 6 * k), most=MOST_PRODUCTS):
        edge_RKD = x_ND[found.index_RK[a:b]] - x_ND[a:b, None]
        real_RK = (edge_RKD != 0).any(2)
        length_RK = torch.where(real_RK, edge_RKD.square().sum(2), 1.0)
        value_RKK = edge_RKD @ edge_RKD.mT / length_RK[:, :, None] / length_RK[:, None, :]
        used_RKK = upper_KK & real_RK[:, :, None] & real_RK[:, None, :]
        count_R = used_RKK.sum((1, 2)).clamp(min=1)
        mean_R = torch.where(used_RKK, value_RKK, 0.0).sum((1, 2)) / count_R
        apart_RKK = torch.where(used_RKK, value_RKK - mean_R[:, None, None], 0.0)
        out_N[a:b] = apart_RKK.square().sum((1, 2)) / count_R
    return out_N


@on_device("chaining")
def chaining(execution: Execution, x_ND: Tensor, found: Found) -> Tensor:
    """Every step of the path by its shortest way back: squared differences summed feature by feature, so that nothing cancels."""
    (n, k), d = found.index_RK.shape, x_ND.shape[1]
    x_DN = x_ND.T.contiguous()
    out_N = torch.empty(n, dtype=torch.float64, device=x_ND.device)
    later_SS = torch.ones(k + 1, k + 1, dtype=torch.bool, device=x_ND.device).triu()  # [step, earlier]
    weight_K = torch.arange(k, 0, -1, dtype=torch.float64, device=x_ND.device) * (2.0 / ((k + 1) * k))
    own_N1 = torch.arange(n, device=x_ND.device)[:, None]
    for a, b in parts(execution, n, 8 * (k + 1) * (3 * (k + 1) + 4)):
        path_RS = torch.cat([own_N1[a:b], found.index_RK[a:b]], 1)
        square_RSS = torch.zeros(b - a, k + 1, k + 1, dtype=torch.float64, device=x_ND.device)
        for f in range(d):
            place_RS = x_DN[f][path_RS]
            step_RSS = place_RS[:, :, None] - place_RS[:, None, :]
            square_RSS.addcmul_(step_RSS, step_RSS)
        best_RK = square_RSS.masked_fill_(later_SS, torch.inf).amin(2)[:, 1:]
        out_N[a:b] = best_RK.sqrt() @ weight_K
    return out_N


@on_device("chain_ratio")
def chain_ratio(execution: Execution, chain_N: Tensor, found: Found) -> Tensor:
    return torch.nan_to_num(chain_N * found.index_RK.shape[1] / chain_N[found.index_RK].sum(1))


# -- columns -----------------------------------------------------------------------------------------------------------------------------


@on_device("tail_probability")
def tail_probability(execution: Execution, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    n, d = x_ND.shape
    left_DN, right_DN = (torch.empty(d, n, dtype=torch.float64, device=x_ND.device) for _ in range(2))
    for a, b in parts(execution, d, 80 * n):
        values_CN = x_ND[:, a:b].T.contiguous()
        ordered_CN = values_CN.sort(1).values
        upto = torch.searchsorted(ordered_CN, values_CN, right=True)
        left_DN[a:b] = -(upto.double() / n).log()
        right_DN[a:b] = -((n - torch.searchsorted(ordered_CN, values_CN)).double() / n).log()
    return left_DN.T, right_DN.T


@on_device("tail_score")
def tail_score(execution: Execution, x_ND: Tensor, tails: tuple[Tensor, Tensor], rule: str) -> Tensor:
    left_ND, right_ND = tails
    sign_D = skewness_sign(x_ND)
    total_N = torch.zeros(len(x_ND), dtype=torch.float64, device=x_ND.device)
    for a, b in parts(execution, x_ND.shape[1], 48 * len(x_ND)):
        left, right, sign = left_ND[:, a:b], right_ND[:, a:b], sign_D[a:b]
        pointed = -left * (sign - 1).sign() + right * (sign + 1).sign()
        other = torch.maximum(left, right) if rule == "ecod" else (left + right) / 2
        total_N += torch.maximum(pointed, other).sum(1)
    return total_N


def skewness_sign(x_ND: Tensor) -> Tensor:
    """The sign of each column's skewness. Where rounding could turn it, the processor's own formula decides."""
    away_ND = x_ND - x_ND.mean(0)
    third_D, size_D = away_ND.pow(3).mean(0), away_ND.abs().pow(3).mean(0)
    sign_D = third_D.sign()
    unsure = (third_D.abs() <= 1e-9 * size_D) | (away_ND.square().mean(0) <= (1e-12 * x_ND.mean(0)) ** 2)
    doubtful = unsure.nonzero().squeeze(1)
    if len(doubtful):
        sign_D[doubtful] = torch.as_tensor(
            operators.skewness_sign(device.fetched(x_ND[:, doubtful])), device=x_ND.device
        )
    return sign_D


def equal_bins(values_CN: Tensor, bins: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Edges (on the processor, as numpy makes them), edges there, and counts of an equal-width histogram of each row of values."""
    low, high = device.fetched(torch.stack(values_CN.aminmax(dim=1)))
    flat = low == high
    edges = np.stack(
        [np.linspace(a, b, bins + 1) for a, b in zip(np.where(flat, low - 0.5, low), np.where(flat, high + 0.5, high), strict=True)]
    )  # fmt: skip
    edge_CB = torch.as_tensor(edges, device=values_CN.device)
    at = (torch.searchsorted(edge_CB, values_CN, right=True) - 1).clamp_(0, bins - 1)
    flat_at = at.add_(bins * torch.arange(len(at), device=at.device)[:, None]).view(-1)
    return edges, edge_CB, torch.bincount(flat_at, minlength=bins * len(at)).view(len(at), bins)


@on_device("histograms")
def histograms(execution: Execution, x_ND: Tensor, bins: int | str, density: bool) -> tuple[list, list]:
    if bins == "auto":
        return marginals.histograms(execution, device.fetched(x_ND), bins, density)
    heights, edges = [], []
    for a, b in parts(execution, x_ND.shape[1], 40 * len(x_ND)):
        edge, _, count = equal_bins(x_ND[:, a:b].T.contiguous(), int(bins))
        for e, c in zip(edge, device.fetched(count), strict=True):
            heights.append(c / np.diff(e) / c.sum() if density else c)
            edges.append(e)
    return heights, edges


@on_device("histogram_score")
def histogram_score(execution: Execution, x_RD: Tensor, made: tuple[list, list], alpha: float, tol: float) -> Tensor:
    height, edge = made
    if len({len(h) for h in height}) > 1:  # bins "auto": columns differ
        scores = marginals.histogram_score(execution, device.fetched(x_RD), made, alpha, tol)
        return device.placed(scores, x_RD.device)
    log_DB = torch.as_tensor(np.log2(np.stack(height) + alpha), device=x_RD.device)
    edge_DB = torch.as_tensor(np.stack(edge), device=x_RD.device)
    total_R = torch.zeros(len(x_RD), dtype=torch.float64, device=x_RD.device)
    for a, b in parts(execution, len(log_DB), 40 * len(x_RD)):
        at = torch.searchsorted(edge_DB[a:b], x_RD[:, a:b].T.contiguous()).sub_(1).clamp_(0, log_DB.shape[1] - 1)
        total_R += log_DB[a:b].gather(1, at).sum(0)  # training rows lie inside their own histogram
    return -total_R


@on_device("projected_histograms")
def projected_histograms(
    execution: Execution, x_ND: Tensor, projection: marginals.Projected, bins: int | str
) -> tuple[list, list]:
    if bins == "auto":
        return marginals.projected_histograms(execution, device.fetched(x_ND), projection, bins)
    heights, limits = [], []
    for values_CN in projected(execution, x_ND, projection):
        edge, _, count = equal_bins(values_CN, int(bins))
        for e, c in zip(edge, device.fetched(count), strict=True):
            height = c.astype(np.float64) + 1e-12
            heights.append(height / height.sum())
            limits.append(e)
    return heights, limits


@on_device("projected_score")
def projected_score(
    execution: Execution, x_RD: Tensor, made: tuple[list, list], projection: marginals.Projected
) -> Tensor:
    height, limit = made
    cuts, total_R, c0 = len(height), torch.zeros(len(x_RD), dtype=torch.float64, device=x_RD.device), 0
    if len({len(h) for h in height}) > 1:
        return device.placed(marginals.projected_score(execution, device.fetched(x_RD), made, projection), x_RD.device)
    log_CB = torch.as_tensor(np.log(np.stack(height)), device=x_RD.device)
    limit_CB = torch.as_tensor(np.stack(limit)[:, : log_CB.shape[1] - 1], device=x_RD.device).contiguous()
    for values_CN in projected(execution, x_RD, projection):
        c1 = c0 + len(values_CN)
        total_R -= log_CB[c0:c1].gather(1, torch.searchsorted(limit_CB[c0:c1], values_CN)).sum(0) / cuts
        c0 = c1
    return total_R / cuts


def projected(execution: Execution, x_ND: Tensor, projection: marginals.Projected) -> Iterator[Tensor]:
    """Rows of the projection times the data, as many at a time as the budget holds; always cut alike, so that bits repeat."""
    matrix_PD = torch.as_tensor(projection.matrix_PD, device=x_ND.device)
    for a, b in parts(execution, len(matrix_PD), 48 * len(x_ND)):
        yield matrix_PD[a:b] @ x_ND.T


# -- axes and trees ----------------------------------------------------------------------------------------------------------------------


@on_device("axes")
def axes(execution: Execution, x_ND: Tensor, standardize: bool, count: int) -> tuple[np.ndarray, ...]:
    """The triangle of a QR factorisation there; its few singular values here."""
    n, d = x_ND.shape
    centre_D = x_ND.mean(0) if standardize else torch.zeros(d, dtype=torch.float64, device=x_ND.device)
    scale_D = x_ND.std(0, correction=0) if standardize else torch.ones_like(centre_D)
    scale_D = torch.where(scale_D > 10 * np.finfo(float).eps * centre_D.abs(), scale_D, 1.0)
    z_ND = (x_ND - centre_D) / scale_D
    z_ND = z_ND - z_ND.mean(0)
    triangle = device.fetched(torch.linalg.qr(z_ND, mode="r")[1] if n > 2 * d else z_ND)
    return marginals.axes_of(triangle, n, d, device.fetched(centre_D), device.fetched(scale_D), count)


@on_device("axes_score")
def axes_score(
    execution: Execution, x_RD: Tensor, found: tuple[np.ndarray, ...], selected: int | None, weighted: bool
) -> Tensor:
    centre_D, scale_D, components, _, ratio = (torch.as_tensor(v, device=x_RD.device) for v in found)
    count = min(selected or len(components), len(components))
    total_R = torch.zeros(len(x_RD), dtype=torch.float64, device=x_RD.device)
    for a, b in parts(execution, len(x_RD), 24 * x_RD.shape[1] + 16):
        z_RD = (x_RD[a:b] - centre_D) / scale_D
        for axis, share in zip(components[-count:], ratio[-count:], strict=True):
            total_R[a:b] += (z_RD - axis).square_().sum(1).sqrt_() / (share if weighted else 1.0)
    return total_R


@on_device("path_score")
def path_score(execution: Execution, x_RD: Tensor, made: dict[str, Any]) -> Tensor:
    """All trees' paths at once, level by level: a row at a leaf stays there."""
    feature, cut, left, right = (
        torch.as_tensor(made[key], device=x_RD.device) for key in ("feature", "cut", "left", "right")
    )
    trees, nodes = feature.shape
    leaf = feature < 0
    here = torch.arange(nodes, device=x_RD.device).expand(trees, nodes)
    root_T = nodes * torch.arange(trees, device=x_RD.device)
    left, right = ((torch.where(leaf, here, side) + root_T[:, None]).view(-1).int() for side in (left, right))
    feature, cut, step = feature.clamp(min=0).view(-1).int(), cut.view(-1), (~leaf).view(-1)
    extra = torch.as_tensor(marginals.unsuccessful(made["size"]), device=x_RD.device).view(-1)
    x_RD = x_RD.float()
    depth = int(np.ceil(np.log2(max(made["samples"], 2))))
    out_R = torch.empty(len(x_RD), dtype=torch.float64, device=x_RD.device)
    for a, b in parts(execution, len(x_RD), 64 * trees):
        at_RT = root_T.int().expand(b - a, trees)
        length_RT = torch.zeros(b - a, trees, dtype=torch.int32, device=x_RD.device)
        for _ in range(depth):
            value_RT = x_RD[a:b].gather(1, feature[at_RT].long())
            length_RT += step[at_RT]
            at_RT = torch.where(value_RT.double() <= cut[at_RT], left[at_RT], right[at_RT])
        out_R[a:b] = (length_RT + extra[at_RT]).sum(1)
    usual = trees * float(marginals.unsuccessful(np.array([made["samples"]]))[0])
    return 2.0 ** -(out_R / usual if usual else torch.ones_like(out_R))
