"""What every graph detector can do; the training loop of those that learn. Labels never reach `fit`: it reads x and edge_index only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import erf
from scipy.stats import binom
from torch import Tensor, nn

from wager.detect.bond.graph import Graph
from wager.detect.bond.sampling import Sampler
from wager.errors import UsageError


class GraphDetector:
    """After `fit`: decision_score_ (N,) higher is more abnormal, threshold_, label_, edges_ (which edges were used)."""

    transductive = True
    contamination: float = 0.1
    symmetrize: bool = False

    def fit(self, data: Any, label: Any = None) -> GraphDetector:
        """Score the nodes of the graph. label is ignored."""
        graph = self.prepare(data)
        self.finish(self.scores(graph))
        self._fitted_on = graph
        return self

    def scores(self, graph: Graph) -> Tensor:
        raise NotImplementedError

    def prepare(self, data: Any) -> Graph:
        """The graph as this detector reads it: edges as stored, or in both directions with symmetrize=True."""
        given = Graph.of(data)
        graph = Graph(given.x, given.edge_index)
        if graph.nodes < 2:
            raise UsageError(f"the graph has {graph.nodes} node(s); at least 2 are needed")
        if not 0 < self.contamination <= 0.5:
            raise UsageError(f"contamination is {self.contamination}; it must be in (0, 0.5]")
        self.edges_ = "both directions" if self.symmetrize else "as stored"
        return graph.both_directions() if self.symmetrize else graph

    def finish(self, score_N: Tensor) -> None:
        self.decision_score_ = score_N.detach().to(torch.float32)
        finite = self.decision_score_[torch.isfinite(self.decision_score_)]
        self.threshold_ = (
            float(np.percentile(finite.numpy(), 100 * (1 - self.contamination))) if len(finite) else float("nan")
        )
        self.label_ = (self.decision_score_ > self.threshold_).long()

    def decision_function(self, data: Any) -> Tensor:
        """Scores of another graph. A transductive detector has parameters tied to its nodes and refuses."""
        self._check_fitted()
        if data is self._fitted_on:
            return self.decision_score_
        if self.transductive:
            raise UsageError(
                f"{type(self).__name__} is tied to the graph it was fitted on; call fit with the new graph"
            )
        return self.score_new(self.prepare(data))

    def score_new(self, graph: Graph) -> Tensor:
        raise NotImplementedError

    def predict(
        self,
        data: Any = None,
        return_score: bool = False,
        return_prob: bool = False,
        prob_method: str = "linear",
        return_conf: bool = False,
    ) -> Any:
        """Labels (1 outlier) of the fitted graph or another; with scores, probabilities and confidences if asked, in that order."""
        self._check_fitted()
        score = self.decision_score_ if data is None else self.decision_function(data)
        out: list[Tensor] = [(score > self.threshold_).long()]
        if return_score:
            out.append(score)
        if return_prob:
            out.append(self._probability(score, prob_method))
        if return_conf:
            n = len(self.decision_score_)
            below = torch.searchsorted(self.decision_score_.sort().values, score, right=True).numpy()
            confidence = 1 - binom.cdf(n - int(n * self.contamination), n, (1 + below) / (2 + n))
            out.append(torch.from_numpy(np.where(out[0].numpy() == 1, confidence, 1 - confidence)))
        return out[0] if len(out) == 1 else tuple(out)

    def _probability(self, score: Tensor, method: str) -> Tensor:
        train = self.decision_score_
        if method == "linear":
            return ((score - train.min()) / (train.max() - train.min()).clamp(min=1e-12)).clamp(0, 1)
        if method == "unify":
            return torch.from_numpy(
                erf(((score - train.mean()) / (train.std() * 2**0.5).clamp(min=1e-12)).numpy())
            ).clamp(0, 1)
        raise UsageError(f"unknown prob_method {method!r}; choose linear or unify")

    def _check_fitted(self) -> None:
        if not hasattr(self, "decision_score_"):
            raise UsageError(f"this {type(self).__name__} is not fitted yet; call fit first")

    def get_params(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"


class DeepGraphDetector(GraphDetector):
    """Training with Adam, on the whole graph or in mini-batches of sampled neighbourhoods (batch_size nodes, num_neigh neighbours a hop).

    A subclass builds its network and says loss and row scores of one pass; the last pass's scores stand.
    """

    lr: float
    weight_decay: float
    epoch: int
    seed: int | None
    num_layers: int
    batch_size: int = 0
    num_neigh: int | Sequence[int] = -1

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Parameters are attributes of the constructor's names: `keep` sets them."""

    def keep(self, given: Mapping[str, Any]) -> None:
        """Store the constructor's parameters under their names, and refuse those that no detector can take."""
        for name in inspect.signature(type(self).__init__).parameters:
            if name != "self":
                setattr(self, name, given[name])
        if self.batch_size < 0 or self.batch_size == 1:
            raise UsageError(f"batch_size is {self.batch_size}; give 0 for the whole graph, or at least 2 nodes")

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        raise NotImplementedError

    def step(self, model: Any, state: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(loss, scores) of a pass in training, over the nodes that `graph.head` names."""
        raise NotImplementedError

    def state(self, graph: Graph) -> Any:
        """What every epoch reads and no epoch changes."""
        raise NotImplementedError

    def trained(self, model: Any) -> list[nn.Parameter]:
        return list(model.parameters())

    def scores(self, graph: Graph) -> Tensor:
        generator = random_source(self.seed)
        model = self.build(graph, generator)
        self.prepare_training(model)
        model.train()
        score_N, states = torch.zeros(graph.nodes), self.states(graph, generator)

        def passes() -> Iterator[Tensor]:
            for where, state in states():
                loss, found = self.step(model, state, generator)
                score_N[where] = found.detach().to(score_N.dtype)
                yield loss

        descend(self.trained(model), self.lr, self.weight_decay, self.epoch, passes)
        self.model_ = model
        return score_N

    def states(self, graph: Graph, generator: torch.Generator) -> Callable[[], Iterable[tuple[Any, Any]]]:
        """What makes an epoch's (scored nodes, state) pairs: the whole graph, or its batches sampled anew."""
        if not self.batch_size or self.batch_size >= graph.nodes:
            whole = [(slice(None), self.state(graph))]
            return lambda: whole
        limits = [self.num_neigh] * self.num_layers if isinstance(self.num_neigh, int) else list(self.num_neigh)
        sampler = Sampler(graph, limits, generator)
        return lambda: ((part.head(part.ids), self.state(part)) for part in sampler.batches(self.batch_size))  # type: ignore[arg-type]

    def prepare_training(self, model: Any) -> None:
        """Further optimizers, where there is an adversary."""

    def score_new(self, graph: Graph) -> Tensor:
        self.model_.eval()
        with torch.no_grad():
            return self.step(self.model_, self.state(graph), torch.Generator().manual_seed(0))[1]


def random_source(seed: int | None) -> torch.Generator:
    """A generator with this seed, or with one of the system's."""
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def descend(
    parameters: Sequence[Tensor], lr: float, weight_decay: float, epochs: int, passes: Callable[[], Iterable[Tensor]]
) -> None:
    """The one training loop: Adam on every loss that `passes` yields in an epoch."""
    if epochs < 1:
        raise UsageError(f"epoch is {epochs}; it must be at least 1")
    optimizer = torch.optim.Adam(list(parameters), lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        for loss in passes():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
